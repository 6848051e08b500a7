"""[`Workshop`]: makes the cells of a bench; models, images and tuned models are each loaded or made once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset

from .anchors import Anchors
from .backbone import DualEncoder
from .bench_config import BenchConfig, digest
from .bench_plan import TUNED, ZERO_SHOT, Cell, is_ceiling, needs_ceiling, needs_labelled, slug
from .catalog import load_encoder, load_images, load_teacher
from .classifier import AnchorClassifier
from .comparison import compare
from .compatibility import score_upgrade
from .dataset_specs import load_split
from .features import embed_dataset
from .files import new_folder
from .methods import Variant
from .prompt_tuning import PROMPTED, starting_templates, tune
from .protocols import Part, base_names, draw, harmonic_mean, only_base
from .settings import ExtractionConfig
from .transfers import TEACHER_FILE
from .vocabulary import NUM_ANCHORS, load_vocabulary


T = TypeVar("T")


class Alone:
    """What an accelerator says to a process that works by itself, although others were launched with it.

    Args:
        device (`torch.device`): where its models run.
    """

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device | str):
        self.device = device

    def wait_for_everyone(self) -> None:
        """There is nobody else."""


class Workshop:
    """Everything cells are made with. What cannot be loaded raises the same error whenever it is asked for.

    Args:
        config ([`BenchConfig`]): the bench.
        output_dir (`Path`): keeps tuned models in `tuned/`.
        models (`dict`, *optional*): `device` and `dtype`, see [`load_encoder`](hf_transmiter.catalog.load_encoder).
        embedding (`dict`, *optional*): `cache_dir` and `batch_size` of `embed_dataset`.
        progress (`bool`, *optional*, defaults to `True`): show bars.
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
        self.config, self.output_dir = config, output_dir
        self._models, self._embedding, self.progress = models or {}, embedding or {}, progress
        self._made: dict = {}

    @property
    def options(self) -> dict:
        """Of everything that embeds images, for this process alone."""
        alone = Alone(self._models.get("device") or "cpu")
        return {"accelerator": alone, "progress": self.progress, **self._embedding}

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
            if not part.base_only:
                return images
            if "label" not in images.features:
                raise ValueError(
                    f"the {part.role} images of {part.spec.name!r} have no labels, so that those of the base classes "
                    "cannot be told from the others."
                )
            return only_base(images)

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
        load = lambda: load_images(  # noqa: E731
            self.config.general, prefer=("unlabelled", "train"), max_images=self.config.max_images
        )
        return self._once("general", load)

    def made_from(self, cell: Cell) -> dict:
        """Fingerprints of the models and images of a cell. Raises what loading them raises."""
        models = {name: self.encoder(name).fingerprint for name in (cell.pair.weak, cell.pair.strong)}
        images = [self.few_shots(cell), *(self.images(part) for part in _scored(cell)), self.general()]
        return {"models": models, "images": [None if one is None else one._fingerprint for one in images]}

    def to_embed(self, cell: Cell) -> list[tuple[str, Dataset]]:
        """Models and images that a cell needs embedded, besides those of tuned image towers."""
        labelled, weak, strong = self.few_shots(cell), cell.pair.weak, cell.pair.strong
        found = [(weak, labelled)]
        if needs_ceiling(self.config) or (needs_labelled(self.config) and not cell.parts.elsewhere):
            found.append((strong, labelled))
        shared = [self.images(part) for part in _scored(cell)] + [self.general()]
        return found + [(model, images) for images in shared if images is not None for model in (weak, strong)]

    def embed(self, model: str, images: Dataset, accelerator) -> None:
        """Into the cache, by all processes together."""
        embed_dataset(self.encoder(model), images, accelerator=accelerator, progress=self.progress, **self._embedding)

    def tuned(self, cell: Cell, model: str) -> Path:
        """Folder of a model of the cell after tuning; tuned now, or from its checkpoint on, if it is not there."""
        encoder, train, config = self.encoder(model), self.images(cell.parts.train), cell.settings
        self.few_shots(cell)  # says what is wrong with them
        own = starting_templates(config.method)
        templates = own if config.method == "promptsrc" else cell.parts.train.spec.templates
        names = train.features["label"].names
        facts = [encoder.fingerprint, train._fingerprint, names, list(templates), asdict(config)]
        words = [cell.parts.train.spec.name, cell.tuning.name, f"{cell.shots}-shot", f"seed-{cell.seed}"]
        folder = self.output_dir / TUNED / "-".join([*map(slug, words), digest(facts)])
        if (folder / TEACHER_FILE).is_file():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = folder.with_name(f".{folder.name}.checkpoint.safetensors")
        options = {
            key: value for key, value in self.options.items() if key in ("accelerator", "progress", "cache_dir")
        }
        tuned = tune(encoder, train, config=config, templates=templates, checkpoint=checkpoint, **options)
        new_folder(folder, tuned.save_pretrained)
        return folder

    def asked(self, cell: Cell, model: str, names: Sequence[str]) -> AnchorClassifier:
        """A tuned model of the cell, read from its folder and asked about these names."""
        tuned = load_teacher(os.fspath(self.tuned(cell, model)), self.encoder(model))
        learnt = tuned.anchors.templates == PROMPTED
        templates = PROMPTED if learnt else cell.parts.test.spec.templates
        return AnchorClassifier(tuned.encoder, Anchors(tuple(names), (), templates))

    def make(self, cell: Cell, rows: Sequence[str]) -> dict:
        """Scores of the rows (by digest) of a cell, from what they were made, and which rows were lost to a lack of
        memory or the like, and may be had another time.

        Raises:
            ValueError, OSError: anything that is wrong with its models, images or settings.
        """
        work = self._upgrade if self.config.experiment == "upgrade" else self._transfer
        found = work(cell, rows)
        return {
            "made_from": json.loads(json.dumps(self.made_from(cell))),
            "num_images": len(self.images(cell.parts.test)),
            "rows": {key: row for key, row in found.items() if "failed" not in row},
            "lost": [row["failed"] for row in found.values() if "failed" in row],
        }

    def _transfer(self, cell: Cell, rows: Sequence[str]) -> dict[str, dict]:
        variants = {key: v for v in self.config.variants if (key := cell.rows[v.name]) in rows}
        test, unlabelled = (self.images(part) for part in _scored(cell))
        names, elsewhere = test.features["label"].names, cell.parts.elsewhere
        tuned_strong, skipped = None, {}
        for key in [key for key, variant in variants.items() if is_ceiling(variant)]:
            try:
                tuned_strong = self.asked(cell, cell.pair.strong, names)
            except ValueError as error:  # such as a prompt for a model that takes none: the other rows do not need it
                skipped[key] = {"skipped": str(error)}
                del variants[key]
        found = compare(
            self.encoder(cell.pair.weak),
            self.encoder(cell.pair.strong),
            self.asked(cell, cell.pair.weak, names),
            test,
            unlabelled=unlabelled,
            labelled=None if elsewhere else self.few_shots(cell),
            general=self.general(),
            tuned_strong=tuned_strong,
            class_names=names,
            seen_classes=base_names(names) if cell.parts.train.base_only else None,
            templates=cell.parts.test.spec.templates,
            variants=[_seeded(variant, cell.seed) for variant in variants.values()],
            gradient=ExtractionConfig(solver="gradient", seed=cell.seed),
            **self._names(names, cell.parts.test.spec.templates),
            **self.options,
        )
        return skipped | {key: _row(found, variant.name) for key, variant in variants.items()}

    def _names(self, names: Sequence[str], templates: Sequence[str]) -> dict:
        """Arguments of `compare` about auxiliary names."""
        if self.config.vocabulary is None and self.config.num_anchors is None:
            return {}
        found, options = {}, {"templates": templates}
        if self.config.vocabulary is not None:
            options["vocabulary"] = found["vocabulary"] = self._once("vocabulary", self._vocabulary)
            found["text_anchors"] = Anchors((), tuple(options["vocabulary"]), tuple(templates))
        at_most = len(Anchors.build(names, strategy="all", **options))
        found["anchors"] = Anchors.build(
            names, num_anchors=min(self.config.num_anchors or NUM_ANCHORS, at_most), **options
        )
        return found

    def _vocabulary(self) -> list[str]:
        if self.config.vocabulary == "sandbox":
            from . import sandbox  # the synthetic world is not needed for real pictures

            return list(sandbox.vocabulary())
        return load_vocabulary(self.config.vocabulary)

    def _upgrade(self, cell: Cell, rows: Sequence[str]) -> dict[str, dict]:
        test, names = self.images(cell.parts.test), self.images(cell.parts.test).features["label"].names
        folders = [self.tuned(cell, cell.pair.weak)]
        zero_shot, prompt = score_upgrade(
            folders,
            self.encoder(cell.pair.weak),
            self.encoder(cell.pair.strong),
            test,
            train=self.images(cell.parts.train) if self.config.retrain else None,
            seen_classes=base_names(names) if cell.parts.train.base_only else None,
            output_dir=self.output_dir if self.config.retrain else None,
            **self.options,
        )
        found = {ZERO_SHOT: _upgraded(zero_shot), cell.rows[cell.tuning.name]: _upgraded(prompt)}
        return {key: row for key, row in found.items() if key in rows}


