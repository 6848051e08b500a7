"""[`evaluate`]: accuracy of one classifier.

Protocols: all classes at once; base-to-novel (accuracy among the classes the tuning saw, among the others, their
harmonic mean, and the *joint* accuracy over all classes, without which the two halves flatter).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from ..data.anchors import Anchors
from ..data.embeddings import embed_dataset
from ..data.table import align_labels
from ..hub.adapter_files import SCORES
from ..hub.card import write_card
from ..hub.scores import THIS, Score, read_scores, write_scores
from ..method.classifier import AnchorClassifier, seen_columns
from ..method.teacher import teacher_logits
from ..settings import check_kind
from .reliability import check_labels


ZERO_SHOT = "zero-shot"  # method of the rows about the plain model


def score_logits(logits: Tensor, labels: Tensor, base: Sequence[int] | None = None) -> dict[str, float]:
    """Top-1 accuracies in percent.

    Args:
        logits (`Tensor`): (N, C).
        labels (`Tensor`): (N,) in [0, C).
        base (`Sequence[int]`, *optional*): columns the tuning saw; the others are novel.

    Returns:
        `dict[str, float]`: `accuracy`; with `base`, and where there are other classes, also `base` and `novel` (each
        among its own classes only), their harmonic mean `hm`, and `joint`, the same number as `accuracy`.

    Raises:
        ValueError: as [`check_labels`].
    """
    check_labels(logits, labels)
    scores = {"accuracy": _percent(logits.argmax(1) == labels)}
    columns = torch.zeros(logits.shape[1], dtype=torch.bool)
    columns[list(base or [])] = True
    if base is None or columns.all():
        return scores
    of_base = columns[labels]
    for name, mask, rows in (("base", columns, of_base), ("novel", ~columns, ~of_base)):
        best = logits[rows].masked_fill(~mask, -torch.inf).argmax(1)
        scores[name] = _percent(best == labels[rows]) if rows.any() else float("nan")
    scores["hm"] = harmonic_mean(scores["base"], scores["novel"])
    scores["joint"] = scores["accuracy"]
    return scores


def harmonic_mean(a: float, b: float) -> float:
    """``2ab / (a + b)``, 0 where both are."""
    return 2 * a * b / (a + b) if a + b else 0.0


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.float().mean())


def evaluate(
    classifier: AnchorClassifier,
    dataset,
    *,
    seen_classes: Sequence[str] | None = None,
    method: str = "model",
    split: str = "test",
    dataset_name: str | None = None,
    **embedding,
) -> list[Score]:
    """Scores of a classifier, with or without an adapter, on labelled images.

    Args:
        dataset (`datasets.Dataset`):
            Images, or their embeddings (see [`embed_dataset`]); labels are matched by name, or are positions in
            `classifier.class_names`.
        seen_classes (`Sequence[str]`, *optional*): adds base, novel, harmonic mean and joint.
        method, split, dataset_name (`str`, *optional*): noted in the scores.
        **embedding: passed to `embed_dataset`.

    Raises:
        ValueError: no labels, class names of the dataset that are not the classifier's, or logits that are not finite.
    """
    check_kind("classifier", classifier, AnchorClassifier)
    table = embed_dataset(classifier.encoder, dataset, tower=classifier.reads_tower, **embedding)
    labels = align_labels(table, classifier.class_names)
    logits = teacher_logits(classifier, dataset, classifier.class_names, **embedding)
    base = None if seen_classes is None else seen_columns(classifier.class_names, seen_classes)
    scores = score_logits(logits, labels, base)
    on = {"dataset": dataset_name, "num_images": len(labels)}
    return [Score(method, split, metric, value, **on) for metric, value in scores.items()]


def record_scores(
    folder: str | os.PathLike, classifier: AnchorClassifier, dataset, scores: Sequence[Score], **options
) -> None:
    """Notes scores of an adapter's folder, with those of its plain model: see [`note_scores`]. `scores` is what
    `evaluate` returned for the classifier, `dataset` and `options`."""
    scores = [replace(score, method=THIS) for score in scores]
    if classifier.adapter_config is not None:  # the encoder below a TransMiter adapter is the plain model
        anchors = Anchors(classifier.class_names, (), classifier.anchors.templates)
        scores += evaluate(AnchorClassifier(classifier.encoder, anchors), dataset, method=ZERO_SHOT, **options)
    note_scores(folder, scores)


def note_scores(folder: str | os.PathLike, scores: Sequence[Score]) -> None:
    """Writes ``scores.json`` of an adapter's or a bridge's folder, and its card. Rows about the same dataset, split
    and metric are replaced, others stay."""
    path, about = Path(folder) / SCORES, attrgetter("dataset", "split", "metric", "method")
    known, new = read_scores(path) if path.is_file() else [], set(map(about, scores))
    write_scores(path, [*(score for score in known if about(score) not in new), *scores])
    write_card(folder)


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Wall seconds of a block, in the dictionary it yields."""
    found, since = {}, time.perf_counter()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - since
