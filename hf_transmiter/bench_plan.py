"""Cells of a bench: what each is made from, under which name it is kept, and what is still to be done."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from .bench_config import BenchConfig, Pair, Tuning, digest
from .dataset_specs import DatasetSpec
from .files import replace_file
from .hub import public_name
from .methods import METHODS, Variant
from .protocols import Part, Parts, parts
from .settings import TuningConfig


logger = logging.getLogger(__name__)

CELLS, FAILED, TUNED = "cells", "failed", "tuned"
"""Folders of an output: finished cells, messages of failed ones, tuned models."""
ZERO_SHOT = "zero-shot"
_FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One run: a pair of models, a dataset, a way to tune, shots and a seed. All rows are scored in it."""

    config: BenchConfig = field(repr=False)
    pair: Pair
    spec: DatasetSpec
    tuning: Tuning
    shots: int
    seed: int

    @cached_property
    def parts(self) -> Parts:
        return parts(self.config.protocol, self.spec, self.config.train_on)

    @cached_property
    def settings(self) -> TuningConfig:
        return self.tuning.config(self.parts.train.spec.name, self.shots, self.seed)

    @cached_property
    def facts(self) -> dict:
        """All that its content depends on, as far as that is known without loading models and images."""
        config = self.config
        found = {
            "experiment": config.experiment,
            "protocol": config.protocol,
            "models": [self.pair.weak, self.pair.strong],
            "test": config.spec_facts[self.parts.test.spec.name],
            "train": config.spec_facts[self.parts.train.spec.name],
            "tuning": asdict(self.settings),
            "allow_fewer": config.allow_fewer,
            "skip_unreadable": config.skip_unreadable,
            "max_images": config.max_images,
        }
        if config.experiment == "upgrade":
            return found | {"retrain": config.retrain}
        return found | {name: getattr(config, name) for name in ("general", "vocabulary", "num_anchors")}

    @cached_property
    def key(self) -> str:
        """Name of its file: what it is, and a digest of its facts."""
        words = [self.spec.name, self.tuning.name, f"{self.shots}-shot", f"seed-{self.seed}", digest(self.facts)]
        return "-".join(map(slug, words))

    @cached_property
    def shared(self) -> str:
        """Cells with the same digest may share a tuned model, so one process computes them all."""
        names = ("protocol", "train", "tuning", "allow_fewer", "skip_unreadable")
        return digest({name: self.facts[name] for name in names})

    @cached_property
    def rows(self) -> dict[str, str]:
        """Names of the rows, and the digests of their settings by which they are kept."""
        if self.config.experiment == "upgrade":
            return {ZERO_SHOT: ZERO_SHOT, self.tuning.name: "prompt"}
        return {variant.name: row_key(variant) for variant in self.config.variants}

    def __str__(self) -> str:
        what = f"{public_name(self.spec.name)}, {self.tuning.name}, {self.shots} shots, seed {self.seed}"
        return f"{what}, {self.pair}" if len(self.config.models) > 1 else what


def cells(config: BenchConfig) -> Iterator[Cell]:
    """All cells of a configuration, those that share a tuned model next to each other."""
    for spec in config.datasets:
        for tuning in config.tunings:
            for shots in config.shots:
                for seed in config.seeds:
                    for pair in config.models:
                        yield Cell(config, pair, spec, tuning, shots, seed)


def row_key(variant: Variant) -> str:
    """Digest of a row's settings, whatever it is called."""
    return digest({**asdict(variant), "name": None})


