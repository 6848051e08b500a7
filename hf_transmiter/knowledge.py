"""[`analyse`]: what an adapter changes, the analysis of the extracted knowledge of arXiv 2508.08604 on any images.

A classifier with its adapter is held against its own zero-shot (same model, adapter off): which classes it prefers
now, which predictions are corrected and broken, which confusions came and went, and which auxiliary names lie where
each class moved to. Without labels: what changed, not whether it is right.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .classifier import AnchorClassifier
from .evaluation import align_labels
from .features import FeatureTable, embed_dataset
from .hub import public_name
from .neighbours import auxiliary_effects, directions, nearest
from .reliability import expected_calibration_error, fit_temperature
from .teachers import Teacher, teacher_logits
from .vocabulary import load_vocabulary, name_key, universal_vocabulary


BEFORE, AFTER, TUNED = "zero-shot", "with the adapter", "tuned model"
COSINE, EFFECT = "cosine", "effect"
_TENSORS = ("logits", "labels")
_BLOCK = 4096  # images at a time


@dataclass(frozen=True)
class ClassChange:
    """What the adapter does to one class.

    Args:
        name (`str`): of the class.
        logit_shift (`float`): mean over the images of the change of its logit minus the mean change of all classes.
        probability_shift (`float`): change of its mean probability, in percentage points.
        share_before, share_after (`float`): percent of the images that are predicted as this class.
        images (`int`, *optional*): that have this label; with labels only, as the next two.
        accuracy_before, accuracy_after (`float`, *optional*): percent of them predicted right; `None` without any.
        towards, away (`tuple[tuple[str, float], ...]`):
            Auxiliary names with the highest and lowest value of [`Knowledge.measure`], the farthest from 0 first.
    """

    name: str
    logit_shift: float
    probability_shift: float
    share_before: float
    share_after: float
    images: int | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    towards: tuple[tuple[str, float], ...] = ()
    away: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Confusion:
    """Images of class `source` that are predicted as `target`: how many `before` and `after`."""

    source: str
    target: str
    before: int
    after: int


@dataclass(frozen=True)
class Confidence:
    """How sure a model is and how right; all in percent.

    Args:
        name (`str`): one of [`Knowledge.logits`], or that at the fitted temperature.
        confidence (`float`): mean over the images of the largest probability.
        accuracy (`float`, *optional*), calibration_error (`float`, *optional*): with labels, see `reliability`.
    """

    name: str
    confidence: float
    accuracy: float | None = None
    calibration_error: float | None = None


@dataclass
class Knowledge:
    """What [`analyse`] found. Before: zero-shot; after: with the adapter.

    Args:
        model (`str` or `None`), form (`str`): the model under the adapter (a folder without its path), and its form.
        num_images (`int`): N.
        classes (`list[ClassChange]`): in the order of the columns.
        changed (`int`): images that are predicted otherwise.
        corrected, broken (`int` or `None`): changed images that were wrong and are right, and the reverse.
        moves (`list[tuple[str, str, int]]`): prediction before, after, and how many images; the most images first.
        confusions (`list[Confusion]`): of a label with another prediction, those whose count changed most first.
        confidence (`list[Confidence]`): before, after, after at the temperature, and the tuned model.
        temperature (`float` or `None`): by which to divide the logits, fitted without labels.
        temperature_note (`str`): what it was fitted to, or why there is none.
        agreement (`float` or `None`): percent of the images on which the tuned model predicts the same as after.
        measure (`str`):
            What the values of `towards` and `away` are. `"cosine"`, for class vectors: of the direction in which a
            class vector moved with the name's text embedding, see `neighbours.directions`. `"effect"`, for the
            published form: how far the class rises when the name's logit does, see `neighbours.auxiliary_effects`.
        logits (`dict[str, Tensor]`): (N, C) by [`BEFORE`], [`AFTER`] and, if there was one, [`TUNED`].
        labels (`Tensor` or `None`): (N,).
    """

    model: str | None
    form: str | None
    num_images: int
    classes: list[ClassChange]
    changed: int
    corrected: int | None
    broken: int | None
    moves: list[tuple[str, str, int]]
    confusions: list[Confusion]
    confidence: list[Confidence]
    temperature: float | None
    temperature_note: str
    agreement: float | None
    measure: str | None
    logits: dict[str, Tensor] = field(repr=False)
    labels: Tensor | None = field(repr=False)

    @property
    def class_names(self) -> list[str]:
        return [change.name for change in self.classes]

    def changed_most(self, count: int) -> list[ClassChange]:
        """The `count` classes whose accuracy (without labels: mean probability) changed most, from the largest rise to
        the largest fall."""
        chosen = sorted(self.classes, key=lambda change: -abs(self._change(change)))[:count]
        return sorted(chosen, key=lambda change: -self._change(change))

    def _change(self, change: ClassChange) -> float:
        if self.labels is None:
            return change.probability_shift
        return 0.0 if change.accuracy_after is None else change.accuracy_after - change.accuracy_before

    def to_dict(self) -> dict:
        """Everything but the logits and labels, ready for JSON."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self) if item.name not in _TENSORS}

    def to_markdown(self, count: int = 10) -> str:
        """The findings in words and tables of at most `count` rows."""
        from .knowledge_text import markdown  # not at the top: it comes later in the order of the package

        return markdown(self, count)


