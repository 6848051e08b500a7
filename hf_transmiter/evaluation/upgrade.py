"""[`score_upgrade`]: what saved prompts are worth before and after an upgrade of the base model they were learnt on.

Old and upgraded are models, base and novel are classes; the two pairs are never mixed. On either model a row has the
accuracy a prompt gives there, unchanged; the ceiling is the same method trained again on the upgraded model, the
floor its zero-shot accuracy. Source of the protocol: ContCoOp (arXiv 2412.20895), which sums a method up by the
harmonic mean of the two accuracies.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub.utils import tqdm
from peft import PeftConfig

from ..data.anchors import PROMPTED, Anchors
from ..data.embeddings import embed_dataset
from ..data.images import guess_columns
from ..encoders.dual_encoder import DualEncoder
from ..hub.adapter_files import TEACHER_FILE, TeacherFacts
from ..hub.files import new_folder
from ..hub.scores import Score, markdown_table
from ..method.attach import Incompatible, attach, read_config
from ..method.classifier import AnchorClassifier
from ..method.teacher import same_image_tower
from ..method.tune import adapter_settings, starting_templates, tune
from ..settings import TuningConfig, split_tuning
from .evaluate import align_labels, harmonic_mean, score_logits


logger = logging.getLogger(__name__)

_ROWS = 4096  # images per block of logits
MODELS = {"old": "old model", "upgraded": "upgraded model", "retrained": "re-trained"}
ZERO_SHOT = "zero-shot"
METRICS = ("accuracy", "base", "novel", "hm")


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
        old, train, adapter, **options: as in [`tune`].
        seeds (`Sequence[int]`): of the draw of examples and of the training.
        config (`TuningConfig`, *optional*): how; its seed does not count.

    Returns:
        `list[Path]`: the folders, in the order of the seeds.

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
            tuned, accelerator = tune(old, train, adapter, config=seeded, **options), options.get("accelerator")
            if accelerator is None or accelerator.is_main_process:
                new_folder(folder, tuned.save_pretrained)
            if accelerator is not None:
                accelerator.wait_for_everyone()
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


def tuning_of(source: str) -> dict:
    """The settings that a saved model (folder or Hub id) was tuned with, which [`split_tuning`] turns into arguments
    of [`tune`].

    Raises:
        FileNotFoundError, OSError: nothing there.
        ValueError: the settings were not saved with it, or by a version with other ones.
    """
    facts = TeacherFacts.read(source)
    if facts is None:
        raise ValueError(f"the settings of {source!r} were not saved with it: there is no {TEACHER_FILE}.")
    try:
        adapter_settings(split_tuning(facts.settings)["adapter"])
    except ValueError as error:
        raise ValueError(f"the settings of {source!r} are of another version: {error}") from error
    return facts.settings


@dataclass(frozen=True)
class UpgradeScore:
    """One row of [`upgrade_table`]: a method with its settings, or zero-shot.

    Args:
        method (`str`): name, with the settings that set it apart from other rows.
        seeds (`tuple[int]`): of the tunings; empty for zero-shot.
        scores (`dict`):
            By model (`"old"`; `"upgraded"`, prompts unchanged; `"retrained"`, the upgraded model with prompts learnt
            anew) and metric, in percent, one per seed: `"accuracy"` over all classes and, with seen classes, among the
            `"base"` ones, among the `"novel"` ones, and the harmonic mean of these two, `"hm"`.
        refused (`str`, *optional*): why the upgraded model does not take the prompts.
    """

    method: str
    seeds: tuple[int, ...]
    scores: dict[str, dict[str, tuple[float, ...]]]
    refused: str | None = None

    @property
    def old(self) -> tuple[float, ...] | None:
        """Accuracies on the model the prompts were learnt on; `None` where it does not take them."""
        return self.scores.get("old", {}).get("accuracy")

    @property
    def upgraded(self) -> tuple[float, ...] | None:
        """Accuracies on the upgraded model; `None` where that was refused."""
        return self.scores.get("upgraded", {}).get("accuracy")

    @property
    def retrained(self) -> tuple[float, ...] | None:
        """Accuracies after learning anew on the upgraded model; `None` where that was not done."""
        return self.scores.get("retrained", {}).get("accuracy")

    @property
    def harmonic(self) -> tuple[float, ...] | None:
        """``H = 2ab / (a + b)`` of old and upgraded."""
        if self.old is None or self.upgraded is None:
            return None
        return tuple(map(harmonic_mean, self.old, self.upgraded))


def score_upgrade(
    adapters: Sequence[str | os.PathLike],
    old: DualEncoder,
    new: DualEncoder,
    dataset: Dataset,
    *,
    retrained: Sequence[str | os.PathLike] | None = None,
    class_names: Sequence[str] | None = None,
    seen_classes: Sequence[str] | None = None,
    accelerator=None,
    progress: bool = True,
    **embedding,
) -> list[UpgradeScore]:
    """Scores saved prompts on the model they were learnt on, on its upgrade, and re-trained there.

    Adapters of one method and settings but different seeds make one row. What the upgraded model cannot take stays a
    row, with the reason. Images are embedded once per image tower.

    Args:
        adapters (`Sequence`): folders that [`tune_seeds`] or `tune(...).save_pretrained` wrote, or Hub ids.
        old, new ([`DualEncoder`]): the model they were learnt on, and its upgrade.
        dataset (`datasets.Dataset`): labelled test images.
        retrained (`Sequence`, *optional*):
            For every adapter, in the same order, one that was tuned alike on the upgraded model: the ceiling.
        class_names (`Sequence[str]`, *optional*): C names in label order; those of the label column when omitted.
        seen_classes (`Sequence[str]`, *optional*):
            The base classes, which the tunings saw: adds accuracies among them and among the others (novel), two
            separate problems, and their harmonic mean.
        **embedding: passed to [`embed_dataset`].

    Returns:
        `list[UpgradeScore]`: zero-shot with the templates the tunings started from, then a row per method.

    Raises:
        ValueError: no adapters, two of the same settings and seed, one that was not tuned from the model it should be,
            another number of re-trained ones, no class names, seen classes that leave no base or no novel image.
        FileNotFoundError, OSError: an adapter that is not there.
    """
    saved, again = ([_Saved.read(os.fspath(one)) for one in sources] for sources in (adapters, retrained or ()))
    _check(saved, again, old, new)
    embedding = {"accelerator": accelerator, "progress": progress, **embedding}
    exam = _Exam(old, dataset, class_names, seen_classes, embedding)
    groups: dict[str, list[tuple[_Saved, dict]]] = {}
    bar = tqdm(saved, desc="Scoring adapters", disable=not progress or None, name="hf_transmiter.evaluation.upgrade")
    for one, twin in zip_longest(bar, again):
        if seen_classes is not None and set(one.facts.class_names) != set(seen_classes):
            logger.warning("%s was tuned on other classes than the seen ones: base and novel mislead.", one.source)
        scores, refused = {}, None
        try:
            for model, source, encoder in (("old", one, old), ("retrained", twin, new), ("upgraded", one, new)):
                if source is not None:
                    scores[model] = exam.attached(source.source, encoder)
        except Incompatible as error:
            refused = error.reason
        groups.setdefault(json.dumps([one.variant, refused], sort_keys=True), []).append((one, scores))
    return _floors(saved, old, new, exam) + _rows(groups)


def upgrade_table(rows: Sequence[UpgradeScore]) -> str:
    """A markdown table of the rows, mean ± standard deviation over seeds; reasons are its footnotes."""
    scores, notes = [], {}
    for row in rows:
        by_model = {"old": {"accuracy": None}, "upgraded": {"accuracy": None}, **row.scores}
        cells = [(MODELS[model], *cell) for model in ("old", "upgraded") for cell in by_model[model].items()]
        cells.append(("H", "(old, upgraded)", row.harmonic))
        cells += [(MODELS["retrained"], *cell) for cell in by_model.get("retrained", {}).items()]
        for title, metric, values in cells:
            value = math.nan if values is None else statistics.fmean(values)
            std = statistics.stdev(values) if values is not None and len(values) > 1 else 0.0
            scores.append(Score(row.method, title, metric, value, std, seeds=max(len(values or ()), 1)))
        if row.refused:
            notes[row.method] = f"refused: {row.refused}"
    return markdown_table(scores, notes=notes)


@dataclass(frozen=True)
class _Saved:
    """An adapter before it is read: where it is, and how it was tuned."""

    source: str
    facts: TeacherFacts

    @classmethod
    def read(cls, source: str) -> _Saved:
        facts = TeacherFacts.read(source)
        if facts is None:
            raise ValueError(f"{source!r} holds no {TEACHER_FILE}: pass what `tune` or `tuned.save_pretrained` wrote.")
        return cls(source, facts)

    @property
    def seed(self) -> int:
        return self.facts.settings["seed"]

    @property
    def variant(self) -> dict:
        """All that makes a row of its own."""
        settings = {key: value for key, value in self.facts.settings.items() if key != "seed"}
        return {**settings, "classes": self.facts.class_names, "templates": self.facts.zero_shot_templates}


def _check(saved: list[_Saved], again: list[_Saved], old: DualEncoder, new: DualEncoder) -> None:
    if not saved:
        raise ValueError("there is no adapter to score.")
    if again and len(again) != len(saved):
        raise ValueError(f"there are {len(saved)} adapters and {len(again)} re-trained ones: pass one for each.")
    for encoder in (old, new):
        if getattr(encoder.model, "peft_config", None):
            raise ValueError(f"{encoder.name_or_path!r} has adapters already: pass the model without them.")
    for one, encoder, role in [*((one, old, "old") for one in saved), *((one, new, "new") for one in again)]:
        if one.facts.fingerprint != encoder.fingerprint:
            name = encoder.name_or_path
            raise ValueError(f"{one.source!r} was not tuned from {name!r}: pass its model as the {role} one.")
    seen = {}
    for one in saved:
        key = json.dumps([one.variant, one.seed], sort_keys=True)
        if key in seen:
            raise ValueError(
                f"{seen[key]!r} and {one.source!r} have the same settings and the same seed: pass one of them."
            )
        seen[key] = one.source


class _Exam:
    """The test: images, embedded once per image tower, and the classes they are sorted into."""

    def __init__(self, old: DualEncoder, dataset: Dataset, names, seen, embedding: dict):
        self.dataset, self.embedding = dataset, embedding
        table = embed_dataset(old, dataset, **embedding)
        names = names or table.class_names
        if not names:
            raise ValueError("the dataset does not name its classes: pass class_names in label order.")
        self.names, self.labels, self.base = tuple(names), align_labels(table, names), None
        if seen is None:
            return
        unknown = [name for name in seen if name not in self.names]
        if unknown:
            raise ValueError(f"the seen class {unknown[0]!r} is not among the {len(self.names)} class names.")
        self.base = [self.names.index(name) for name in seen]
        is_base = torch.isin(self.labels, torch.tensor(self.base, dtype=torch.long))
        if is_base.all() or not is_base.any():
            raise ValueError("the test images must show base classes (seen) and novel ones; all are of one kind.")

    def accuracies(
        self, encoder: DualEncoder, model: DualEncoder, templates: Sequence[str] = PROMPTED
    ) -> dict[str, float]:
        """By metric, of `encoder`, which is `model` with or without an adapter in it."""
        tower = model if same_image_tower(model, encoder) else encoder
        table = embed_dataset(tower, self.dataset, **self.embedding)
        classifier = AnchorClassifier(encoder, Anchors(self.names, (), tuple(templates)))
        with torch.no_grad():
            logits = torch.cat([classifier.classify(x.to(encoder.device)).cpu() for x in table.batches(_ROWS)])
        found = score_logits(logits, self.labels, self.base)
        return {metric: found[metric] for metric in METRICS if metric in found}

    def attached(self, source: str, model: DualEncoder) -> dict[str, float]:
        """Accuracies of a saved adapter on a model.

        Raises:
            Incompatible: it does not fit, or it was learnt for classes of its own and is asked about others.
        """
        config = read_config(source)
        unknown = [name for name in self.names if name not in (config.class_names or ())]
        if getattr(config, "class_specific", False) and unknown:
            known = f"{len(config.class_names)} classes they were learnt for"
            raise Incompatible(source, f"class-specific contexts know only the {known}, not {unknown[0]!r}")
        return self.accuracies(attach(source, model), model)


def _floors(saved: list[_Saved], old: DualEncoder, new: DualEncoder, exam: _Exam) -> list[UpgradeScore]:
    """Zero-shot: one row for each set of templates that tunings started from."""
    several, rows = list(dict.fromkeys(tuple(one.facts.zero_shot_templates) for one in saved)), []
    for templates in several:
        shown = templates[0] if len(templates) == 1 else f"{len(templates)} templates"
        name = ZERO_SHOT if len(several) == 1 else f"{ZERO_SHOT}, {shown}"
        models = {"old": old, "upgraded": new}
        rows.append(_row(name, (), [{key: exam.accuracies(one, one, templates) for key, one in models.items()}]))
    return rows


def _rows(groups: Mapping[str, list[tuple[_Saved, dict]]]) -> list[UpgradeScore]:
    """Adapters that differ in nothing but the seed are one row."""
    rows, variants = [], [group[0][0].variant for group in groups.values()]
    for (key, group), variant in zip(groups.items(), variants, strict=True):
        group.sort(key=lambda one: one[0].seed)
        seeds, name = tuple(one.seed for one, _ in group), _name(variant, variants)
        if name in [row.method for row in rows]:  # other seeds fared otherwise
            name += f", seed {', '.join(map(str, seeds))}"
        rows.append(replace(_row(name, seeds, [scores for _, scores in group]), refused=json.loads(key)[1]))
    return rows


def _row(name: str, seeds: tuple[int, ...], runs: list[dict[str, dict[str, float]]]) -> UpgradeScore:
    models = [model for model in MODELS if model in runs[0]]
    scores = {model: {m: tuple(run[model][m] for run in runs) for m in runs[0][model]} for model in models}
    return UpgradeScore(name, seeds, scores)


def _name(variant: dict, variants: list[dict]) -> str:
    """The method, and what sets this variant of it apart from the others."""
    same = [other for other in variants if other["method"] == variant["method"]]
    apart = {key: value for key, value in variant.items() if any(other.get(key) != value for other in same)}
    words = [variant["method"]]
    for key, value in apart.items():
        if key == "adapter":
            words += value
        else:
            words.append(f"{len(value)} {key}" if key in ("classes", "templates") else f"{key}={value}")
    return ", ".join(words)
