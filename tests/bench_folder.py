"""A bench that takes seconds: two tiny random models and two small data sets on disk."""

import copy
from pathlib import Path

import tiny_models
from datasets import Dataset, DatasetDict


NAMES = ("cat", "dog", "car", "tree")
TUNING = {"optimizer": "adamw", "schedule": "cosine", "lr": 0.01, "epochs": 3, "batch_size": 8, "n_ctx": 2}
VARIANTS = ["zero-shot strong", "EFT", "bridge from task images"]


def write(folder: Path, make_dataset) -> dict:
    """Writes models and data, and gives the configuration."""
    for seed, name in enumerate(("weak", "strong")):
        tiny_models.save("clip", folder / name, seed)
    for seed, name in enumerate(("colours", "shades")):
        splits = {"train": make_dataset(24, NAMES, seed), "test": make_dataset(20, NAMES, seed + 10)}
        DatasetDict(splits).save_to_disk(folder / name)
    return {
        "title": "Tiny bench",
        "models": [{"weak": str(folder / "weak"), "strong": str(folder / "strong")}],
        "datasets": [{"name": "colours", "source": str(folder / "colours")}],
        "protocol": "base-to-novel",
        "shots": [3],
        "seeds": [1, 2],
        "tunings": [{"name": "CoOp", "method": "coop", "init_phrase": None, **TUNING}],
        "variants": copy.deepcopy(VARIANTS),
    }


def spoil(folder: Path, split: str = "test") -> None:
    """The third picture of a split cannot be read any more."""
    data = DatasetDict.load_from_disk(folder)
    rows = data[split].with_format("arrow")[:].to_pylist()
    rows[2]["image"] = {"bytes": b"not a picture", "path": "broken.png"}
    spoilt = Dataset.from_list(rows, features=data[split].features)
    DatasetDict({**data, split: spoilt}).save_to_disk(folder.with_name(f"{folder.name}-spoilt"))
