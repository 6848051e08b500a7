"""Every way to upgrade on the sandbox, per task and per kind of teacher, over seeds.

    python tests/studies/sandbox.py [--tasks print:lora jargon:coop ...] [--seeds 3] [--ceiling] [--novel]

Each seed draws another 16 shots per class and tunes the weak model anew. Prints mean and standard deviation, and the
paired differences (same seed) to zero-shot strong and to the tuned weak model. `--novel` tunes on the first half of
the classes only and adds base, novel, harmonic mean and joint.
"""

import argparse
import json
import statistics
from pathlib import Path

from hf_transmiter.bench.protocols import only_base
from hf_transmiter.cli.demo import Task
from hf_transmiter.evaluation.compare import Comparison
from hf_transmiter.evaluation.methods import METHODS


ROWS = (
    *METHODS,
    {"refit": {"solver": "ridge"}, "name": "refit after a ridge extraction"},
)
"""Those of `compare`, and settings of some."""


class HalfSeen(Task):
    """Labelled and unlabelled pictures are those of the first half of the classes."""

    def images(self, split: str):
        images = super().images(split)
        if split not in ("train", "unlabelled"):
            return images
        return only_base(images)


def report(runs: list[Comparison], metric: str) -> list[dict]:
    rows = []
    for method in runs[0].rows:
        values = [run.value(method, metric) for run in runs]
        row = {"method": method, "metric": metric, "mean": statistics.fmean(values), "std": _std(values)}
        for other in ("zero-shot strong", "tuned weak"):
            gaps = [value - run.value(other, metric) for value, run in zip(values, runs, strict=True)]
            row[f"vs {other}"] = (statistics.fmean(gaps), _std(gaps))
        costs = [score.seconds for run in runs for score in run.scores if score.method == method]
        row["seconds"] = None if None in costs else statistics.fmean(costs)  # what was given cost nothing here
        rows.append(row)
    return rows


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs = ["print:lora", "print:coop", "night:lora", "night:coop", "neon:lora", "neon:coop", "jargon:coop"]
    parser.add_argument("--tasks", nargs="+", default=pairs, help="TASK:METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strong", default="strong", help="sandbox model to upgrade to")
    parser.add_argument("--ceiling", action="store_true", help="also tune the strong model")
    parser.add_argument("--novel", action="store_true", help="tune on the first half of the classes")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    everything, rows = {}, [row for row in ROWS if arguments.ceiling or row != "tuned strong"]
    for pair in arguments.tasks:
        domain, method = pair.split(":")
        task = (HalfSeen if arguments.novel else Task).load(domain, arguments.strong)
        runs = [task.compare(seed, method, rows, progress=False)[0] for seed in range(arguments.seeds)]
        metrics = ("base", "novel", "hm", "joint") if arguments.novel else ("accuracy",)
        print(
            f"\n{pair} to {arguments.strong}, {arguments.seeds} seeds; recommended: {runs[0].recommended}", flush=True
        )
        everything[pair] = [row for metric in metrics for row in report(runs, metric)]
        for row in everything[pair]:
            strong, tuned = row["vs zero-shot strong"], row["vs tuned weak"]
            print(
                f"{row['method']:40s} {row['metric']:9s} {row['mean']:6.1f} ± {row['std']:4.1f}"
                f"   vs zero-shot strong {strong[0]:+6.1f} ± {strong[1]:4.1f}   vs tuned weak {tuned[0]:+6.1f}"
                f" ± {tuned[1]:4.1f}   " + ("" if row["seconds"] is None else f"{row['seconds']:6.2f} s"),
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
