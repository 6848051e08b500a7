"""[`Cell`]: one run of a bench, and its file; [`Workshop`]: what cells are made with, each thing made once."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset

from .. import sandbox
from ..data.anchors import PROMPTED, Anchors
from ..data.catalogue import DatasetSpec, load_split
from ..data.embeddings import content_fingerprint
from ..data.images import guess_columns, load_images
from ..data.splits import base_names
from ..data.vocabulary import NUM_ANCHORS, load_vocabulary, universal_vocabulary
from ..encoders.dual_encoder import DualEncoder, load_encoder
from ..evaluation.compare import Comparison, compare
from ..evaluation.drift import feature_drift
from ..evaluation.methods import LABELS, METHODS, NEEDS, Variant
from ..evaluation.upgrade import ZERO_SHOT, score_upgrade
from ..hub.adapter_files import CONFIG, TEACHER_FILE, WEIGHTS
from ..hub.files import CHECKPOINT, beside, entries, file_digest, replace_file, replace_folder
from ..hub.repo import public_name
from ..method.classifier import AnchorClassifier
from ..method.saved import load_teacher
from ..method.tune import starting_templates, tune
from ..settings import ExtractionConfig
from .config import BenchConfig, Pair, Tuning, digest
from .protocols import Part, Parts, draw, only_base, parts


logger = logging.getLogger(__name__)

T = TypeVar("T")
CELLS, FAILED, TUNED = "cells", "failed", "tuned"
"""Folders of an output: finished cells, messages of failed ones, tuned models."""
WHOLE = "digest.txt"  # of a tuned model's files
_FORMAT = 2
_SAID_ONLY = ("name", "title", "notes")
_DRIFT_NAMES = 200  # common nouns that both models of an upgrade are asked about


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

    @property
    def scored(self) -> list[Part]:
        """What both models are shown, the test images first."""
        return [self.parts.test] + [self.parts.unlabelled] * (self.config.experiment == "transfer")

    @property
    def tuned_models(self) -> list[str]:
        """The weak (old) one and, for a ceiling, the strong (new) one."""
        ceiling = self.config.retrain or any(map(is_ceiling, self.config.variants))
        return [self.pair.weak] + [self.pair.strong] * ceiling

    @cached_property
    def how(self) -> dict:
        """Arguments of `tune`."""
        return self.tuning.on(self.parts.train.spec.name, self.shots, self.seed)

    @cached_property
    def facts(self) -> dict:
        """All that its content depends on, as far as that is known without loading models and images."""
        config = self.config
        names = ("experiment", "protocol", "allow_fewer", "skip_unreadable", "max_images")
        names += ("retrain",) if config.experiment == "upgrade" else ("general", "vocabulary", "num_anchors")
        return {
            **{name: getattr(config, name) for name in names},
            "models": list(self.pair),
            "test": _spec_digest(self.parts.test.spec),
            "train": _spec_digest(self.parts.train.spec),
            "tuning": {**self.how["adapter"], **asdict(self.how["config"])},
            "rows": [asdict(variant) for variant in config.variants],
        }

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

    def __str__(self) -> str:
        what = f"{public_name(self.spec.name)}, {self.tuning.name}, {self.shots} shots, seed {self.seed}"
        return f"{what}, {self.pair}" if len(self.config.models) > 1 else what


def cells(config: BenchConfig) -> Iterator[Cell]:
    """All cells of a configuration, those that share a tuned model next to each other."""
    grid = product(config.datasets, config.tunings, config.shots, config.seeds, config.models)
    return (Cell(config, pair, spec, tuning, shots, seed) for spec, tuning, shots, seed, pair in grid)


def _identity(images: Dataset) -> str:
    return content_fingerprint(images, guess_columns(images)[0])


def _digest_of(folder: Path) -> str:
    """Of the files of a tuned model that its answers depend on."""
    return digest([file_digest(folder / name) for name in (WEIGHTS, CONFIG, TEACHER_FILE)])


def slug(text: str) -> str:
    """As a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:60] or "x"


def is_ceiling(variant: Variant) -> bool:
    """Whether a row is the strong model tuned as the weak one was; with settings of its own it makes its own."""
    return variant.method == "tuned strong" and not variant.settings


