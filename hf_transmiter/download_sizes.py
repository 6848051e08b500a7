"""What is to be fetched from the Hub, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from pathlib import Path

import datasets.config
from datasets import DatasetBuilder
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from transformers.utils import SAFE_WEIGHTS_NAME

from .dataset_cache import hub_builder
from .dataset_specs import DatasetSpec
from .hub import OPEN_CLIP, SANDBOX, hub_errors, split_revision


_OF_A_MODEL = (".json", ".txt", ".model", ".jinja")  # beside the weights: configuration, processor, tokenizer


def builder_of(spec: DatasetSpec) -> DatasetBuilder:
    """Of a dataset of the Hub, see [`hub_builder`]."""
    name, revision = split_revision(spec.location)
    return hub_builder(name, spec.subset, revision)


def on_hub(spec: DatasetSpec) -> bool:
    """Whether a dataset is to be fetched, and does not lie here."""
    return not (spec.source.startswith(SANDBOX) or glob(spec.source))


def _listing(name: str, kind: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """Commit, and files of a repository with their sizes."""
    with hub_errors(name):
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings}


def in_words(num_bytes: int) -> str:
    """``"1.7 GB"``"""
    size, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "bytes" else f"{size:.1f} {units[0]}"


def check_room(models: Sequence[str], specs: Sequence[DatasetSpec]) -> None:
    """Whether the disk has room for what is to be fetched, as far as sizes are known.

    Args:
        models (`Sequence[str]`), specs (`Sequence[DatasetSpec]`): what is going to be read.

    Raises:
        OSError: it has not.
    """
    downloads, arrow = 0, 0
    for source in models:
        downloads += _quietly(lambda source=source: _model_bytes(source), 0)
    for spec in filter(on_hub, specs):
        missing, built = _quietly(lambda spec=spec: _dataset_bytes(spec), (0, 0))
        downloads, arrow = downloads + missing, arrow + built
    needs: dict[int, tuple[Path, int]] = {}
    for place, size in ((constants.HF_HUB_CACHE, downloads), (datasets.config.HF_DATASETS_CACHE, arrow)):
        place = next(path for path in (Path(place), *Path(place).absolute().parents) if path.exists())
        needs[place.stat().st_dev] = (place, needs.get(place.stat().st_dev, (place, 0))[1] + size)
    for place, size in needs.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise OSError(
                f"{in_words(size)} are to be fetched, and there are {in_words(free)} left in {place}: make room, or "
                "set HF_HOME to another disk. Nothing was fetched but adapters and bridges."
            )


def _quietly(measure: Callable, unknown):
    try:
        return measure()
    except (OSError, ValueError, DatasetsError):  # reading it will say what is wrong
        return unknown


def _model_bytes(source: str) -> int:
    """What is missing of a model's repository."""
    name, revision = split_revision(source)
    if name.startswith((SANDBOX, OPEN_CLIP)) or Path(name).exists():
        return 0
    commit, files = _listing(name, "model", revision)
    top = {file: size for file, size in files.items() if "/" not in file}
    single = SAFE_WEIGHTS_NAME in top
    weights = [file for file in top if file.endswith(".safetensors") and (file == SAFE_WEIGHTS_NAME or not single)]
    return _missing(
        name, "model", commit, {file: top[file] for file in top if file in weights or file.endswith(_OF_A_MODEL)}
    )


def _dataset_bytes(spec: DatasetSpec) -> tuple[int, int]:
    """What is missing of a dataset: in downloads, and in the Arrow files made of them, which are about as large."""
    builder, name = builder_of(spec), split_revision(spec.location)[0]
    commit, files = _listing(name, "dataset", builder.hash)
    prefix = f"hf://datasets/{name}@{commit}/"
    urls = [url for split in (builder.config.data_files or {}).values() for url in split]
    of_subset = {url.removeprefix(prefix): files.get(url.removeprefix(prefix), 0) for url in urls}
    if Path(builder.cache_dir).is_dir():
        return 0, 0
    return _missing(name, "dataset", commit, of_subset), sum(of_subset.values())


def _missing(name: str, kind: str, commit: str, files: Mapping[str, int]) -> int:
    there = (isinstance(try_to_load_from_cache(name, file, revision=commit, repo_type=kind), str) for file in files)
    return sum(size for size, found in zip(files.values(), there, strict=True) if not found)