def _scored(cell: Cell) -> list[Part]:
    """What both models are shown, the test images first."""
    return [cell.parts.test] + [cell.parts.unlabelled] * (cell.config.experiment == "transfer")


def _seeded(variant: Variant, seed: int) -> Variant:
    """Label tuning follows the seed of the cell, as the gradient solver does."""
    if variant.method != "label tuning":
        return variant
    return replace(variant, settings={"seed": seed, **variant.settings})


def _row(found, name: str) -> dict:
    """One row of a [`Comparison`], as it is kept."""
    if not isinstance(found.failed.get(name, ValueError()), ValueError):
        return {"failed": f"{name}: {found.skipped[name]}"}
    if name in found.skipped:
        return {"skipped": found.skipped[name]}
    own = [score for score in found.scores if score.method == name]
    return {
        "metrics": {score.metric: score.value for score in own if math.isfinite(score.value)},
        "seconds": own[0].seconds,
        "peak_mb": own[0].peak_mb,
        "bytes": found.sizes.get(name),
        "needs": asdict(found.needs[name]),
    }


def _upgraded(row) -> dict:
    """One row of [`score_upgrade`], of a single seed."""
    models = {model: values for model in ("old", "upgraded", "retrained") if (values := getattr(row, model))}
    metrics = {model: values[0] for model, values in models.items()}
    if {"old", "upgraded"} <= set(metrics):
        metrics["h"] = harmonic_mean(metrics["old"], metrics["upgraded"])
    for model, halves in row.halves.items():
        metrics |= {f"{model} {half}": values[0] for half, values in halves.items()}
    said = {"skipped": row.refused, "remark": row.remark}
    return {"metrics": metrics, **{key: text for key, text in said.items() if text}}