def _plain(value):
    if isinstance(value, (ClassChange, Confusion, Confidence)):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def analyse(
    classifier: AnchorClassifier,
    dataset,
    *,
    vocabulary: str | os.PathLike | Sequence[str] | None = None,
    neighbours: int = 5,
    teacher: Teacher | None = None,
    accelerator=None,
    progress: bool = True,
    **embedding,
) -> Knowledge:
    """What the adapter of a classifier changes on these images.

    Args:
        classifier (`AnchorClassifier`): with an adapter: what `extract`, `transfer` or `label_tune` returned, or a
            saved one.
        dataset (`datasets.Dataset`): images of the task; labels, if there are any, are matched by name.
        vocabulary (*optional*): auxiliary names to explain class vectors by, what `load_vocabulary` accepts; those of
            the adapter, or the universal vocabulary, when omitted. The published form has names of its own.
        neighbours (`int`, *optional*, defaults to 5): auxiliary names per class and direction.
        teacher (*optional*): the tuned weak model or its logits on these images, see [`Teacher`]; for the
            temperature. Defaults to the adapter's calibration pack where that belongs to these images.
        accelerator (`Accelerator`, *optional*): embedding is shared by its processes, the rest done by each.
        **embedding: passed to `embed_dataset`.

    Raises:
        ValueError: no adapter, one class only, a vocabulary for the published form, or labels of unknown classes.
    """
    config = classifier.adapter_config
    if config is None:
        raise ValueError(
            "there is no adapter to analyse: pass what extract or transfer returned, or load a saved one."
        )
    if config.form == "mlp" and vocabulary is not None:
        raise ValueError("an adapter of the published form reads its own auxiliary names: leave out the vocabulary.")
    names = list(config.class_names)
    if len(names) < 2:
        raise ValueError(f"there is nothing to change with one class, {names[0]!r}.")
    encoder, options = classifier.encoder, {"accelerator": accelerator, "progress": progress, **embedding}
    table = embed_dataset(encoder, dataset, **options)
    labels = None if table.labels is None else align_labels(table, names)
    tensors = classifier.transmiter.tensors(classifier.transmiter.active_name)
    logits = _both(classifier, table, tensors["anchors"][: len(names)])
    teacher, why = _teacher(classifier, table, teacher)
    if teacher is not None:
        logits[TUNED] = teacher_logits(teacher, dataset, names, templates=config.templates, **options)
    if config.form == "mlp":
        auxiliary, measure = list(config.auxiliary_names), EFFECT
        values = auxiliary_effects(table, tensors, len(names), encoder)
    else:
        auxiliary, measure = _auxiliary_names(names, vocabulary or config.auxiliary_names), COSINE
        text = encoder.embed_names(auxiliary, config.templates)
        values = directions(tensors["class_vectors"], tensors["anchors"][: len(names)], text)
    found = compare_logits(logits, names, labels, nearest(values, auxiliary, neighbours))
    found.model = encoder.name_or_path and public_name(encoder.name_or_path)
    found.form, found.measure = config.form, measure
    found.temperature_note = found.temperature_note or why
    return found


@torch.no_grad()
def _both(classifier: AnchorClassifier, table: FeatureTable, zero_shot: Tensor) -> dict[str, Tensor]:
    """Logits without and with the adapter."""
    encoder, parts = classifier.encoder, {BEFORE: [], AFTER: []}
    for x in table.batches(_BLOCK):
        x = x.to(encoder.device)
        parts[BEFORE].append(encoder.logits(x, zero_shot.to(x)).float().cpu())
        parts[AFTER].append(classifier.classify(x).float().cpu())
    return {name: torch.cat(blocks) for name, blocks in parts.items()}


def _teacher(classifier: AnchorClassifier, table: FeatureTable, teacher: Teacher | None) -> tuple[Teacher | None, str]:
    """Who stands for the truth when the temperature is fitted, and why nobody does."""
    if teacher is not None:
        return teacher, ""
    pack = classifier.calibration
    if pack is None:
        return None, "not available: no tuned model was given, and the adapter has no calibration pack"
    try:
        pack.check_images(len(table), table.dataset_fingerprint)
    except ValueError:
        return None, "not available: no tuned model was given, and the adapter's calibration pack is of other images"
    return pack, ""


def _auxiliary_names(names: Sequence[str], vocabulary) -> list[str]:
    task = {name_key(name) for name in names}
    candidates = load_vocabulary(vocabulary) if vocabulary else universal_vocabulary()
    return [name for name in candidates if name_key(name) not in task]


