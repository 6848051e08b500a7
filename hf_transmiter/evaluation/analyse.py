"""[`analyse`]: what an adapter changes, the analysis of the extracted knowledge of arXiv 2508.08604 on any images.

A classifier with its adapter is held against its own zero-shot (same model, adapter off): which classes it prefers
now, which predictions are corrected and broken, which confusions came and went, and which auxiliary names lie where
each class moved to. Without labels: what changed, not whether it is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data.anchors import Anchors
from ..data.embeddings import embed_dataset
from ..data.table import align_labels
from ..data.vocabulary import name_key, universal_vocabulary
from ..hub.repo import public_name
from ..hub.scores import cell_text, shown, table
from ..method.classifier import AnchorClassifier
from ..method.teacher import Teacher, teacher_logits
from .reliability import expected_calibration_error


BEFORE, AFTER, TUNED = "zero-shot", "with the adapter", "tuned model"
_NEAREST = 5  # auxiliary names per class and direction
_ROWS = 10  # of a table


@dataclass(frozen=True)
class ClassChange:
    """What the adapter does to one class.

    Args:
        logit_shift: mean over the images of the change of its logit minus the mean change of all classes.
        probability_shift: change of its mean probability, in percentage points.
        share_before, share_after: percent of the images that are predicted as this class.
        images, accuracy_before, accuracy_after:
            With labels: how many have this one, and percent of them predicted right; `None` without any.
        towards, away:
            Auxiliary names whose text embedding lies most and least in the direction in which the class vector moved,
            with the cosine of the two ([`directions`]), the farthest from 0 first. Empty for the published form.
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
class Confidence:
    """How sure one of [`Knowledge.logits`] is (mean over the images of the largest probability) and, with labels, how
    right; all in percent."""

    name: str
    confidence: float
    accuracy: float | None = None
    calibration_error: float | None = None


@dataclass
class Knowledge:
    """What [`analyse`] found. Before: zero-shot; after: with the adapter.

    Args:
        model, form: the model under the adapter (a folder without its path), and the adapter's form.
        num_images: N.
        classes: in the order of the columns.
        changed: images that are predicted otherwise.
        corrected, broken: with labels, changed images that were wrong and are right, and the reverse.
        moves: prediction before, after, and how many images; the most images first.
        confusions:
            Label, another prediction, and how many images before and after; those whose count changed most first.
        confidence: by [`BEFORE`], [`AFTER`] and, if there was a tuned model, [`TUNED`], as are the logits (N, C).
        agreement: percent of the images on which the tuned model predicts the same as after.
        labels: (N,).
    """

    model: str | None
    form: str | None
    num_images: int
    classes: list[ClassChange]
    changed: int
    corrected: int | None
    broken: int | None
    moves: list[tuple[str, str, int]]
    confusions: list[tuple[str, str, int, int]]
    confidence: list[Confidence]
    agreement: float | None
    logits: dict[str, Tensor] = field(repr=False)
    labels: Tensor | None = field(repr=False)

    @property
    def class_names(self) -> list[str]:
        return [change.name for change in self.classes]

    def to_dict(self) -> dict:
        """Everything but the logits and labels, ready for JSON."""
        found = asdict(replace(self, logits={}, labels=None))
        return {key: value for key, value in found.items() if key not in ("logits", "labels")}


