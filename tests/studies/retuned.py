"""Label-free re-tuning: what a strong model learns from the experts' labels, and the settings it was given.

    python tests/studies/retuned.py [--tasks neon night print jargon] [--seeds 1 2 3] [--cells FOLDER]
    python tests/studies/retuned.py --choose [--settings '{}' '{epochs: 20}']

The weak model is tuned with 16 shots per class, its image tower by LoRA (on jargon a CoOp prompt); the strong one
learns from it on 1,500 unlabelled pictures. Prints accuracy on the test split, mean ± std over seeds, and CPU seconds
of the re-tuning; finished cells (task, seed) are kept in `--cells` and not computed again.

With `--choose`, settings side by side, on seed 0 and the validation split: fields of `TuningConfig`, and beside them
`sharpen` (the experts' logits times that) and `rounds` (in the second one the re-tuned model stands in for z).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor

from hf_transmiter.cli.demo import METHODS, SANDBOX_TUNING, Task
from hf_transmiter.data.anchors import DEFAULT_TEMPLATES, Anchors
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.experts import expert_logits, tuned_and_weak_logits
from hf_transmiter.method.teacher import teacher_logits
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import TuningConfig


SETTINGS = [
    "{}",
    "{keep_near: 0.1}",
    "{sharpen: 0.5}",
    "{sharpen: 100}",
    "{epochs: 20}",
    "{rounds: 2}",
]


def percent(z: Tensor, labels: Tensor) -> float:
    return 100 * (z.argmax(1) == labels).float().mean().item()


class Run:
    """One task and seed: the teacher, the experts, and what is scored."""

    def __init__(self, domain: str, seed: int, split: str, cache: str):
        self.task, self.seed, self.split = Task.load(domain), seed, split
        self.options = {"progress": False, "cache_dir": cache}
        self.images, train = self.task.images("unlabelled"), self.task.images("train")
        self.names = tuple(train.features["label"].names)
        config = TuningConfig(seed=seed, **SANDBOX_TUNING)
        self.tuned = tune(self.task.weak, train, METHODS[domain], config=config, **self.options)

    def score(self, model: AnchorClassifier) -> float:
        test = self.task.images(self.split)
        return percent(teacher_logits(model, test, self.names, **self.options), torch.tensor(test["label"]))

    def known(self) -> dict[str, float]:
        """Zero-shot, the teacher, emulated fine-tuning."""
        test = self.task.images(self.split)
        strong = AnchorClassifier(self.task.strong, Anchors(self.names, (), DEFAULT_TEMPLATES))
        t, w = tuned_and_weak_logits(self.tuned, self.task.weak, test, self.names, **self.options)
        z, labels = teacher_logits(strong, test, self.names, **self.options), torch.tensor(test["label"])
        rows = {"zero-shot strong": z, "tuned weak": t, "EFT †": z + t - w}
        return {name: percent(logits, labels) for name, logits in rows.items()}

    def retuned(self, sharpen: float = 1.0, rounds: int = 1, **settings) -> tuple[float, float, dict]:
        start = time.process_time()
        about = {"weak": self.task.weak, **self.options}
        training = {**SANDBOX_TUNING, "epochs": None, "keep_near": None, **settings}
        config, teacher = TuningConfig(seed=self.seed, **training), self.tuned
        for number in range(rounds):
            if number:
                t, w = tuned_and_weak_logits(self.tuned, self.task.weak, self.images, self.names, **self.options)
                teacher = 2 * t + teacher_logits(found, self.images, self.names, **self.options) - w  # noqa: F821
            elif sharpen != 1:
                teacher = sharpen * expert_logits(teacher, self.task.strong, self.images, self.names, **about)
            adapter = METHODS[self.task.domain] if isinstance(teacher, Tensor) else None
            given = self.options if isinstance(teacher, Tensor) else about  # with weak=, logits are the teacher's own
            found = tune(self.task.strong, self.images, adapter, teacher=teacher, config=config, **given)
        return self.score(found), time.process_time() - start, found.facts.learnt


def choose(arguments, cache: str) -> None:
    runs = [Run(domain, 0, "validation", cache) for domain in arguments.tasks]
    print(f"| settings | {' | '.join(arguments.tasks)} |\n" + "|:---" + "|---:" * len(runs) + "|", flush=True)
    for setting in arguments.settings or SETTINGS:
        found = [run.retuned(**yaml.safe_load(setting)) for run in runs]
        cells = [f"{value:.1f} ({seconds:.0f} s)" for value, seconds, _ in found]
        print(f"| `{setting}` | {' | '.join(cells)} |", flush=True)


def cell(domain: str, seed: int, folder: Path, cache: str) -> dict:
    """The rows of a task and seed; read where they are on disk."""
    path = folder / f"{domain}-{seed}.json"
    if not path.is_file():
        run = Run(domain, seed, "test", cache)
        value, seconds, learnt = run.retuned()
        rows = {**run.known(), "**re-tuned**, no labels": value, "CPU seconds of that": seconds}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"rows": rows, "learnt": learnt}))
    return json.loads(path.read_text())["rows"]


def report(arguments, cache: str) -> None:
    found: dict[str, dict[str, list]] = {}
    for seed in arguments.seeds:
        for domain in arguments.tasks:
            for name, number in cell(domain, seed, arguments.cells, cache).items():
                found.setdefault(name, {}).setdefault(domain, []).append(number)
    print(f"| accuracy, % | {' | '.join(arguments.tasks)} |\n" + "|:---" + "|---:" * len(arguments.tasks) + "|")
    for name, numbers in found.items():
        print(f"| {name} | {' | '.join(_cell(numbers[domain], name) for domain in arguments.tasks)} |")


def _cell(values: list[float], name: str) -> str:
    mean = statistics.fmean(values)
    if "seconds" in name:
        return f"{mean:.0f}"
    return f"{mean:.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(METHODS), default=["neon", "night", "print", "jargon"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cells", type=Path, default=Path("retuned"), help="folder of finished cells")
    parser.add_argument("--choose", action="store_true", help="settings side by side, on seed 0")
    parser.add_argument("--settings", nargs="+", help="of --choose, as YAML: '{keep_near: 0.3}'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        (choose if arguments.choose else report)(arguments, cache)


if __name__ == "__main__":
    main()
