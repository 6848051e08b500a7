"""Why some prompts survive an upgrade: studies on the sandbox, with figures.

    python tests/studies/prompt_studies.py --output-dir out/studies --models sandbox_models
        [--studies drift layers lengths class-embeddings domains] [--seeds 3]

* drift: what changed in the text tower of weak and of deep, per layer.
* layers: CoOp learnt at one layer at a time, on the six text layers of deep, scored on deep-upgraded.
* lengths: CoOp and ContCoOp with contexts of 2 to 16 vectors, weak to weak-upgraded.
* class-embeddings: ContCoOp with the class embeddings of the upgraded model, and with those of the old one.
* domains: learnt on jargon's classes in the street, scored on the same classes in other styles.

`--models` holds the models trained on demand: `python tests/making/pretrain.py --models independent deep
deep-upgraded --output-dir sandbox_models`. Settings are those of `prompts.py`; adapters are kept and not tuned again.
"""

import argparse
from pathlib import Path

import torch
import upgrade_figures
from parameter_drift import parameter_drift
from prompts import SETTINGS, TASKS, harmonic, load
from tuned_seeds import tune_seeds
from upgrade_studies import (
    class_embedding_study,
    context_length_study,
    layer_study,
    mean_std,
    out_of_distribution,
)

from hf_transmiter import sandbox
from hf_transmiter.evaluation.drift import drift_table, feature_drift
from hf_transmiter.settings import split_tuning


TASK = "jargon"
QUIET = {"progress": False}


def images(task: str = TASK):
    return sandbox.load_dataset(task, "train"), sandbox.load_dataset(task, "test")


def shown(values) -> str:
    return "{:.1f} ± {:.1f}".format(*mean_std(values))


def drift(arguments) -> None:
    for name in ("weak", "deep"):
        old, new = (load(model, arguments.models) for model in (name, f"{name}-upgraded"))
        names = sandbox.load_dataset(TASK, "test").features["label"].names
        parameters, features = parameter_drift(old, new), feature_drift(old, new, names)
        print(f"\n{name} to {name}-upgraded\n\n{drift_table(parameters)}\n\n{drift_table(features)}")
        upgrade_figures.drift_figure(parameters, features, arguments.output_dir / f"drift-{name}.png")


def layers(arguments) -> None:
    old, new = (load(model, arguments.models) for model in ("deep", "deep-upgraded"))
    tuning, seeds = SETTINGS["CoOp"], range(arguments.seeds)
    points, floors = layer_study(old, new, *images(), tuning, arguments.output_dir / "layers", seeds=seeds, **QUIET)
    print(f"\nCoOp at one layer, deep to deep-upgraded, {TASK}\n")
    print("| layer | old model | upgraded model | H |\n|---|---|---|---|")
    for (layer, before, spread), (_, after, other) in zip(*points.values(), strict=True):
        print(f"| {layer} | {before:.1f} ± {spread:.1f} | {after:.1f} ± {other:.1f} | {harmonic(before, after):.1f} |")
    print(floors)
    upgrade_figures.layer_study_figure(points, arguments.output_dir / "layers.png", floors)


def lengths(arguments) -> None:
    old, new = (load(model, arguments.models) for model in ("weak", "weak-upgraded"))
    tunings = {name: SETTINGS[name] for name in ("CoOp", "ContCoOp")}
    options = {"seeds": range(arguments.seeds), "lengths": (2, 4, 8, 12), **QUIET}  # the sandbox reads 24 tokens
    points = context_length_study(old, new, *images(), tunings, arguments.output_dir / "lengths", **options)
    print(f"\nH by length of the context, {TASK}\n\n{points}")
    upgrade_figures.context_length_figure(points, arguments.output_dir / "lengths.png")


def class_embeddings(arguments) -> None:
    for pair in (("weak", "weak-upgraded"), ("weak", "independent"), ("deep", "deep-upgraded")):
        old, new = (load(model, arguments.models) for model in pair)
        for task in TASKS:
            train, test = images(task)
            folder = arguments.output_dir.parent / "prompts" / pair[0] / "ContCoOp" / task / "all"
            how = split_tuning(SETTINGS["ContCoOp"])
            adapters = tune_seeds(old, train, range(arguments.seeds), folder, **how, **QUIET)
            found = class_embedding_study(adapters, old, new, test, **QUIET)
            cells = ", ".join(f"{kind} {shown(values)}" for kind, values in found.items())
            print(f"class embeddings, {':'.join(pair)}, {task}: {cells}", flush=True)


def domains(arguments) -> None:
    old, new = (load(model, arguments.models) for model in ("weak", "weak-upgraded"))
    train, test = images()
    tests = {"street (own)": test}
    tests |= {style: sandbox.load_dataset(TASK, "test", style=style) for style in ("studio", "print", "night", "neon")}
    print(f"\n{TASK}, other domains: old / upgraded\n\n| | {' | '.join(tests)} |\n|---|{'---|' * len(tests)}")
    for method in arguments.methods:
        folder = arguments.output_dir.parent / "prompts" / "weak" / method / TASK / "all"
        how = split_tuning(SETTINGS[method])
        adapters = tune_seeds(old, train, range(arguments.seeds), folder, **how, **QUIET)
        found = out_of_distribution(adapters, old, new, tests, **QUIET)
        if method == arguments.methods[0]:
            floors = [f"{floor['old'][0]:.1f} / {floor['upgraded'][0]:.1f}" for floor, _, _ in found.values()]
            print(f"| zero-shot | {' | '.join(floors)} |")
        cells = [f"{shown(row['old'])} / {shown(row['upgraded'])}" for _, row, _ in found.values()]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


STUDIES = {
    "drift": drift,
    "layers": layers,
    "lengths": lengths,
    "class-embeddings": class_embeddings,
    "domains": domains,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder with models trained on demand")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--methods", nargs="+", default=["CoOp", "KgCoOp", "ContCoOp"], help="of the domains study")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.studies:
        STUDIES[name](arguments)


if __name__ == "__main__":
    main()