def analyse(
    classifier: AnchorClassifier,
    dataset,
    *,
    teacher: Teacher | None = None,
    **embedding,
) -> Knowledge:
    """What the adapter of a classifier changes on these images.

    Args:
        dataset (`datasets.Dataset`): images of the task; labels, if there are any, are matched by name.
        teacher (*optional*): the tuned weak model or its logits on these images, see [`Teacher`]. Defaults to the
            adapter's calibration pack where that belongs to these images.
        **embedding: passed to `embed_dataset`.

    Raises:
        ValueError: no adapter, one class only, or labels of unknown classes.
    """
    config = classifier.adapter_config
    if config is None:
        raise ValueError("there is no adapter to analyse: pass what extract or transfer returned, or a saved one.")
    names = list(config.class_names)
    if len(names) < 2:
        raise ValueError(f"there is nothing to change with one class, {names[0]!r}.")
    encoder = classifier.encoder
    table = embed_dataset(encoder, dataset, tower=classifier.reads_tower, **embedding)
    labels = None if table.labels is None else align_labels(table, names)
    pack = classifier.calibration
    if teacher is None and pack is not None:
        with suppress(ValueError):  # it is of other images
            pack.check_images(len(table), table.dataset_fingerprint)
            teacher = pack
    zero_shot = AnchorClassifier(encoder, Anchors(tuple(names), (), tuple(config.templates)))
    logits = {
        name: teacher_logits(one, dataset, names, templates=config.templates, **embedding)
        for name, one in ((BEFORE, zero_shot), (AFTER, classifier), (TUNED, teacher))
        if one is not None
    }
    tensors = classifier.transmiter.tensors(classifier.transmiter.active_name)
    near = None
    if "class_vectors" in tensors:
        task = set(map(name_key, names))
        auxiliary = [name for name in config.auxiliary_names or universal_vocabulary() if name_key(name) not in task]
        text = encoder.embed_names(auxiliary, config.templates)
        vectors = tensors["class_vectors"][:, : encoder.embed_dim]
        near = nearest(directions(vectors, tensors["anchors"][: len(names)], text), auxiliary)
    found = compare_logits(logits, names, labels, near)
    found.model, found.form = encoder.name_or_path and public_name(encoder.name_or_path), config.form
    return found


