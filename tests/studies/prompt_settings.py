"""Chooses the sandbox's settings of each prompt learner by validation accuracy on the old model alone.

    python tests/studies/prompt_settings.py --output-dir out/prompt_settings [--methods contcoop]
        [--settings '[{"lr": 0.02, "epochs": 50, "adapter": ["class_embed=mean_token"]}]']

No upgraded model is looked at. Every cell (method, setting, task) is a JSON file in the output folder and is skipped
when it is there. Prints one markdown row per setting, mean over the tasks.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

from hf_transmiter import sandbox
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.hub.files import replace_file
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import split_tuning


TASKS = ("print", "jargon")  # night and neon stay unseen
TEXT = {"epochs": 50, "batch_size": 32}
DEEP = {"epochs": 20, "batch_size": 16, "augment": "shift"}
RATES = (2e-3, 2e-2, 1e-1)


def grid(**axes) -> list[dict]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


SEARCH = {
    "coop": [{**TEXT, **s} for s in grid(lr=RATES)],
    "kgcoop": [{**TEXT, **s} for s in grid(lr=RATES)],
    "prograd": [{**TEXT, **s} for s in grid(lr=RATES)],
    "cocoop": [{"epochs": 10, "batch_size": 8, **s} for s in grid(lr=RATES)],
    "contcoop": [{**TEXT, **s} for s in grid(lr=RATES, keep_near=(0.0, 0.1, 1.0))],
    "ivlp": [{**DEEP, **s} for s in grid(lr=RATES)],
    "maple": [{**DEEP, **s} for s in grid(lr=RATES)],
    "promptsrc": [{**DEEP, **s} for s in grid(lr=RATES)],
}
"""The first grid: rates for everyone, and the weight of the pull where the paper leaves it open."""


def cells(methods: list[str], options: list[dict] | None) -> list[tuple[str, dict]]:
    return [(method, setting) for method in methods for setting in (options or SEARCH[method])]


def score(method: str, setting: dict, task: str, seed: int, cache: Path) -> float:
    file = cache / f"{json.dumps([method, setting, task, seed], sort_keys=True)}.json".replace("/", "_")
    if file.is_file():
        return json.loads(file.read_text())
    weak = DualEncoder.from_pretrained(sandbox.model_path("weak"))
    how = split_tuning({"method": method, "seed": seed, **setting})
    tuned = tune(weak, sandbox.load_dataset(task, "train"), **how, progress=False)
    accuracy = evaluate(tuned, sandbox.load_dataset(task, "validation"), progress=False)[0].value
    replace_file(file, lambda temporary: Path(temporary).write_text(json.dumps(accuracy)))
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(SEARCH), choices=list(SEARCH))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(sandbox.domains()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, help="JSON list of settings instead of the first grid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| method | setting | {' | '.join(arguments.tasks)} | mean |")
    print(f"|:---|:---|{'---:|' * len(arguments.tasks)}---:|")
    for method, setting in cells(arguments.methods, arguments.settings):
        found = [score(method, setting, task, arguments.seed, arguments.output_dir) for task in arguments.tasks]
        shown = ", ".join(f"{key} {value}" for key, value in setting.items())
        numbers = [*found, sum(found) / len(found)]
        print(f"| {method} | {shown} | {' | '.join(f'{x:.1f}' for x in numbers)} |", flush=True)


if __name__ == "__main__":
    main()