def slug(text: str) -> str:
    """As a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:60] or "x"


def cell_path(output_dir: str | os.PathLike, cell: Cell, folder: str = CELLS) -> Path:
    return Path(output_dir) / folder / f"{cell.key}.json"


def read_cell(output_dir: str | os.PathLike, cell: Cell) -> dict | None:
    """A finished cell, `None` where there is none: `rows` by digest, `made_from` (fingerprints), `num_images`.

    Files that are damaged, or of another cell, count as missing.
    """
    path = cell_path(output_dir, cell)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        logger.warning("%s cannot be read and will be made again: %s", path, error)
        return None
    usable = isinstance(content, dict) and content.get("format") == _FORMAT and isinstance(content.get("rows"), dict)
    if not usable or digest(content.get("facts")) != digest(cell.facts):
        logger.warning("%s holds something else and will be made again.", path)
        return None
    return content


def write_cell(output_dir: str | os.PathLike, cell: Cell, content: Mapping) -> None:
    """Keeps a finished cell (atomically) and forgets that it had failed."""
    content = {"format": _FORMAT, "cell": str(cell), "facts": cell.facts, **content}
    text = json.dumps(content, indent=1, ensure_ascii=False, default=dict) + "\n"
    replace_file(cell_path(output_dir, cell), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    cell_path(output_dir, cell, FAILED).unlink(missing_ok=True)


def write_failure(output_dir: str | os.PathLike, cell: Cell, message: str, traceback: str) -> None:
    """Keeps why a cell failed."""
    content = {"cell": str(cell), "message": message, "traceback": traceback.splitlines()}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    replace_file(cell_path(output_dir, cell, FAILED), lambda path: path.write_text(text, encoding="utf-8"))


def read_failure(output_dir: str | os.PathLike, cell: Cell) -> str | None:
    """Why a cell failed when it was last tried, `None` where it did not."""
    try:
        return json.loads(cell_path(output_dir, cell, FAILED).read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class Plan:
    """What a bench has done and has still to do.

    Args:
        total, done, failed (`int`): cells; failed ones are among those that are not done, and are tried again.
        images (`dict[tuple, float | None]`):
            Passes of an image tower by model, dataset and what the images are for; each image counted once per model,
            `None` where the number of images is not known before they are loaded.
        tunings (`dict[tuple, tuple]`): trainings by model, way to tune and dataset: how many, and in all of them
            steps, images and class prompts (0 where no prompt learns); `None` for unknown numbers.
        texts (`dict[str, int | None]`): class prompts by model, each counted once.
    """

    total: int
    done: int
    failed: int
    images: dict[tuple[str, str, str], float | None]
    tunings: dict[tuple[str, str, str], tuple[int, int | None, int | None, int | None]]
    texts: dict[str, int | None]

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "cells": {"total": self.total, "done": self.done, "failed": self.failed},
            "image_passes": [[*key, count] for key, count in self.images.items()],
            "tunings": [[*key, *counts] for key, counts in self.tunings.items()],
            "text_passes": self.texts,
        }

    def __str__(self) -> str:
        missing = self.total - self.done
        lines = [f"{self.total} cells: {self.done} done, {missing} to do ({self.failed} of them failed before)."]
        if not missing:
            return lines[0]
        for model, prompts in self.texts.items():
            of_model = {key: count for key, count in self.images.items() if key[0] == model}
            lines.append(f"{model}: {_number(_sum(of_model.values()))} image passes, {_number(prompts)} prompts")
            lines += [f"  {dataset}, {what}: {_number(count)}" for (_, dataset, what), count in of_model.items()]
            for (tuned, name, dataset), (runs, *counts) in self.tunings.items():
                if tuned == model:
                    steps, images, prompts = map(_number, counts)
                    lines.append(
                        f"  tuning ({name}) on {dataset}: {runs} runs, {steps} steps over {images} images and "
                        f"{prompts} prompts"
                    )
        lines.append("Embeddings that are cached already cost nothing; ? is known once the images are loaded.")
        return "\n".join(lines)


def make_plan(config: BenchConfig, output_dir: str | os.PathLike) -> Plan:
    """What is done and what is to do, from finished files and the catalogue's counts; loads no model, no image."""
    every = list(cells(config))
    missing = [cell for cell in every if not is_done(read_cell(output_dir, cell), cell)]
    images, tunings, texts = {}, {}, {}
    for cell in missing:
        for model, part, draw in _passes(cell):
            what = "few shots" if draw else "train" if part.role == "train" else part.role
            images[model, part.spec.name, what + (", base classes" if part.base_only else ""), draw] = _count(
                part, cell
            )
            texts.setdefault(model, {})[part.spec.name] = part.spec
        for model in _tuned_models(cell):
            key = (model, cell.tuning.name, cell.parts.train.spec.name, digest([cell.settings.shots, cell.seed]))
            tunings[key] = _training(cell)
        if config.general is not None:  # any images: how many is known once they are loaded
            images |= {(model, config.general, "general", None): None for model in (cell.pair.weak, cell.pair.strong)}
    failed = sum(read_failure(output_dir, cell) is not None for cell in missing)
    prompts = {model: _sum(map(_prompts, specs.values())) for model, specs in texts.items()}
    by_kind = {key[:3]: _sum(v for k, v in images.items() if k[:3] == key[:3]) for key in images}
    trainings = {}
    for key in tunings:
        same = [counts for other, counts in tunings.items() if other[:3] == key[:3]]
        trainings[key[:3]] = (len(same), *(_sum(column) for column in zip(*same, strict=True)))
    return Plan(len(every), len(every) - len(missing), failed, by_kind, trainings, prompts)