def compare_logits(
    logits: dict[str, Tensor],
    names: Sequence[str],
    labels: Tensor | None = None,
    neighbours: Sequence[dict[str, tuple]] | None = None,
) -> Knowledge:
    """The part of [`analyse`] that needs no model, for any two classifiers on the same images.

    Args:
        logits (`dict[str, Tensor]`): (N, C) by [`BEFORE`], [`AFTER`] and, *optional*, [`TUNED`].
        names (`Sequence[str]`): C.
        labels (`Tensor`, *optional*): (N,).
        neighbours (`Sequence[dict[str, tuple]]`, *optional*): `towards` and `away` of each class.

    Raises:
        ValueError: shapes do not fit, or there is no image.
    """
    before, after = logits[BEFORE], logits[AFTER]
    shapes = {tuple(z.shape) for z in logits.values()}
    if len(shapes) > 1 or before.ndim != 2 or before.shape[1] != len(names) or not len(before):
        raise ValueError(f"the logits must all be (N, {len(names)}) on the same images, got {sorted(shapes)}.")
    was, now = before.argmax(1), after.argmax(1)
    corrected = broken = None
    if labels is not None:
        corrected = int(((was != labels) & (now == labels)).sum())
        broken = int(((was == labels) & (now != labels)).sum())
    temperature, note = _temperature(logits)
    rows = [_confidence(name, z, labels) for name, z in logits.items()]
    if temperature is not None:
        rows.insert(2, _confidence(f"{AFTER}, temperature {temperature:.2f}", after / temperature, labels))
    return Knowledge(
        model=None,
        form=None,
        num_images=len(was),
        classes=_classes(before, after, names, labels, neighbours or [{}] * len(names)),
        changed=int((was != now).sum()),
        corrected=corrected,
        broken=broken,
        moves=[(*pair, count) for pair, count in _counted(was[was != now], now[was != now], names).items()],
        confusions=[] if labels is None else _confusions(labels, was, now, names),
        confidence=rows,
        temperature=temperature,
        temperature_note=note,
        agreement=_percent(logits[TUNED].argmax(1) == now) if TUNED in logits else None,
        measure=None,
        logits=logits,
        labels=labels,
    )


def _temperature(logits: dict[str, Tensor]) -> tuple[float | None, str]:
    if TUNED not in logits:
        return None, ""
    said = logits[TUNED]
    try:
        found = fit_temperature(logits[AFTER], one_hot(said.argmax(1), said.shape[1]))
    except ValueError as error:
        return None, f"not available: {error}"
    return found, "fitted to the tuned model's predictions as if they were labels"


def _confidence(name: str, logits: Tensor, labels: Tensor | None) -> Confidence:
    confidence = 100 * float(logits.softmax(1).max(1).values.mean())
    if labels is None:
        return Confidence(name, confidence)
    return Confidence(
        name, confidence, _percent(logits.argmax(1) == labels), expected_calibration_error(logits, labels)
    )


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())


def _classes(
    before: Tensor, after: Tensor, names: Sequence[str], labels: Tensor | None, neighbours: Sequence[dict]
) -> list[ClassChange]:
    shift, count = (after - before).double(), len(names)
    said = [logits.argmax(1) for logits in (before, after)]
    columns = {
        "logit_shift": (shift - shift.mean(1, keepdim=True)).mean(0),
        "probability_shift": 100 * (after.double().softmax(1) - before.double().softmax(1)).mean(0),
        "share_before": 100 * torch.bincount(said[0], minlength=count) / len(shift),
        "share_after": 100 * torch.bincount(said[1], minlength=count) / len(shift),
    }
    if labels is not None:
        columns["images"] = torch.bincount(labels, minlength=count)
        for when, prediction in zip(("before", "after"), said, strict=True):
            hits = torch.bincount(labels[prediction == labels], minlength=count)
            columns[f"accuracy_{when}"] = 100 * hits / columns["images"]  # NaN for a class without images
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    rows = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    return [ClassChange(name, **row, **more) for name, row, more in zip(names, rows, neighbours, strict=True)]


def _counted(source: Tensor, target: Tensor, names: Sequence[str]) -> dict[tuple[str, str], int]:
    """How often each pair of names occurs, the most frequent first."""
    pairs, counts = torch.unique(source * len(names) + target, return_counts=True)
    order = counts.argsort(descending=True, stable=True).tolist()
    found = [(int(pairs[i]), int(counts[i])) for i in order]
    return {(names[pair // len(names)], names[pair % len(names)]): count for pair, count in found}


def _confusions(labels: Tensor, was: Tensor, now: Tensor, names: Sequence[str]) -> list[Confusion]:
    counts = [_counted(labels[said != labels], said[said != labels], names) for said in (was, now)]
    pairs = dict.fromkeys([*counts[0], *counts[1]])
    found = [Confusion(*pair, counts[0].get(pair, 0), counts[1].get(pair, 0)) for pair in pairs]
    return sorted((c for c in found if c.before != c.after), key=lambda c: -abs(c.after - c.before))
