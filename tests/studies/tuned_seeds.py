"""Tuning with several seeds, and what the prompts are worth across an upgrade: one value per seed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from datasets import Dataset
from peft import PeftConfig

from hf_transmiter.data.images import guess_columns
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.upgrade import score_upgrade
from hf_transmiter.hub.adapter_files import TEACHER_FILE, TeacherFacts
from hf_transmiter.hub.files import replace_folder
from hf_transmiter.method.tune import adapter_settings, starting_templates, tune
from hf_transmiter.settings import TuningConfig


Metrics = dict[str, tuple[float, ...]]
"""Those of [`UpgradeScore`], one value per seed."""


def tune_seeds(
    old: DualEncoder,
    train: Dataset,
    seeds: Sequence[int],
    output_dir: str | os.PathLike,
    adapter: str | Mapping | PeftConfig = "lora",
    *,
    config: TuningConfig | None = None,
    **options,
) -> list[Path]:
    """Tunes with each seed and saves the adapters to `seed-0`, … in `output_dir`; those that are there are kept.

    Args:
        seeds (`Sequence[int]`): of the draw of examples and of the training.
        config (`TuningConfig`, *optional*): how to train; its seed does not count.
        **options: passed to [`tune`].

    Raises:
        ValueError: as [`tune`]; a folder that holds an adapter of another model, of other settings, classes or
            templates.
    """
    adapter, config = adapter_settings(adapter), config or TuningConfig()
    folders, templates = [], options.get("templates") or starting_templates(adapter["method"])
    column = guess_columns(train, options.get("image_column"), options.get("label_column"))[1]
    for seed in seeds:
        folder, seeded = Path(output_dir) / f"seed-{seed}", replace(config, seed=seed)
        folders.append(folder)
        if not (folder / TEACHER_FILE).is_file():
            replace_folder(folder, tune(old, train, adapter, config=seeded, **options).save_pretrained)
            continue
        settings = json.loads(json.dumps({**adapter, **asdict(seeded.of(adapter["method"]))}))
        kept, names = TeacherFacts.read(os.fspath(folder)), options.get("class_names") or train.features[column].names
        for what, found, wanted in (
            ("another model", kept.fingerprint, old.fingerprint),
            ("other settings", kept.settings, settings),
            ("other classes", kept.class_names, list(names)),
            ("other templates", kept.zero_shot_templates, list(templates)),
        ):
            if found != wanted:
                raise ValueError(f"{folder} holds an adapter of {what}: remove it, or choose another output_dir.")
    return folders


def score_seeds(
    adapters: Sequence[Path],
    old: DualEncoder,
    new: DualEncoder,
    dataset: Dataset,
    *,
    retrained: Sequence[Path] | None = None,
    **options,
) -> tuple[Metrics, Metrics, str | None]:
    """[`score_upgrade`] of each adapter: zero-shot (one value), the prompts, and why they were refused."""
    found = [
        score_upgrade(adapter, old, new, dataset, retrained=again, **options)
        for adapter, again in zip(adapters, retrained or [None] * len(adapters), strict=True)
    ]
    floor = {metric: (value,) for metric, value in found[0].zero_shot.items()}
    rows = {metric: tuple(one.prompt[metric] for one in found) for metric in found[0].prompt}
    return floor, rows, found[0].refused
