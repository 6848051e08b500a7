"""[`score_upgrade`]: what saved prompts are worth before and after an upgrade of the base model they were learnt on.

Old and upgraded are models, base and novel are classes; the two pairs are never mixed. On either model a row has the
accuracy a prompt gives there, unchanged; the ceiling is the same method trained again on the upgraded model, the
floor its zero-shot accuracy. Source of the protocol: ContCoOp (arXiv 2412.20895), which sums a method up by the
harmonic mean of the two accuracies.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from huggingface_hub.utils import tqdm
from torch import Tensor

from .anchors import PROMPTED, Anchors
from .attaching import Incompatible, attach, map_fit, read_config, token_map, why_not_mapped
from .backbone import DualEncoder
from .classifier import AnchorClassifier
from .evaluation import align_labels, score_logits
from .features import embed_dataset
from .retraining import Retraining, SavedTuning
from .scores import Score, markdown_table
from .teachers import same_image_tower
from .tuners.prompts import PromptConfig


logger = logging.getLogger(__name__)

_ROWS = 4096  # images per block of logits
MODELS = {"old": "old model", "upgraded": "upgraded model", "retrained": "re-trained"}
ZERO_SHOT = "zero-shot"
METRICS = ("accuracy", "base", "novel", "hm")


@dataclass(frozen=True)
class UpgradeScore:
    """One row of [`upgrade_table`]: a method with its settings, or zero-shot. Accuracies in percent, one per seed.

    Args:
        method (`str`): name, with the settings that set it apart from other rows.
        seeds (`tuple[int]`): of the tunings; empty for zero-shot.
        old (`tuple[float]` or `None`): accuracy over all classes on the model the prompts were learnt on.
        upgraded (`tuple[float]` or `None`): on the upgraded model, unchanged; `None` where that was refused.
        retrained (`tuple[float]` or `None`): learnt anew on the upgraded model, with the same settings and seeds.
        harmonic (`tuple[float]` or `None`): ``H = 2ab / (a + b)`` of old and upgraded.
        halves (`dict`):
            By model (`"old"`, `"upgraded"`, `"retrained"`): accuracies among the `"base"` classes, among the `"novel"`
            ones, and their harmonic mean `"hm"`; empty without seen classes.
        refused (`str`, *optional*): why the upgraded model does not take the prompts.
        remark (`str`, *optional*): anything else there is to know.
        adapters (`tuple[str]`): where they were saved, in the order of the seeds.
    """

    method: str
    seeds: tuple[int, ...]
    old: tuple[float, ...] | None
    upgraded: tuple[float, ...] | None
    retrained: tuple[float, ...] | None = None
    harmonic: tuple[float, ...] | None = None
    halves: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    refused: str | None = None
    remark: str | None = None
    adapters: tuple[str, ...] = ()


def score_upgrade(
    adapters: Sequence[str | os.PathLike],
    old: DualEncoder,
    new: DualEncoder,
    dataset: Dataset,
    *,
    train: Dataset | None = None,
    class_names: Sequence[str] | None = None,
    seen_classes: Sequence[str] | None = None,
    mapped: bool = False,
    output_dir: str | os.PathLike | None = None,
    accelerator=None,
    progress: bool = True,
    **embedding,
) -> list[UpgradeScore]:
    """Scores saved prompts on the model they were learnt on, on its upgrade, and re-trained there.

    Adapters of one method and settings but different seeds make one row. What the upgraded model cannot take stays a
    row, with the reason. Images are embedded once per image tower.

    Args:
        adapters (`Sequence`): folders of `hf-transmiter tune` (or what `tune(...).save_pretrained` wrote), or Hub ids.
        old ([`DualEncoder`]): the model they were learnt on.
        new ([`DualEncoder`]): its upgrade.
        dataset (`datasets.Dataset`): labelled test images.
        train (`datasets.Dataset`, *optional*):
            The labelled images the tunings drew from: train every adapter anew on the upgraded model, with the
            settings and the seed saved with it. The slow part.
        class_names (`Sequence[str]`, *optional*): C names in label order; those of the label column when omitted.
        seen_classes (`Sequence[str]`, *optional*):
            The base classes, which the tunings saw: adds accuracies among them and among the others (novel), two
            separate problems, and their harmonic mean.
        mapped (`bool`, *optional*, defaults to `False`):
            Add rows "..., mapped" for contexts of CoOp and KgCoOp that went through [`token_map`].
        output_dir (`str` or `os.PathLike`, *optional*):
            Keeps what was trained anew in `retrained/`, each adapter written in one step; a later call finds them
            there, and goes on with the training that was interrupted.
        accelerator (`accelerate.Accelerator`, *optional*): for several processes.
        progress (`bool`, *optional*, defaults to `True`): show bars.
        **embedding: passed to [`embed_dataset`]; columns and `cache_dir` serve the training, too.

    Returns:
        `list[UpgradeScore]`: zero-shot with the templates the tunings started from, then a row per method.

    Raises:
        ValueError: no adapters, two of the same settings and seed, one of another old model, no class names, seen
            classes that leave no base or no novel image; other tokens, where a map was asked for.
        FileNotFoundError, OSError: an adapter that is not there.
    """
    saved = [SavedTuning.read(os.fspath(adapter)) for adapter in adapters]
    _check(saved, old, new)
    embedding = {"accelerator": accelerator, "progress": progress, **embedding}
    exam = _Exam(old, dataset, class_names, seen_classes, embedding)
    mapping = token_map(old, new) if mapped else None
    retrain = None if train is None else Retraining(new, train, output_dir, embedding)
    found, fit = [], None if mapping is None else map_fit(old, new, mapping)
    for one in saved:
        if seen_classes is not None and set(one.class_names) != set(seen_classes):
            logger.warning("%s was tuned on other classes than the seen ones: base and novel mislead.", one.source)
    for one in tqdm(saved, desc="Scoring adapters", disable=not progress, name="hf_transmiter.compatibility"):
        found += _score(one, old, new, exam, retrain, mapping)
    return _zero_shot(saved, old, new, exam) + _rows(found, fit)


def upgrade_table(rows: Sequence[UpgradeScore]) -> str:
    """A markdown table of the rows, mean ± standard deviation over seeds; reasons and remarks are its footnotes."""
    scores, notes = [], {}
    for row in rows:
        cells = [
            (title, metric, values)
            for model, title in MODELS.items()
            for metric, values in {"accuracy": getattr(row, model), **row.halves.get(model, {})}.items()
            if values is not None or model != "retrained"
        ]
        cells.insert(sum(title != MODELS["retrained"] for title, *_ in cells), ("H", "(old, upgraded)", row.harmonic))
        for title, metric, values in cells:
            value = math.nan if values is None else statistics.fmean(values)
            std = statistics.stdev(values) if values is not None and len(values) > 1 else 0.0
            scores.append(Score(row.method, title, metric, value, std, seeds=max(len(values or ()), 1)))
        said = [f"refused: {row.refused}"] if row.refused else []
        said += [row.remark] if row.remark else []
        if said:
            notes[row.method] = "; ".join(said)
    return markdown_table(scores, notes=notes)


@dataclass(frozen=True)
class _Result:
    """Accuracies of one adapter by model and metric."""

    saved: SavedTuning
    scores: dict[str, dict[str, float]]
    refused: str | None = None
    remark: str | None = None
    mapped: bool = False


def _check(saved: list[SavedTuning], old: DualEncoder, new: DualEncoder) -> None:
    if not saved:
        raise ValueError("there is no adapter to score.")
    for encoder in (old, new):
        if getattr(encoder.model, "peft_config", None):
            raise ValueError(f"{encoder.name_or_path!r} has adapters already: pass the model without them.")
    seen = {}
    for one in saved:
        if one.fingerprint not in (None, old.fingerprint):
            raise ValueError(f"{one.source!r} was not tuned from {old.name_or_path!r}: pass its model as the old one.")
        other = seen.setdefault(json.dumps([one.variant, one.seed], sort_keys=True), one.source)
        if other != one.source or sum(one.source == twin.source for twin in saved) > 1:
            raise ValueError(
                f"{other!r} and {one.source!r} have the same settings and the same seed: pass one of them."
            )


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

    def score(self, encoder: DualEncoder, model: DualEncoder, templates: Sequence[str] = PROMPTED) -> dict[str, float]:
        """Accuracies of `encoder`, which is `model` with or without an adapter in it."""
        tower = model if same_image_tower(model, encoder) else encoder
        table = embed_dataset(tower, self.dataset, **self.embedding)
        classifier = AnchorClassifier(encoder, Anchors(self.names, (), tuple(templates)))
        with torch.no_grad():
            logits = torch.cat([classifier.classify(x.to(encoder.device)).cpu() for x in table.batches(_ROWS)])
        found = score_logits(logits, self.labels, self.base)
        return {metric: found[metric] for metric in METRICS if metric in found}

    def check(self, source: str, config: PromptConfig) -> None:
        """Class-specific contexts have no answer to other names."""
        unknown = [name for name in self.names if name not in (config.class_names or ())]
        if getattr(config, "class_specific", False) and unknown:
            known = f"{len(config.class_names)} classes they were learnt for"
            raise Incompatible(source, f"class-specific contexts know only the {known}, not {unknown[0]!r}")


def _score(
    saved: SavedTuning,
    old: DualEncoder,
    new: DualEncoder,
    exam: _Exam,
    retrain: Retraining | None,
    mapping: Tensor | None,
) -> list[_Result]:
    """One adapter on both models, as it is and, where there is a map, mapped."""
    scores, remark = {}, None
    try:
        config = read_config(saved.source)
        exam.check(saved.source, config)
        scores["old"] = exam.score(attach(saved.source, old), old)
    except Incompatible as error:
        return [_Result(saved, {}, error.reason)]
    if retrain is not None:
        try:
            again = retrain(saved)
        except ValueError as error:
            remark = f"not re-trained: {error}"
            logger.warning("%s: %s", saved.source, remark)
        else:
            scores["retrained"] = exam.score(again, new)

    def moved(**options) -> _Result:
        try:
            upgraded = exam.score(attach(saved.source, new, **options), new)
        except Incompatible as error:
            return _Result(saved, scores, error.reason, remark, bool(options))
        return _Result(saved, {**scores, "upgraded": upgraded}, None, remark, bool(options))

    results = [moved()]
    if mapping is not None and why_not_mapped(config) is None:
        results.append(moved(token_map=mapping))
    return results


def _zero_shot(saved: list[SavedTuning], old: DualEncoder, new: DualEncoder, exam: _Exam) -> list[UpgradeScore]:
    """The floors: one row for each set of templates that tunings started from."""
    several, rows = list(dict.fromkeys(tuple(one.templates) for one in saved)), []
    for templates in several:
        shown = templates[0] if len(templates) == 1 else f"{len(templates)} templates"
        name = ZERO_SHOT if len(several) == 1 else f"{ZERO_SHOT}, {shown}"
        scores = {"old": exam.score(old, old, templates), "upgraded": exam.score(new, new, templates)}
        rows.append(_row(name, [scores]))
    return rows


def _rows(results: list[_Result], fit: float | None) -> list[UpgradeScore]:
    """Results that differ in nothing but the seed are one row."""
    groups: dict[str, list[_Result]] = {}
    for one in results:
        key = json.dumps([one.saved.variant, one.mapped, one.refused, one.remark], sort_keys=True)
        groups.setdefault(key, []).append(one)
    rows, variants = [], [one.saved.variant for one in results]
    for group in groups.values():
        group.sort(key=lambda one: one.saved.seed)
        first, seeds = group[0], tuple(one.saved.seed for one in group)
        name = _name(first.saved.variant, variants) + (", mapped" if first.mapped else "")
        if name in [row.method for row in rows]:  # other seeds fared otherwise
            name += f", seed {', '.join(map(str, seeds))}"
        said = [f"context mapped between the token tables, R² = {fit:.2f}"] if first.mapped else []
        said += [first.remark] if first.remark else []
        row = _row(name, [one.scores for one in group])
        sources = tuple(one.saved.source for one in group)
        facts = {"seeds": seeds, "refused": first.refused, "remark": "; ".join(said) or None, "adapters": sources}
        rows.append(dataclasses.replace(row, **facts))
    return rows


def _row(name: str, runs: list[dict[str, dict[str, float]]]) -> UpgradeScore:
    columns = {
        model: {metric: tuple(run[model][metric] for run in runs) for metric in runs[0][model]} for model in runs[0]
    }
    halves = {
        model: {metric: values for metric, values in found.items() if metric != "accuracy"}
        for model, found in columns.items()
    }
    old, upgraded, retrained = (columns.get(model, {}).get("accuracy") for model in MODELS)
    both = None if old is None or upgraded is None else tuple(map(_harmonic, old, upgraded))
    return UpgradeScore(
        name, (), old, upgraded, retrained, both, {model: half for model, half in halves.items() if half}
    )


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


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
