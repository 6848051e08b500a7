"""What the defaults of `TuningConfig` were chosen from: the sandbox, validation split, mean ± std over seeds.

    python tests/studies/tuning_defaults.py --method lora [--domains print night] [--seeds 3]
    python tests/studies/tuning_defaults.py --method coop --domains jargon print
    python tests/studies/tuning_defaults.py --method lora --domains print night neon --defaults-only

One row per setting, each differs from the defaults in what it names. Per domain: accuracy of the tuned weak model; in
brackets that of the strong model with the change of logits added, ``argmax(z_strong + z_tuned - z_weak)`` with all
three standardised per image: how well the tuning carries over. Seconds are the CPU time of `tune` on one thread.
"""

import argparse
import tempfile
import time

import torch
from datasets import Dataset
from torch import Tensor

from hf_transmiter.algebra import standardise
from hf_transmiter.cli.demo import SANDBOX_TUNING
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method.tune import tune
from hf_transmiter.sandbox import load_dataset, model_path
from hf_transmiter.settings import split_tuning


SETTINGS = {
    "lora": [
        {},
        {"lr": 4e-3},
        {"lr": 2e-2},
        {"epochs": 10},
        {"keep_near": 0.0},
        {"keep_near": 0.3},
        {"augment": "none"},
        {"r": 2, "lora_alpha": 4},
        {"r": 16, "lora_alpha": 32},
        {"epochs": 40},
    ],
    "coop": [
        {},
        {"lr": 4e-3},
        {"lr": 2e-2},
        {"epochs": 10},
        {"epochs": 40},
        {"init_phrase": None, "n_ctx": 4},
        {"init_phrase": None},
        {"keep_near": 0.0},
        {"keep_near": 0.3},
        {"keep_near": 1.0},
    ],
}


def logits(encoder: DualEncoder, dataset: Dataset, templates=("a photo of a {}.",)) -> tuple[Tensor, Tensor]:
    """(N, C) over the dataset's classes, and the labels."""
    with tempfile.TemporaryDirectory() as folder:
        table = embed_dataset(encoder, dataset, cache_dir=folder, progress=False)
        return encoder.logits(table.embeds, encoder.embed_names(table.class_names, templates)), table.labels


def percent(z: Tensor, labels: Tensor) -> float:
    return 100 * (z.argmax(1) == labels).float().mean().item()


def cell(values: list[tuple[float, float, float]]) -> str:
    tuned, carried, seconds = torch.tensor(values).T
    spread = f" ± {tuned.std():.1f}" if len(tuned) > 1 else ""
    return f"{tuned.mean():.1f}{spread} ({carried.mean():.1f}) {seconds.mean():.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(SETTINGS), required=True)
    parser.add_argument("--domains", nargs="+", default=["print", "night"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--defaults-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weak, strong = (DualEncoder.from_pretrained(model_path(name)) for name in ("weak", "strong"))
    data = {name: (load_dataset(name, "train"), load_dataset(name, "validation")) for name in arguments.domains}
    before = {name: [logits(model, part[1]) for model in (weak, strong)] for name, part in data.items()}
    print(f"| {arguments.method} | {' | '.join(data)} |\n" + "|---" * (len(data) + 1) + "|")
    zero_shot = [f"{percent(*old):.1f} ({percent(*new):.1f})" for old, new in before.values()]
    print(f"| zero-shot weak (strong) | {' | '.join(zero_shot)} |", flush=True)
    templates = ("{}.",) if arguments.method == "coop" else ("a photo of a {}.",)
    for setting in SETTINGS[arguments.method][: 1 if arguments.defaults_only else None]:
        cells = []
        for name, (train, validation) in data.items():
            (z_weak, labels), (z_strong, _) = before[name]
            values = []
            for seed in range(arguments.seeds):
                how = split_tuning({"method": arguments.method, "seed": seed, **SANDBOX_TUNING, **setting})
                start = time.process_time()
                tuned = tune(weak, train, **how, progress=False)
                seconds = time.process_time() - start
                z, _ = logits(tuned.encoder, validation, templates)
                carried = standardise(z_strong)[0] + standardise(z)[0] - standardise(z_weak)[0]
                values.append((percent(z, labels), percent(carried, labels), seconds))
            cells.append(cell(values))
        print(f"| {setting or 'defaults'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
