"""[`expert_logits`]: what the tuned weak model and the strong one say together about unlabelled images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..algebra import check_finite, class_pull, coverage
from ..data.anchors import DEFAULT_TEMPLATES, Anchors
from ..data.embeddings import embed_dataset
from ..data.table import FeatureTable
from ..encoders.dual_encoder import DualEncoder
from .classifier import AnchorClassifier
from .stored_logits import CalibrationPack
from .teacher import Teacher, check_weak, teacher_logits


EVEN = 0.5  # coverage of the classes; images of fewer than that do not tell how often each is asked for
EXPERTS = "softmax(2 t + z - w)"
"""The soft labels, for what is noted about a model that learnt from them."""


def expert_logits(
    teacher: Teacher,
    strong: DualEncoder,
    dataset,
    class_names: Sequence[str],
    *,
    weak: DualEncoder | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    table: FeatureTable | None = None,
    **embedding,
) -> Tensor:
    """Logits (N, C) of a product of experts, ``L = t + (z + t - w)``: the tuned weak model t, and emulated fine-tuning
    (arXiv 2310.12962), which adds to the zero-shot strong model z what tuning changed on the weak one, zero-shot w.

    Args:
        teacher ([`Teacher`]): t. Of a [`CalibrationPack`] with `weak_logits` also w. Logits (N, C) as a plain tensor
            are t where `weak` is given, and else taken for L as they are.
        strong ([`DualEncoder`]): zero-shot, z.
        dataset (`datasets.Dataset`): N images; their labels are not used.
        weak ([`DualEncoder`], *optional*): zero-shot, w; not needed where stored logits hold it, or where the teacher
            is an adapter on it.
        templates (`Sequence[str]`, *optional*): prompts of both zero-shot models.
        table (`FeatureTable`, *optional*): embeddings of the images by `strong`, where they are at hand.
        **embedding: passed to `embed_dataset`.

    Raises:
        ValueError: a teacher that needs the weak model, which is not passed, or what [`teacher_logits`] raises.
    """
    names = tuple(class_names)
    options = {"templates": templates, **embedding}
    table = embed_dataset(strong, dataset, **{**embedding, "labels": False}) if table is None else table
    if isinstance(teacher, Tensor) and weak is None:
        return teacher_logits(teacher, dataset, names, table=table)
    tuned, zero_shot = tuned_and_weak_logits(teacher, weak, dataset, names, table=table, **options)
    plain, found = _zero_shot(strong, names, templates), torch.empty(tuned.shape)
    with torch.no_grad():
        for rows, x in table.share():
            found[rows] = 2 * tuned[rows] + plain.classify(x.to(strong.device)).cpu() - zero_shot[rows]
    return check_finite(found, "what the tuned and the strong model say together")


class SoftLabels:
    """``q = softmax(L - log β)`` (N, C) of label logits, row by row when asked for: in memory are only the logits.

    Args:
        even (`bool`, *optional*): whether the images hold all classes about equally often, so that β is their
            [`class_pull`] and not one; by their [`coverage`] when omitted.
    """

    def __init__(self, logits: Tensor, even: bool | None = None):
        self.logits, self.shape, self.pull = logits, logits.shape, torch.zeros(logits.shape[1])
        self.even = self.coverage >= EVEN if even is None else even
        if self.even:
            self.pull = class_pull(logits)

    @cached_property
    def coverage(self) -> float:
        """Of the labels before they are made even."""
        return coverage(SoftLabels(self.logits, even=False))

    def __getitem__(self, rows) -> Tensor:
        return (self.logits[rows] - self.pull).softmax(1)


def tuned_and_weak_logits(
    teacher: Teacher,
    weak: DualEncoder | None,
    dataset,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    table: FeatureTable | None = None,
    **embedding,
) -> tuple[Tensor, Tensor]:
    """t and w, each (N, C), see [`expert_logits`]. `table` (of any model) says which images stored logits must be of.

    Raises:
        ValueError: as [`expert_logits`].
    """
    names = tuple(class_names)
    if isinstance(teacher, (str, os.PathLike)):
        teacher = CalibrationPack.load(teacher)
    if isinstance(teacher, CalibrationPack) and teacher.weak_logits is not None:
        packs = (teacher, replace(teacher, logits=teacher.weak_logits))
        return tuple(teacher_logits(pack, dataset, names, table=table) for pack in packs)
    if weak is None and isinstance(teacher, AnchorClassifier) and teacher.adapter_config is not None:
        weak = teacher.encoder
    if weak is None:
        raise ValueError("these labels need the weak model as it was before its tuning: pass weak=.")
    check_weak(weak, teacher)
    own = embed_dataset(weak, dataset, **{**embedding, "labels": False})
    options = {"templates": templates, "weak": weak, "table": own, **embedding}
    models = teacher, _zero_shot(weak, names, templates)
    return tuple(teacher_logits(one, dataset, names, **options) for one in models)


def _zero_shot(model: DualEncoder, names: Sequence[str], templates: Sequence[str]) -> AnchorClassifier:
    return AnchorClassifier(model, Anchors(names, (), templates))
