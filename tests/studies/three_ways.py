"""Re-attach the prompt, transport its class vectors, or transfer through logits? The same upgrades, each way.

    python tests/studies/three_ways.py [--seeds 3] [--tasks jargon print night] [--teachers coop kgcoop contcoop]
        [--upgrades weak-upgraded independent strong] [--models FOLDER] [--cells FOLDER] [--json FILE]

The sandbox's weak model is tuned with 16 shots per class and goes to a model trained on from it (weak-upgraded), to
one of the same widths that has nothing in common with it (independent, which is not in the package:
`python tests/making/pretrain.py --models independent` makes it; `--models` says where it is), and to one
whose text tower is wider (strong), where a prompt cannot be re-attached. Prints accuracy on the test split, mean ± std
over seeds. Every cell (upgrade, task, teacher, seed) is kept in `--cells` and not computed again.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from hf_transmiter import sandbox
from hf_transmiter.cli.demo import NUM_ANCHORS, SANDBOX_TUNING, Task
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.compare import compare
from hf_transmiter.hub.files import replace_file
from hf_transmiter.method.tune import tune
from hf_transmiter.sandbox import model_path
from hf_transmiter.settings import METHOD_SETTINGS, ExtractionConfig, split_tuning


ROWS = {
    "zero-shot weak": "zero-shot old",
    "zero-shot strong": "zero-shot new",
    "tuned weak": "tuned old",
    "re-attached prompt": "prompt re-attached",
    "bridge from text": "class vectors, bridge from text",
    "bridge from task images": "class vectors, bridge from task images",
    "TransMiter": "logits, TransMiter as published",
    "EFT": "logits, EFT (old models at run time)",
    "refit": "refit",
    "prompt transfer": "prompt transfer",
    "tuned strong": "re-trained on the new model (labels)",
}
"""Methods of `compare`, and what they are called here."""


def settings(method: str, seed: int) -> dict:
    """The sandbox's rates, the method's own pull; ContCoOp with a full KL, ten times its default."""
    pull = {key: METHOD_SETTINGS[method][key] for key in ("pull", "keep_near") if key in METHOD_SETTINGS[method]}
    pull |= {"keep_near": 1.0} if method == "contcoop" else {}
    return split_tuning({**SANDBOX_TUNING, **pull, "method": method, "seed": seed})


def run(task: Task, how: dict, teacher) -> dict[str, dict[str, float]]:
    """Accuracy and seconds of every method."""
    quiet = {"progress": False}
    found = compare(
        task.weak,
        task.strong,
        teacher,
        task.images("test"),
        unlabelled=task.images("unlabelled"),
        tuned_strong=tune(task.strong, task.images("train"), **how, **quiet),
        vocabulary=sandbox.vocabulary(),
        num_anchors=NUM_ANCHORS,
        gradient=ExtractionConfig(solver="gradient", basis="fixed", seed=how["config"].seed),
        variants=list(ROWS),
        **quiet,
    )
    scores = [score for score in found.scores if score.metric == "accuracy"]
    return {score.method: {"accuracy": score.value, "seconds": score.seconds} for score in scores}


def cells(arguments, upgrades: list[str]) -> dict[tuple, dict]:
    """(upgrade, task, teacher, seed) to what `run` found; those on disk are read."""
    found, new = {}, {}
    for seed in range(arguments.seeds):
        for domain in arguments.tasks:
            for method in arguments.teachers:
                task, how, teacher = None, settings(method, seed), None
                for upgrade in upgrades:
                    path = arguments.cells / f"{upgrade}-{domain}-{method}-{seed}.json"
                    if not path.is_file():
                        task = task or Task.load(domain)
                        teacher = teacher or tune(task.weak, task.images("train"), **how, progress=False)
                        new[upgrade] = new.get(upgrade) or model(upgrade, arguments.models)
                        write_json(path, run(replace(task, strong=new[upgrade]), how, teacher))
                        print(f"done: {path.stem}", flush=True)
                    found[upgrade, domain, method, seed] = json.loads(path.read_text())
    return found


def model(name: str, folder: Path | None) -> DualEncoder:
    own = None if folder is None else folder / name
    return DualEncoder.from_pretrained(own if own is not None and own.is_dir() else model_path(name))


def write_json(path: Path, value) -> None:
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def table(found: dict[tuple, dict], upgrade: str, arguments) -> tuple[str, list[dict]]:
    """Markdown and rows of one upgrade: a column per task and teacher."""
    columns = [(domain, method) for domain in arguments.tasks for method in arguments.teachers]
    lines = [
        f"| weak to {upgrade} | " + " | ".join(f"{domain}, {method}" for domain, method in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    rows = []
    for method, name in ROWS.items():
        line = []
        for column in columns:
            runs = [found[(upgrade, *column, seed)] for seed in range(arguments.seeds)]
            if method not in runs[0]:
                line.append("–")
                continue
            values = [run[method]["accuracy"] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.fmean(values)
            costs = [run[method]["seconds"] for run in runs]
            seconds = None if None in costs else statistics.fmean(costs)
            facts = dict(zip(("task", "teacher"), column, strict=True)) | {"upgrade": upgrade, "method": method}
            rows.append({**facts, "mean": mean, "std": spread, "seconds": seconds, "values": values})
            line.append(f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}")
        lines.append(f"| {name} | " + " | ".join(line) + " |")
    return "\n".join(lines), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrades", nargs="+", default=["weak-upgraded", "independent", "strong"])
    parser.add_argument("--tasks", nargs="+", default=["jargon", "print", "night"])
    parser.add_argument("--teachers", nargs="+", default=["coop", "kgcoop", "contcoop"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="folder with models that are not in the package")
    parser.add_argument("--cells", type=Path, default=Path("three_ways"), help="folder of finished cells")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    upgrades = list(arguments.upgrades)
    if "independent" in upgrades and not (arguments.models and (arguments.models / "independent").is_dir()):
        print("left out: independent (see --models)")
        upgrades.remove("independent")
    arguments.cells.mkdir(parents=True, exist_ok=True)
    found, rows = cells(arguments, upgrades), []
    for upgrade in upgrades:
        text, more = table(found, upgrade, arguments)
        rows += more
        print(f"\n{text}", flush=True)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