def _spec_digest(spec: DatasetSpec) -> str:
    """Of all that its images and labels depend on."""
    return digest({key: value for key, value in asdict(spec).items() if key not in _SAID_ONLY})


def read_cell(output_dir: Path, cell: Cell) -> dict | None:
    """A cell's file, `None` where there is none: `rows` by name, `made_from` (fingerprints), `num_images`.

    Files that are damaged, or of another cell, count as missing.
    """
    path = output_dir / CELLS / f"{cell.key}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and will be made again: %s", path, error)
        return None
    usable = isinstance(content, dict) and content.get("format") == _FORMAT and isinstance(content.get("rows"), dict)
    usable = usable and content.pop("digest", None) == digest(content)
    if not usable or digest(content.get("facts")) != digest(cell.facts):
        logger.warning("%s holds something else and will be made again.", path)
        return None
    return content


def write_cell(output_dir: Path, cell: Cell, content: Mapping) -> None:
    """Keeps a finished cell (atomically) and forgets that it had failed."""
    content = {"format": _FORMAT, "cell": str(cell), "facts": cell.facts, **content}
    content = json.loads(json.dumps(content, default=dict))  # as it will be read
    _write(output_dir / CELLS, cell, {**content, "digest": digest(content)})
    (output_dir / FAILED / f"{cell.key}.json").unlink(missing_ok=True)


def write_failure(output_dir: Path, cell: Cell, error: Exception) -> None:
    """Keeps, and logs, why a cell failed."""
    message = str(error) if isinstance(error, (ValueError, OSError)) and str(error) else repr(error)
    logger.warning("%s failed: %s", cell, message)
    lines = "".join(traceback.format_exception(error)).splitlines()
    _write(output_dir / FAILED, cell, {"cell": str(cell), "message": message, "traceback": lines})


def _write(folder: Path, cell: Cell, content: Mapping) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, default=dict) + "\n"
    replace_file(folder / f"{cell.key}.json", lambda path: path.write_text(text, encoding="utf-8"))