def is_done(content: Mapping | None, cell: Cell) -> bool:
    """Whether a cell's file has all its rows."""
    return content is not None and all(key in content["rows"] for key in cell.rows.values())


def needs_ceiling(config: BenchConfig) -> bool:
    """Whether the strong (or new) model is tuned as the weak one is."""
    return config.retrain or any(map(is_ceiling, config.variants))


def is_ceiling(variant: Variant) -> bool:
    """Whether a row is the strong model tuned as the weak one was; with settings of its own it makes its own."""
    return variant.method == "tuned strong" and not variant.settings


def needs_labelled(config: BenchConfig) -> bool:
    """Whether a row reads labelled images on the strong model."""
    return any(METHODS[variant.method].needs.labels for variant in config.variants)


def _tuned_models(cell: Cell) -> list[str]:
    return [cell.pair.weak] + [cell.pair.strong] * needs_ceiling(cell.config)


def _passes(cell: Cell) -> Iterator[tuple[str, Part, tuple | None]]:
    """Model, images, and for few shots which draw of them."""
    drawn, (weak, strong) = (cell.shots, cell.seed), (cell.pair.weak, cell.pair.strong)
    yield weak, cell.parts.train, drawn
    if needs_ceiling(cell.config) or (needs_labelled(cell.config) and not cell.parts.elsewhere):
        yield strong, cell.parts.train, drawn
    for model in (weak, strong):
        if cell.config.experiment == "transfer":
            yield model, cell.parts.unlabelled, None
        yield model, cell.parts.test, None


def _classes(part: Part) -> int | None:
    count = None if part.spec.class_names is None else len(part.spec.class_names)
    return count if count is None or not part.base_only else (count + 1) // 2


def _count(part: Part, cell: Cell) -> int | None:
    if part.role == "train":
        classes = _classes(part)
        return None if classes is None else classes * cell.shots
    counts = part.spec.counts
    count = counts.get(part.role, counts.get("train") if part.role == "unlabelled" else None)
    if count is None:
        return None
    if cell.config.max_images is not None:
        count = min(count, cell.config.max_images)
    if part.base_only:
        return None if part.spec.class_names is None else round(count * _classes(part) / len(part.spec.class_names))
    return count


def _training(cell: Cell) -> tuple[int | None, int | None, int | None]:
    """Steps, and images and class prompts in all of them."""
    examples, settings = _count(cell.parts.train, cell), cell.settings
    if examples is None:
        return None, None, None
    steps = settings.epochs * math.ceil(examples / settings.batch_size)
    prompts = 0 if settings.method == "lora" else steps * _classes(cell.parts.train)
    return steps, settings.epochs * examples, prompts


def _prompts(spec: DatasetSpec) -> int | None:
    return None if spec.class_names is None else len(spec.class_names) * len(spec.templates)


def _sum(counts) -> int | None:
    counts = list(counts)
    return None if None in counts else sum(counts)


def _number(count: float | None) -> str:
    return "?" if count is None else f"{count:,}"
