"""Prompt learners across an upgrade on the sandbox: learnt on the old model, attached unchanged to the upgraded one.

    python tests/studies/prompts.py --output-dir out/prompts [--pair weak:weak-upgraded] [--tasks print jargon]
        [--seeds 3] [--methods CoOp ContCoOp] [--models sandbox_models] [--retrain] [--whole] [--json FILE]

16 shots per class. Every adapter is kept in the output folder and not tuned again when it is there, so the script can
be interrupted, and several processes can share the work (by --methods or --tasks). `--models` holds the models that
are trained on demand (`python tests/making/pretrain.py --models independent deep deep-upgraded`). Settings
come from `prompt_settings.py`, which looks at the old model's validation split of print and jargon only.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from tuned_seeds import Metrics, score_seeds, tune_seeds
from upgrade_studies import mean_std

from hf_transmiter import sandbox
from hf_transmiter.bench.protocols import only_base
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.settings import split_tuning


TASKS = ("print", "night", "neon", "jargon")
TEXT = {"epochs": 50, "batch_size": 32}
DEEP = {"epochs": 20, "batch_size": 16, "augment": "shift"}
# The smallest rate, and then the strongest pull, within a standard error (1.6 points) of the best on the old model.
SETTINGS = {
    "CoOp": {"method": "coop", **TEXT, "lr": 2e-2},
    "KgCoOp": {"method": "kgcoop", **TEXT, "lr": 1e-1},
    "ProGrad": {"method": "prograd", **TEXT, "lr": 2e-2},
    "CoCoOp": {"method": "cocoop", "epochs": 10, "batch_size": 8, "lr": 2e-2},
    "ContCoOp": {"method": "contcoop", **TEXT, "lr": 2e-3, "keep_near": 0.1},
    "IVLP": {"method": "ivlp", **DEEP, "lr": 2e-3},
    "IVLP, text only": {"method": "ivlp", **TEXT, "lr": 2e-2, "augment": "none", "vision_depth": 0},
    "MaPLe": {"method": "maple", **DEEP, "lr": 2e-2},
    "PromptSRC": {"method": "promptsrc", **DEEP, "lr": 2e-3},
}


def load(name: str, models: Path | None) -> DualEncoder:
    shipped = models is None or not (models / name).is_dir()
    return DualEncoder.from_pretrained(sandbox.model_path(name) if shipped else models / name)


def row_of(method: str, task: str, pair: tuple[DualEncoder, DualEncoder], arguments) -> dict[str, tuple[float, ...]]:
    """Accuracies by column, one per seed."""
    old, new = pair
    how, seeds = split_tuning(SETTINGS[method]), range(arguments.seeds)
    train, test = (sandbox.load_dataset(task, split) for split in ("train", "test"))
    folder = arguments.output_dir / arguments.pair.split(":")[0] / method / task
    quiet = {"progress": False}
    whole = tune_seeds(old, train, seeds, folder / "all", **how, **quiet)
    again = None
    if arguments.retrain:
        again = tune_seeds(new, train, seeds, folder / new.name_or_path.rsplit("/", 1)[-1], **how, **quiet)
    floor, row, _ = score_seeds(whole, old, new, test, retrained=again, **quiet)
    if arguments.whole:
        return {"zero-shot": columns(floor, {}, arguments.seeds), method: columns(row, {}, arguments.seeds)}
    half = only_base(train)
    halves = tune_seeds(old, half, seeds, folder / "base", **how, **quiet)
    half_floor, half_row, _ = score_seeds(halves, old, new, test, seen_classes=half.features["label"].names, **quiet)
    return {"zero-shot": columns(floor, half_floor, arguments.seeds), method: columns(row, half_row, arguments.seeds)}


def columns(row: Metrics, halves: Metrics, seeds: int) -> dict[str, tuple[float, ...]]:
    found = {"old": row.get("old"), "upgraded": row.get("upgraded"), "re-trained": row.get("retrained")}
    for model in ("old", "upgraded"):
        found |= {f"{model} {metric}": halves.get(f"{model} {metric}") for metric in ("base", "novel")}
    return {key: None if values is None else values * (seeds // len(values)) for key, values in found.items()}


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def summarise(tasks: list[dict[str, tuple[float, ...] | None]]) -> dict[str, list[float] | None]:
    """Means over tasks, one per seed; harmonic means are those of the means, as in the papers."""
    found = {}
    for column in tasks[0]:
        several = [task[column] for task in tasks]
        found[column] = None if None in several else [statistics.fmean(seed) for seed in zip(*several, strict=True)]
    pairs = {"H": ("old", "upgraded")}
    pairs |= {f"{model} HM": (f"{model} base", f"{model} novel") for model in ("old", "upgraded")}
    for name, (a, b) in pairs.items():
        both = found[a], found[b]
        found[name] = None if None in both else [harmonic(*values) for values in zip(*both, strict=True)]
    return found


COLUMNS = (
    "old",
    "upgraded",
    "H",
    "re-trained",
    *(f"{m} {c}" for m in ("old", "upgraded") for c in ("base", "novel", "HM")),
)


def table(rows: dict[str, dict[str, list[float] | None]]) -> str:
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|:---|{'---:|' * len(COLUMNS)}"]
    for method, found in rows.items():
        cells = ["–" if found[c] is None else "{:.1f} ± {:.1f}".format(*mean_std(found[c]))
                 for c in COLUMNS]  # fmt: skip
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--pair", default="weak:weak-upgraded", help="OLD:NEW")
    parser.add_argument("--models", type=Path, help="folder with models trained on demand")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--retrain", action="store_true", help="also train on the upgraded model (the ceiling)")
    parser.add_argument("--whole", action="store_true", help="only all classes at once: no base and novel halves")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pair = tuple(load(name, arguments.models) for name in arguments.pair.split(":"))
    by_task: dict[str, dict[str, dict]] = {}
    for method in arguments.methods:
        for task in arguments.tasks:
            by_task.setdefault(task, {}).update(row_of(method, task, pair, arguments))
            print(f"done: {method}, {task}", flush=True)
    rows = {method: summarise([by_task[task][method] for task in by_task]) for method in next(iter(by_task.values()))}
    for task, found in by_task.items():
        print(f"\n{arguments.pair}, {task}\n\n{table({method: summarise([row]) for method, row in found.items()})}")
    print(f"\n{arguments.pair}, mean of {', '.join(by_task)}, {arguments.seeds} seeds\n\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"tasks": by_task, "mean": rows}, indent=1))


if __name__ == "__main__":
    main()