def compare_logits(
    logits: dict[str, Tensor],
    names: Sequence[str],
    labels: Tensor | None = None,
    neighbours: Sequence[dict[str, tuple]] | None = None,
) -> Knowledge:
    """The part of [`analyse`] that needs no model, for any two classifiers on the same images.

    Args:
        logits (`dict[str, Tensor]`): (N, C) by [`BEFORE`], [`AFTER`] and, *optional*, [`TUNED`].
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
        confidence=[_confidence(name, z, labels) for name, z in logits.items()],
        agreement=_percent(logits[TUNED].argmax(1) == now) if TUNED in logits else None,
        logits=logits,
        labels=labels,
    )


def _confidence(name: str, logits: Tensor, labels: Tensor | None) -> Confidence:
    sure = 100 * float(logits.softmax(1).amax(1).mean())
    if labels is None:
        return Confidence(name, sure)
    return Confidence(name, sure, _percent(logits.argmax(1) == labels), expected_calibration_error(logits, labels))


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
    pairs = Counter(sorted(zip(source.tolist(), target.tolist(), strict=True)))
    return {(names[i], names[j]): count for (i, j), count in pairs.most_common()}


def _confusions(labels: Tensor, was: Tensor, now: Tensor, names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    before, after = (_counted(labels[said != labels], said[said != labels], names) for said in (was, now))
    found = [(*pair, before.get(pair, 0), after.get(pair, 0)) for pair in before | after]
    return sorted((row for row in found if row[2] != row[3]), key=lambda row: -abs(row[3] - row[2]))


# Which auxiliary names explain a change


def nearest(values: Tensor, auxiliary: Sequence[str]) -> list[dict[str, tuple]]:
    """Per class the auxiliary names with the highest positive and the lowest negative values."""
    found, count = [], min(_NEAREST, len(auxiliary))
    for row in values.cpu():
        sides = {}
        for side, sign in (("towards", 1.0), ("away", -1.0)):
            best = (sign * row).topk(count)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            sides[side] = tuple((auxiliary[i], sign * value) for i, value in pairs if value > 0)
        found.append(sides)
    return found


def directions(class_vectors: Tensor, zero_shot: Tensor, auxiliary: Tensor) -> Tensor:
    """Cosine of the direction in which each class vector moved with each auxiliary name.

    ``m_c = (t̂_c - mean t̂) - (a_c - mean a)`` with t̂ the class vectors at unit length, means over the classes: what
    moves all classes alike changes no prediction. Text embeddings are centred too, they share most of their length.

    Args:
        class_vectors, zero_shot (`Tensor`): T (C, d), and a (C, d) with unit rows.
        auxiliary (`Tensor`): (A, d) unit text embeddings.

    Returns:
        `Tensor`: (C, A) in [-1, 1]; 0 for a class that did not move.
    """
    moved, start = (v - v.mean(0) for v in (normalize(class_vectors.float(), dim=-1), zero_shot.float()))
    text = auxiliary.float().to(moved.device)
    move = moved - start
    move[move.norm(dim=1) < 1e-5 * start.norm(dim=1).clamp(min=1)] = 0  # rounding has no direction
    return normalize(move, dim=-1) @ normalize(text - text.mean(0), dim=-1).T


# In words


_NAMED = (
    "Auxiliary names whose text embedding points where the class vector moved (cosine in brackets). They say "
    "something where the class moved and the model knows the names."
)


def markdown(found: Knowledge) -> str:
    """Sections of a report, headings of the second level, tables of at most ten rows. Classes whose accuracy (without
    labels: mean probability) changed most are shown, from the largest rise to the largest fall."""

    def rise(change: ClassChange) -> float:
        if found.labels is None:
            return change.probability_shift
        return 0.0 if change.accuracy_after is None else change.accuracy_after - change.accuracy_before

    changes = sorted(sorted(found.classes, key=lambda change: -abs(rise(change)))[:_ROWS], key=rise, reverse=True)
    sure = [(row.name, *map(shown, (row.accuracy, row.confidence, row.calibration_error))) for row in found.confidence]
    parts = [_summary(found), "## Confidence", _table(("", "accuracy", "mean confidence", "calibration error"), sure)]
    parts += ["Percent.", "## Classes that changed most", _changes(changes)]
    if found.labels is None:
        parts += ["## Changed predictions", _table(("before", "after", "images"), found.moves[:_ROWS])]
    else:
        rows = [(*row, f"{row[3] - row[2]:+d}") for row in found.confusions[:_ROWS]]
        header = ("true class", "predicted", "before", "after", "change")
        parts += ["## Confusions that came and went", _table(header, rows)]
    if any(change.towards for change in changes):
        rows = []
        for change in changes:
            near = [[f"{name} ({value:+.2f})" for name, value in side] for side in (change.towards, change.away)]
            rows.append((change.name, *map(", ".join, near)))
        parts += ["## What the changes look like", _NAMED, _table(("class", "towards", "away from"), rows)]
    return "\n\n".join(parts) + "\n"


def _summary(found: Knowledge) -> str:
    """The findings in a few words."""
    part = 100 * found.changed / found.num_images
    share = f"{found.changed} of {found.num_images} predictions changed ({part:.1f} %)"
    if found.labels is None:
        text = f"{share}. The images have no labels, so whether for better or worse is not known."
    else:
        elsewhere = found.changed - found.corrected - found.broken
        text = f"{share}: {found.corrected} corrected, {found.broken} broken, {elsewhere} wrong before and after."
    if found.agreement is not None:
        text += f" The tuned model predicts the same on {found.agreement:.1f} %."
    return text


def _changes(changes: Sequence[ClassChange]) -> str:
    header = ["class", "mean probability (points)", "mean logit", "predicted before", "after"]
    rows = [
        [
            *(change.name, f"{change.probability_shift:+.2f}", f"{change.logit_shift:+.2f}"),
            *(f"{change.share_before:.1f} %", f"{change.share_after:.1f} %"),
        ]
        for change in changes
    ]
    if any(change.images is not None for change in changes):
        header += ["images", "accuracy before", "after"]
        for row, change in zip(rows, changes, strict=True):
            row += [change.images, shown(change.accuracy_before), shown(change.accuracy_after)]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    if not rows:
        return "None."
    return table(header, ([cell_text(str(value)) for value in row] for row in rows)).strip()
