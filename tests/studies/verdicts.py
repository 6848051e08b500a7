"""What `compare` says about real photographs, with labels and without: is each verdict right?

    python tests/studies/tiny_photos_strong.py --data FOLDER --weak FOLDER --output-dir STRONG --grid-dir GRID
    python tests/studies/verdicts.py --grid-dir GRID --weak FOLDER --strong STRONG [--classes 19] [--first 0]

Small photographs of some classes of Tiny ImageNet (every so many-th of the 200, from `--first` on), as they are and in
inverted colours, which the weak model has never seen. Of the 30 training photographs per class 15 are labelled and
tune the weak model, 15 are unlabelled; 25 are test photographs. Teachers:

- lora, coop: the image tower, or a prompt, tuned on the labels;
- nothing: LoRA at a rate at which nothing is learnt;
- chance: LoRA trained hard on shuffled labels.

Prints per kind of pictures and teacher the accuracies and both verdicts.
"""

import argparse
import logging
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, disable_progress_bars, load_dataset
from PIL import ImageOps

from hf_transmiter import DualEncoder, TuningConfig, compare, tune


SETTINGS = {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 1e-3, "batch_size": 32, "shots": 15}
TEACHERS = {
    "lora": ("lora", {"epochs": 15, "lr": 1e-3}),
    "coop": ("coop", {"epochs": 15, "lr": 3e-3}),
    "nothing": ("lora", {"epochs": 1, "lr": 1e-6}),
    "chance": ("lora", {"epochs": 30, "lr": 3e-3}),
}
ROWS = (
    *("zero-shot weak", "zero-shot strong", "tuned weak", "EFT", "bridge from text", "bridge from task images"),
    *("refit", "untuned teacher"),
)


def photographs(folder: Path, split: str, classes: list[int], inverted: bool) -> Dataset:
    """The photographs of some classes, one class after the other."""
    data = load_dataset("parquet", data_files=str(folder / "photos" / f"{split}-*.parquet"), split="train")
    labels, names = data["label"][:], data.features["label"].names
    rows = [row for kind in classes for row, label in enumerate(labels) if label == kind]
    positions = [classes.index(labels[row]) for row in rows]
    images = [data[row]["image"].convert("RGB") for row in rows]
    images = [ImageOps.invert(image) for image in images] if inverted else images
    found = Dataset.from_dict({"image": images, "label": positions})
    return found.cast_column("label", ClassLabel(names=[names[kind] for kind in classes]))


def shuffled(data: Dataset) -> Dataset:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    labels, feature = data["label"][:], data.features["label"]
    data = data.remove_columns("label").add_column("label", [labels[row] for row in order])
    return data.cast_column("label", feature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--grid-dir", "--weak", "--strong"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.getLogger("hf_transmiter").setLevel(logging.ERROR)
    weak, strong = (DualEncoder.from_pretrained(str(folder)) for folder in (arguments.weak, arguments.strong))
    classes = list(range(arguments.first, 200, 200 // arguments.classes))[: arguments.classes]
    for inverted in (False, True):
        train, test = (photographs(arguments.grid_dir, split, classes, inverted) for split in ("train", "test"))
        tuning, unlabelled = (train.select(range(start, len(train), 2)) for start in (0, 1))
        for teacher, (method, settings) in TEACHERS.items():
            data = shuffled(tuning) if teacher == "chance" else tuning
            config = TuningConfig(**SETTINGS, **settings)
            tuned = tune(weak, data, method, config=config, progress=False)
            about = {"unlabelled": unlabelled, "variants": ROWS, "progress": False}
            found = compare(weak, strong, tuned, test, **about)
            print(f"\n== {'inverted' if inverted else 'as they are'}, teacher: {teacher}")
            print("; ".join(f"{row} {found.value(row):.1f}" for row in found.rows), found.skipped or "")
            print("with labels:", found.recommended, {k: round(v, 3) for k, v in found.evidence.items()})
            print("  " + found.advice)
            names = test.features["label"].names
            bare = test.remove_columns("label")
            found = compare(weak, strong, tuned, bare, class_names=names, **about)
            print("without:", found.recommended)
            print("  " + found.advice, flush=True)
            if method == "coop":
                found = compare(weak, strong, tuned, bare, class_names=names, variants=ROWS, progress=False)
                print("without labels and unlabelled pictures:", found.recommended)
                print("  " + found.advice, flush=True)


if __name__ == "__main__":
    main()
