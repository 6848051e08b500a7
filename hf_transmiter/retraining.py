"""[`SavedTuning`] and [`Retraining`]: how a saved adapter was tuned, and the same again on another model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset

from .attaching import attach
from .backbone import DualEncoder
from .files import new_folder
from .hub import read_json
from .image_sources import guess_columns
from .prompt_tuning import starting_templates, tune
from .settings import TuningConfig
from .transfers import TEACHER_FILE, TeacherFacts


_TUNING = ("accelerator", "progress", "cache_dir", "image_column", "label_column")  # of the options to embed with


@dataclass(frozen=True)
class SavedTuning:
    """What is known about a saved adapter before it is read: how it was tuned and on what.

    Args:
        source (`str`): folder or Hub id.
        method (`str`), seed (`int`): of the tuning.
        settings (`dict`): of its [`TuningConfig`]; empty if they were not saved.
        class_names (`list[str]`): what it was tuned on, in label order.
        templates (`list[str]`):
            Of the zero-shot class vectors it started from; where they were not saved, those a method starts from.
        fingerprint (`str` or `None`): of the model it was learnt on, if known.
    """

    source: str
    method: str
    seed: int
    settings: dict
    class_names: list[str]
    templates: list[str]
    fingerprint: str | None

    @classmethod
    def read(cls, source: str) -> SavedTuning:
        """From a folder or Hub repository.

        Raises:
            FileNotFoundError, OSError: nothing there.
            ValueError: a damaged file.
        """
        facts, config = TeacherFacts.read(source), read_json(source, "adapter_config.json") or {}
        # Saved by PEFT alone? `tune` leaves the settings in the prompt's own configuration, too.
        settings = (config.get("provenance") or {}).get("settings") or {} if facts is None else facts.settings
        method = settings.get("method") or str(config.get("peft_type") or Path(source).name).lower()
        seed = settings.get("seed", config.get("seed", 0))
        if facts is not None:
            return cls(source, method, seed, settings, facts.class_names, facts.zero_shot_templates, facts.fingerprint)
        return cls(
            source, method, seed, settings, config.get("class_names") or [], list(starting_templates(method)), None
        )

    @property
    def variant(self) -> dict:
        """All that makes a row of its own."""
        settings = {key: value for key, value in self.settings.items() if key not in ("method", "seed")}
        return {"method": self.method, **settings, "classes": self.class_names, "templates": self.templates}

    @property
    def config(self) -> TuningConfig:
        """The settings it was tuned with.

        Raises:
            ValueError: not saved, or saved by a version with other settings.
        """
        if not self.settings:
            raise ValueError(f"the settings of {self.source!r} were not saved with it.")
        try:
            return TuningConfig(**{**self.settings, "adapter": tuple(self.settings.get("adapter") or ())})
        except TypeError as error:
            raise ValueError(f"the settings of {self.source!r} are of another version: {error}.") from error


@dataclass(frozen=True)
class Retraining:
    """Trains on a model what was trained on another one, or finds it where an earlier call left it.

    Args:
        new ([`DualEncoder`]): the model to train on; stays untouched.
        train (`datasets.Dataset`): labelled images of (at least) the classes of the tunings.
        output_dir (`str`, `os.PathLike` or `None`): keeps adapters and interrupted trainings in `retrained/`.
        embedding (`dict`): options of [`embed_dataset`]; those that [`tune`] has as well are passed on.

    Raises:
        ValueError: the images have no labels.
    """

    new: DualEncoder
    train: Dataset
    output_dir: str | os.PathLike | None
    embedding: dict

    def __post_init__(self):
        columns = [self.embedding.get(key) for key in ("image_column", "label_column")]
        if guess_columns(self.train, *columns)[1] is None:
            raise ValueError("the images to train on have no labels: pass a dataset with a label column.")

    def __call__(self, saved: SavedTuning) -> DualEncoder:
        """The model with the adapter, trained with the settings, seed, classes and templates of the saved one.

        Raises:
            ValueError: settings that were not saved, classes without images, or what [`tune`] raises.
        """
        config, accelerator = saved.config, self.embedding.get("accelerator")
        folder = None if self.output_dir is None else Path(self.output_dir) / "retrained" / self._name(saved)
        if folder is not None and (folder / TEACHER_FILE).is_file():
            return attach(folder, self.new)
        options = {key: value for key, value in self.embedding.items() if key in _TUNING}
        if folder is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            options["checkpoint"] = folder.with_name(f".{folder.name}.checkpoint.safetensors")
        column = guess_columns(self.train, options.get("image_column"), options.get("label_column"))[1]
        images = _of_classes(self.train, column, saved.class_names)
        tuned = tune(self.new, images, saved.class_names, config, templates=saved.templates, **options)
        if folder is not None and (accelerator is None or accelerator.is_main_process):
            new_folder(folder, tuned.save_pretrained)
        return tuned.encoder

    def _name(self, saved: SavedTuning) -> str:
        """Says what it is, and by a digest all that it depends on."""
        facts = [saved.variant, saved.seed, self.new.fingerprint, self.train._fingerprint]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        return f"{saved.method}-seed-{saved.seed}-{digest}"


def _of_classes(images: Dataset, column: str, names: Sequence[str]) -> Dataset:
    """Only the images of these classes, labelled in the order of the names.

    Raises:
        ValueError: a name that is none of its classes.
    """
    feature = images.features[column]
    if not isinstance(feature, ClassLabel) or list(feature.names) == list(names):
        return images
    missing = [name for name in names if name not in feature.names]
    if missing:
        raise ValueError(f"the training images have no class {missing[0]!r}, which the adapter was tuned on.")
    new = {feature.names.index(name): label for label, name in enumerate(names)}
    rows = [row for row, label in enumerate(images[column][:]) if label in new]
    labels = [new[label] for label in images.select(rows)[column][:]]
    images = images.select(rows).remove_columns(column)
    return images.add_column(column, labels, feature=ClassLabel(names=list(names)))