def read_failure(output_dir: Path, cell: Cell) -> str | None:
    """Why a cell failed when it was last tried, `None` where it did not."""
    try:
        return json.loads((output_dir / FAILED / f"{cell.key}.json").read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_done(content: Mapping | None) -> bool:
    """Whether a cell is there, and no row of it was lost to a lack of memory or the like."""
    return content is not None and not any("failed" in row for row in content["rows"].values())


def make_plan(config: BenchConfig, output_dir: Path) -> dict:
    """What a bench has still to do, from finished files; loads no model, no image.

    `total`, `done` and `failed` (they are tried again) are numbers of cells; `tunings` says how often each model is
    tuned how and on what, as lists of model, way to tune, dataset, runs.
    """
    every = list(cells(config))
    missing = [cell for cell in every if not is_done(read_cell(output_dir, cell))]
    runs = {
        (model, cell.tuning.name, cell.parts.train.spec.name, cell.shots, cell.seed)
        for cell in missing
        for model in cell.tuned_models
    }
    failed = sum(read_failure(output_dir, cell) is not None for cell in missing)
    tunings = [[*key, count] for key, count in sorted(Counter(run[:3] for run in runs).items())]
    return {"total": len(every), "done": len(every) - len(missing), "failed": failed, "tunings": tunings}


class Alone:
    """What an accelerator says to a process that works by itself, although others were launched with it."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device | str):
        self.device = device

    def wait_for_everyone(self) -> None:
        """There is nobody else."""


class Workshop:
    """Everything cells are made with. What cannot be loaded raises the same error whenever it is asked for.

    Arguments are those of [`run_bench`]; tuned models are kept in `tuned/` of the output.
    """

    def __init__(
        self,
        config: BenchConfig,
        output_dir: Path,
        *,
        models: dict | None = None,
        embedding: dict | None = None,
        progress: bool = True,
    ):
        self.config, self.output_dir, self._models = config, output_dir, models or {}
        self.embedding = {"progress": progress, **(embedding or {})}
        self._made: dict = {}

    @property
    def options(self) -> dict:
        """Of everything that embeds images, for this process alone."""
        return {"accelerator": Alone(self._models.get("device") or "cpu"), **self.embedding}

    def _once(self, key, make: Callable[[], T]) -> T:
        if key not in self._made:
            try:
                self._made[key] = make()
            except (ValueError, OSError) as error:
                self._made[key] = error
        if isinstance(self._made[key], Exception):
            raise self._made[key]
        return self._made[key]

    def encoder(self, name: str) -> DualEncoder:
        """A model of the configuration."""
        return self._once(("model", name), lambda: load_encoder(name, **self._models))

    def images(self, part: Part) -> Dataset:
        """Images of a part, base classes only where the part says so."""

        def load() -> Dataset:
            limit = None if part.role == "train" else self.config.max_images
            options = {"max_images": limit, "skip_unreadable": self.config.skip_unreadable}
            images = load_split(part.spec, part.role, **options)
            return only_base(images) if part.base_only else images

        return self._once(("images", part.role, part.base_only, part.spec.name), load)

    def few_shots(self, cell: Cell) -> Dataset:
        """The labelled images of a cell."""
        train, allow = self.images(cell.parts.train), self.config.allow_fewer
        drawn = ("drawn", cell.parts.train.spec.name, cell.parts.train.base_only, cell.shots, cell.seed)
        return self._once(drawn, lambda: draw(train, cell.shots, cell.seed, allow_fewer=allow))

    def general(self) -> Dataset | None:
        """Images of any kind, for a bridge."""
        if self.config.general is None:
            return None
        options = {"prefer": ("unlabelled", "train"), "max_images": self.config.max_images}
        return self._once("general", lambda: load_images(self.config.general, **options))

    def made_from(self, cell: Cell) -> dict:
        """Fingerprints of the models and images of a cell. Raises what loading them raises."""
        models = {name: self.encoder(name).cache_key for name in cell.pair}
        images = [self.few_shots(cell), *map(self.images, cell.scored), self.general()]
        return {"models": models, "images": [None if one is None else _identity(one) for one in images]}

    def to_embed(self, cell: Cell) -> list[tuple[str, Dataset]]:
        """Models and images that a cell needs embedded, besides those of tuned image towers."""
        found = [(cell.pair.weak, self.few_shots(cell))]
        reads_labels = any(LABELS in METHODS[variant.method].needs for variant in self.config.variants)
        if len(cell.tuned_models) > 1 or (reads_labels and not cell.parts.elsewhere):
            found.append((cell.pair.strong, self.few_shots(cell)))
        shared = [*map(self.images, cell.scored), self.general()]
        return found + [(model, images) for images in shared if images is not None for model in cell.pair]

    def tuned(self, cell: Cell, model: str) -> Path:
        """Folder of a model of the cell after tuning; tuned now, or from its checkpoint on, if it is not there."""
        encoder, train = self.encoder(model), self.images(cell.parts.train)
        self.few_shots(cell)  # says what is wrong with them
        templates = starting_templates(cell.how["adapter"]["method"], cell.parts.train.spec.templates)
        names = train.features["label"].names
        facts = [encoder.cache_key, _identity(train), names, list(templates), cell.facts["tuning"]]
        words = [cell.parts.train.spec.name, cell.tuning.name, f"{cell.shots}-shot", f"seed-{cell.seed}"]
        folder = self.output_dir / TUNED / "-".join([*map(slug, words), digest(facts)])
        if (folder / TEACHER_FILE).is_file():
            with suppress(OSError, ValueError):
                if (folder / WHOLE).read_text() == _digest_of(folder):
                    return folder
            logger.warning("%s is damaged and will be made again.", folder)
        options = {"checkpoint": beside(folder, CHECKPOINT), "keep_checkpoint": True}
        options |= {key: self.options[key] for key in ("accelerator", "progress", "cache_dir") if key in self.options}
        tuned = tune(encoder, train, **cell.how, templates=templates, **options)

        def save(made: Path) -> None:
            tuned.save_pretrained(made)
            (made / WHOLE).write_text(_digest_of(made))

        replace_folder(folder, save, replaces=entries(folder))
        options["checkpoint"].unlink(missing_ok=True)
        return folder

    def asked(self, cell: Cell, model: str, names: Sequence[str]) -> AnchorClassifier:
        """A tuned model of the cell, read from its folder and asked about these names."""
        tuned = load_teacher(os.fspath(self.tuned(cell, model)), self.encoder(model))
        learnt = tuned.anchors.templates == PROMPTED
        templates = PROMPTED if learnt else cell.parts.test.spec.templates
        return AnchorClassifier(tuned.encoder, Anchors(names, (), templates))

    def make(self, cell: Cell) -> dict:
        """What [`read_cell`] gives. A row has its `metrics` and what it `needs`, or says why it was `skipped`, or why
        it `failed` and may be had another time.

        Raises:
            ValueError, OSError: anything that is wrong with its models, images or settings.
        """
        found = {"made_from": self.made_from(cell), "num_images": len(self.images(cell.parts.test))}
        if self.config.experiment == "transfer":
            return {**found, "rows": self._transfer(cell)}
        names = universal_vocabulary(_DRIFT_NAMES)
        drift = self._once(("drift", cell.pair), lambda: feature_drift(*map(self.encoder, cell.pair), names))
        return {**found, "rows": self._upgrade(cell), "drift": [asdict(row) for row in drift]}

    def _transfer(self, cell: Cell) -> dict[str, dict]:
        test, unlabelled = map(self.images, cell.scored)
        names, elsewhere, vocabulary = test.features["label"].names, cell.parts.elsewhere, self.config.vocabulary
        variants, tuned_strong, skipped = list(self.config.variants), None, {}
        for variant in filter(is_ceiling, self.config.variants):
            try:
                tuned_strong = self.asked(cell, cell.pair.strong, names)
            except ValueError as error:  # such as a prompt for a model that takes none: the other rows do not need it
                skipped[variant.name] = {"skipped": str(error)}
                variants.remove(variant)
        found = compare(
            *map(self.encoder, cell.pair),
            self.asked(cell, cell.pair.weak, names),
            test,
            unlabelled=unlabelled,
            labelled=None if elsewhere else self.few_shots(cell),
            general=self.general(),
            tuned_strong=tuned_strong,
            tuning={**cell.tuning.given(cell.parts.train.spec.name), "seed": cell.seed},
            class_names=names,
            seen_classes=base_names(names) if cell.parts.train.base_only else None,
            templates=cell.parts.test.spec.templates,
            variants=[_seeded(variant, cell.seed) for variant in variants],
            gradient=ExtractionConfig(solver="gradient", seed=cell.seed),
            vocabulary=sandbox.vocabulary() if vocabulary == "sandbox" else vocabulary and load_vocabulary(vocabulary),
            num_anchors=self.config.num_anchors or NUM_ANCHORS,
            **self.options,
        )
        return {row.name: skipped.get(row.name) or _row(found, row.name) for row in self.config.variants}

    def _upgrade(self, cell: Cell) -> dict[str, dict]:
        test, again, remark = self.images(cell.parts.test), None, {}
        if self.config.retrain:
            try:
                again = self.tuned(cell, cell.pair.strong)
            except ValueError as error:  # such as prompts in an image tower that takes none
                remark = {"remark": f"not re-trained: {error}"}
        seen = base_names(test.features["label"].names) if cell.parts.train.base_only else None
        options = {"retrained": again, "seen_classes": seen, **self.options}
        found = score_upgrade(self.tuned(cell, cell.pair.weak), *map(self.encoder, cell.pair), test, **options)
        skipped = {"skipped": found.refused} if found.refused else {}
        prompt = {"metrics": found.prompt, **skipped, **remark}
        return {ZERO_SHOT: {"metrics": found.zero_shot}, cell.tuning.name: prompt}


def _seeded(variant: Variant, seed: int) -> Variant:
    """Label tuning follows the seed of the cell, as the gradient solver does."""
    if variant.method != "label tuning":
        return variant
    return replace(variant, settings={"seed": seed, **variant.settings})


def _row(found: Comparison, name: str) -> dict:
    """One row of a comparison, as it is kept."""
    if name in found.skipped:
        return {"failed" if name in found.lost else "skipped": found.skipped[name]}
    row = found.rows[name]
    return {
        "metrics": {metric: score.value for metric, score in row.scores.items() if math.isfinite(score.value)},
        "needs": [need for need in NEEDS if need in row.needs],
    }
