"""[`Lesson`]: what [`tune`] learns from, labels or a teacher, and what was learnt, on images that it did not see."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..algebra import guessing
from ..data.anchors import Anchors
from ..data.class_names import label_places
from ..data.embeddings import embed_dataset
from ..data.images import label_indices
from ..data.splits import few_shot
from ..data.table import FeatureTable
from ..encoders.dual_encoder import DualEncoder
from ..settings import TuningConfig
from .classifier import AnchorClassifier
from .experts import EXPERTS, SoftLabels, expert_logits
from .teacher import Teacher


logger = logging.getLogger(__name__)

MOST_HELD_OUT = 1000  # images
LEAST_CHANGED = 1.0  # percent of the predictions


@dataclass
class Lesson:
    """What is learnt from, and what that is measured on.

    Args:
        examples (`Dataset`): N images; the first `seen` of them train.
        table (`FeatureTable`): their embeddings (N, d) by the model as it is.
        targets (`Tensor`): labels (N,) or probabilities (N, C).
        held_out: images that do not train, with embeddings and labels; `None` where there are none.
    """

    examples: Dataset
    table: FeatureTable
    targets: Tensor
    seen: int
    held_out: tuple[Dataset, FeatureTable, Tensor] | None = None


def draw_few_shot(dataset: Dataset, label_column: str, names: Sequence[str], config: TuningConfig):
    """Rows of the drawn examples and their labels (N,), and the same of up to `MOST_HELD_OUT` left-over ones. Labels
    are positions in `names`, matched by name; which examples are drawn does not depend on the order of `names`."""
    values, found = label_indices(dataset, label_column), getattr(dataset.features[label_column], "names", None)
    rows = few_shot(values, config.shots, config.seed, len(found or names), allow_fewer=True)
    places = label_places(found, values, names)
    labels = torch.tensor([places[row] for row in rows], dtype=torch.long)
    counts = labels.bincount(minlength=len(names)).tolist()
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise ValueError(f"{len(empty)} of {len(names)} classes have no image, first {empty[0]!r}: leave them out.")
    if min(counts) < config.shots:
        logger.warning("%d classes have fewer than %d images.", sum(n < config.shots for n in counts), config.shots)
    left = sorted(set(range(len(values))) - set(rows))
    if left:
        each = max(1, MOST_HELD_OUT // len(names))
        drawn = few_shot([values[row] for row in left], each, config.seed, allow_fewer=True)
        left = [left[i] for i in drawn][:: -(-len(drawn) // MOST_HELD_OUT)]
    return rows, labels, left, torch.tensor([places[row] for row in left], dtype=torch.long)


def labelled_lesson(model: DualEncoder, dataset: Dataset, drawn: tuple, options: dict) -> Lesson:
    """A few labelled examples, measured on left-over ones."""
    rows, labels, left, left_labels = drawn
    examples, others = dataset.select(rows), dataset.select(left)
    try:
        table = embed_dataset(model, examples, **options)
    except ValueError as error:
        raise ValueError(f"{error} (Rows are counted among the {len(rows)} drawn examples.)") from error
    lesson = Lesson(examples, table, labels, len(rows))
    try:
        lesson.held_out = (others, embed_dataset(model, others, **options), left_labels) if left else None
    except ValueError as error:  # they are not needed for tuning
        logger.warning("what is learnt is not measured on the pictures that are left over: %s", error)
    return lesson


def taught_lesson(
    teacher: Teacher, weak: DualEncoder | None, model: DualEncoder, dataset: Dataset, anchors: Anchors, seed: int,
    options: dict,
) -> Lesson:  # fmt: skip
    """All images with the experts' probabilities, in an order that the seed decides: the last tenth is held out."""
    if len(dataset) < 2:
        raise ValueError("a teacher needs at least two images, one of which is held out: pass more.")
    table = embed_dataset(model, dataset, **options)
    experts = {"weak": weak, "templates": anchors.templates, "table": table}
    targets = SoftLabels(expert_logits(teacher, model, dataset, anchors.task, **experts, **options))[:]
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    seen = len(order) - min(MOST_HELD_OUT, max(1, len(order) // 10))
    table, targets, examples = table.select(order), targets[order], dataset.select(order.tolist())
    rest = range(seen, len(order))
    return Lesson(
        examples, table, targets, seen, (examples.select(rest), table.select(rest), targets[seen:].argmax(1))
    )


def held_out_loss(answers: Callable, targets: Tensor, seen: int, droppers: list[nn.Module], accelerator) -> float:
    """Mean cross-entropy of what is held out; several processes share the work, and agree on the number."""
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    total, generator = torch.zeros((), device=targets.device), torch.Generator()
    for module in droppers:
        module.eval()
    with torch.no_grad():
        for rows in torch.arange(seen, len(targets)).split(64)[rank::world]:
            z = answers(rows, generator)[0].logits
            total += cross_entropy(z, targets[rows.to(targets.device)], reduction="sum")
    for module in droppers:
        module.train()
    if world > 1:
        total = accelerator.reduce(total, "sum")
    return float(total) / (len(targets) - seen)


@torch.no_grad()
def what_was_learnt(
    classifier: AnchorClassifier, zero_shot: Tensor, moves_images: bool, lesson: Lesson, options: dict
) -> dict:
    """What [`TeacherFacts`] notes of it; a warning where that is nothing. Without held-out images it is only known how
    many predictions changed, on those that trained."""
    images, before, labels = lesson.held_out or (lesson.examples, lesson.table, None)
    after = embed_dataset(classifier.encoder, images, **options) if moves_images else before
    device = classifier.encoder.device
    first = torch.cat([(x.to(device) @ zero_shot.T).argmax(1).cpu() for x in before.batches(4096)])
    last = torch.cat([classifier.classify(x.to(device)).argmax(1).cpu() for x in after.batches(4096)])

    def percent(matches: Tensor) -> float:
        return round(100 * matches.float().mean().item(), 2)

    found = {"held_out": None, "changed": percent(first != last), "warning": None}
    if labels is not None:
        kind = "accuracy" if lesson.targets.ndim == 1 else "agreement"
        scores = [percent(said == labels) for said in (last, first)]
        found["held_out"] = {"num_images": len(labels), kind: scores[0], "zero_shot": scores[1]}
    if found["changed"] < LEAST_CHANGED:
        found["warning"] = f"nothing was learnt: only {found['changed']:.1f} % of the predictions changed"
    elif labels is not None and scores[0] <= scores[1]:
        found["warning"] = (
            f"nothing was learnt: {kind} is {scores[0]:.1f} % on held-out images, {scores[1]:.1f} % before"
        )
    elif labels is not None and kind == "accuracy":
        chance = guessing(scores[0], len(labels), len(classifier.class_names))
        if chance is not None:
            found["warning"] = f"nothing was learnt: accuracy is {scores[0]:.1f} %, and guessing has {chance:.1f} %"
    if found["warning"]:
        found["warning"] += "; try more epochs or another learning rate, and look at the labels."
        logger.warning(found["warning"])
    return found


def taught_by(teacher: Teacher, weak: DualEncoder | None, num_images: int) -> dict:
    """What [`TeacherFacts`] notes of a teacher."""
    facts = getattr(teacher, "facts", None)
    if weak is None and isinstance(teacher, AnchorClassifier) and teacher.adapter_config is not None:
        weak = teacher.encoder
    noted = {"name": facts.weak, "revision": facts.revision, "fingerprint": facts.fingerprint} if facts else None
    if weak is not None:
        noted = {"name": weak.name_or_path, "revision": weak.revision, "fingerprint": weak.fingerprint}
    return {
        "experts": "softmax(logits as given)" if isinstance(teacher, Tensor) and weak is None else EXPERTS,
        "weak": noted,
        "settings": facts.settings if facts else None,
        "num_images": num_images,
    }
