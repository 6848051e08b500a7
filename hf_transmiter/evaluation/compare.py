"""[`compare`]: every way to upgrade and every cheap alternative on one task, in one table, the verdict first."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ..data.anchors import DEFAULT_TEMPLATES
from ..data.images import check_dataset, guess_columns
from ..data.vocabulary import NUM_ANCHORS
from ..encoders.dual_encoder import DualEncoder
from ..hub.checks import as_list
from ..hub.scores import Score
from ..method.bridge import Bridge
from ..method.classifier import AnchorClassifier, seen_columns
from ..method.refit import fewest_images
from ..method.teacher import Teacher, check_teacher, task_names
from ..settings import ExtractionConfig, check_kind
from .evaluate import score_logits
from .evidence import VISIBLE_GAIN, Evidence, paired_gain, recommend
from .methods import BACKPROP, CONTROL, FROM_TEXT, IMAGES, LABELS, METHODS, NEEDS, STRONG, UNTUNED, WEAK, Variant
from .reliability import expected_calibration_error
from .task import Answer, Impossible, Task


logger = logging.getLogger(__name__)

NOTES = {LABELS: "needs labelled images", WEAK: "needs the weak model and its tuned version for every prediction"}
WEAK_ALONE = ("zero-shot weak", "tuned weak")  # no upgrade at all
_KEEP = "Keep the strong model as it is"
_IF_LABELLED = {"tuned strong": "re-tune the strong model", "linear probe": "a linear probe on it will do"}
# What may go wrong with one method's data or settings; anything else is a fault of the program.
_FORESEEN = (ValueError, OSError, torch.OutOfMemoryError, torch.linalg.LinAlgError)


@dataclass
class Row:
    """One way to upgrade, or one cheap alternative, scored.

    Args:
        logits: (N, C) on the test images.
        scores: by metric.
        needs: what it asks for, of [`NEEDS`].
        note: the advantage it has over those that need neither labels nor the weak model.
        size: bytes to be stored for it beside the pre-trained models, where that is known.
        classifier: what it is, if that is one model; with a TransMiter adapter it is saved by `save_pretrained`.
        models: how many run for a prediction.
        open_names: whether it can be asked for any class names; `None` where that is not known.
    """

    logits: Tensor
    scores: dict[str, Score]
    needs: Collection[str] = ()
    note: str | None = None
    size: int | None = None
    classifier: AnchorClassifier | None = None
    models: int = 1
    open_names: bool | None = None


@dataclass
class Comparison:
    """What [`compare`] found.

    Args:
        rows: by name, in their order.
        labels, class_names: of the test images.
        skipped: names of the rows that could not be had, and why.
        lost: those of them that another run may have: nothing was wrong with what they were made from.
        recommended: the row to take: what [`recommend`] says, or the strong model as it is where the labels of the
            test images show no gain beyond one standard error.
        advice: the verdict in words: what to take, by how much it was measured to be better, what is not known.
        evidence: the numbers behind it, see [`Evidence`]; with labels also `gain` and its `standard_error`, in points.
    """

    rows: dict[str, Row]
    labels: Tensor | None
    class_names: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    recommended: str = ""
    advice: str = ""
    evidence: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> list[Score]:
        """One per row and metric."""
        return [score for row in self.rows.values() for score in row.scores.values()]

    @property
    def notes(self) -> dict[str, str]:
        """By row, of those that have one."""
        return {name: row.note for name, row in self.rows.items() if row.note}

    def to_dict(self) -> dict:
        """For JSON: the advice, then every row with its scores (percent), what it costs and what it needs."""
        rows, split = [], None
        for name, row in self.rows.items():
            values = {key: None if math.isnan(one.value) else one.value for key, one in row.scores.items()}
            first = next(iter(row.scores.values()))
            cost = {"seconds": first.seconds, "bytes": row.size}
            needs, split = [need for need in NEEDS if need in row.needs], first.split
            shape = {"models": row.models, "open_names": row.open_names}
            rows.append({"name": name, "scores": values, **cost, **shape, "needs": needs, "note": row.note})
        said = {key: getattr(self, key) for key in ("recommended", "advice", "evidence")}
        return {**said, "split": split, "rows": rows, "skipped": self.skipped}

    def value(self, row: str, metric: str = "accuracy") -> float:
        """One score. Raises `KeyError` for a row that is not there."""
        try:
            return self.rows[row].scores[metric].value
        except KeyError:
            raise KeyError(f"no score {metric!r} of {row!r}; rows: {list(self.rows)}.") from None


def compare(
    weak: DualEncoder,
    strong: DualEncoder,
    teacher: Teacher,
    test,
    *,
    unlabelled=None,
    labelled=None,
    general=None,
    tuned_strong: Teacher | None = None,
    tuning: Mapping | None = None,
    bridge: Bridge | None = None,
    class_names: Sequence[str] | None = None,
    seen_classes: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    variants: Sequence[Variant | str | Mapping] | None = None,
    vocabulary: str | Sequence[str] | None = None,
    num_anchors: int = NUM_ANCHORS,
    gradient: ExtractionConfig | None = None,
    split: str = "test",
    accelerator=None,
    progress: bool = True,
    **embedding,
) -> Comparison:
    """Scores every method that the data at hand allows.

    With labels each row has its accuracy and its expected calibration error (`ece`). Without, it has `agreement`
    (percent of the images where it predicts what the tuned weak model does), `confidence` (mean of the highest
    probability, in percent) and `calibration gap` (the calibration error with the tuned weak model's predictions in
    place of labels).

    Args:
        weak, strong ([`DualEncoder`]): the pre-trained models.
        teacher ([`Teacher`]): the tuned weak model; must be a model, since it is scored on the test images.
        test (`datasets.Dataset`):
            Images to score on, labelled or not. Here and below embeddings will do, a column for each model (see
            [`embed_dataset`]); what tunes on pictures is skipped then.
        unlabelled (`datasets.Dataset`, *optional*):
            Images of the task; labels are not read. The test images when omitted, if those have no labels.
        labelled (`datasets.Dataset`, *optional*): a few labelled images of the seen classes, for what needs labels.
        general (`datasets.Dataset`, *optional*): any images, not the task's, for a bridge without task images.
        tuned_strong ([`Teacher`], *optional*): a tuned strong model, as a ceiling; when omitted it is tuned here.
        tuning (`Mapping`, *optional*):
            How, on all of `labelled`: what [`split_tuning`] reads; LoRA in its published settings when omitted.
        bridge ([`Bridge`], *optional*): a finished one between the two models.
        class_names (`Sequence[str]`, *optional*):
            In any order where the labels have names, which are matched; the test set's names when omitted, or without
            labels those the teacher was tuned on.
        seen_classes (`Sequence[str]`, *optional*): names the tuning saw; adds base, novel, harmonic mean and joint.
        variants (`Sequence`, *optional*):
            The rows: what [`Variant.of`] reads, such as ``"refit"`` or ``{"refit": {"solver": "ridge"}}``; all of
            [`METHODS`] when omitted.
        vocabulary (`str` or `Sequence[str]`, *optional*):
            Names that are asked about beside the classes, as [`load_vocabulary`] reads them: the published adapter
            takes some, the bridge from text takes all. Common nouns, of which the bridge takes some, when omitted.
        num_anchors (`int`, *optional*, defaults to 1024): K names of the published adapter; all where there are fewer.
        gradient ([`ExtractionConfig`], *optional*): settings of the published solver.
        **embedding: passed to `embed_dataset`.

    Returns:
        [`Comparison`]: a row that is not possible, or fails for a foreseen reason, is among its `skipped`. What a
        given `tuned_strong` cost is not known, so its scores have no seconds.

    Raises:
        ValueError: no class names, the teacher only has stored logits or does not know a class, labelled images of
            a class that is not among the names, or two rows of one name.
    """
    for name, model in (("weak", weak), ("strong", strong)):
        check_kind(name, model, DualEncoder)
    check_teacher(teacher)
    if bridge is not None:
        check_kind("bridge", bridge, Bridge)
    for name, images in (("unlabelled", unlabelled), ("labelled", labelled), ("general", general), ("test", test)):
        if images is not None or name == "test":
            check_dataset(images, name)
    rows = _rows(variants)
    columns = {key: embedding.get(key) for key in ("image_column", "label_column")}
    label = guess_columns(test, **columns, pictures=False)[1]
    own = task_names(None, teacher) if label is None else getattr(test.features[label], "names", None)
    if not class_names and own is None:
        raise ValueError("the test images have no class names: pass class_names (--class-names) in label order.")
    names = tuple(as_list(class_names or own, "class_names"))
    unlabelled = test if unlabelled is None and label is None else unlabelled
    task = Task(
        weak,
        strong,
        teacher,
        test,
        names,
        unlabelled=unlabelled,
        labelled=labelled,
        general=general,
        seen_classes=seen_classes,
        templates=tuple(as_list(templates, "templates")),
        vocabulary=vocabulary,
        tuned_strong=tuned_strong,
        tuning=tuning,
        bridge=bridge,
        num_anchors=num_anchors,
        gradient=gradient or ExtractionConfig(solver="gradient"),
        options={"accelerator": accelerator, "progress": progress, **embedding},
    )
    base = None if seen_classes is None else seen_columns(names, seen_classes)
    found = Comparison({}, task.labels, names)
    quiet = not progress or (accelerator is not None and not accelerator.is_main_process)
    with tqdm(rows, desc="Comparing", disable=quiet or None, leave=False) as bar:
        for variant in bar:
            bar.set_description(f"Comparing: {variant.name}")
            _run(task, variant, found, split, base)
    evidence = Evidence(task.tuned, task.zero_shot_weak, task.zero_shot_strong)
    way, reason = recommend(
        evidence if task.labels is None else None,
        own_class_vectors=task.own_class_vectors,
        unlabelled=0 if unlabelled is None else len(unlabelled),
        fewest=fewest_images(len(base or names)),
        general=general is not None,
        unseen=base is not None and len(base) < len(names),
        bridge=bridge is not None and bridge.source == "images",
        doubt=task.embedding_bridge("text").doubt() if FROM_TEXT in found.rows else None,
    )
    _advise(found, evidence, way, reason)
    if task.seen_in_test:
        found.advice += (
            f" Beware: {task.seen_in_test} of the {len(task.labelled)} labelled images are test images too, so the "
            "rows that need labels are scored on what they learnt."
        )
    return found


def _rows(variants: Sequence[Variant | str | Mapping] | None) -> list[Variant]:
    rows = [Variant.of(one) for one in (METHODS if variants is None else as_list(variants, "variants"))]
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two rows are called {twice!r}: give one of them another name.")
    return rows


def _run(task: Task, variant: Variant, found: Comparison, split: str, base: Sequence[int] | None) -> None:
    """One row, or why there is none."""
    name, method, needs = variant.name, METHODS[variant.method], variant.needs
    try:
        with task.charged() as cost:
            made = method.run(task, variant)
        answer = task.answer(made)
    except Impossible as error:
        found.skipped[name] = str(error)
        return
    except _FORESEEN as error:
        found.skipped[name] = f"it failed: {error}"
        if not isinstance(error, ValueError):
            found.lost.add(name)
        logger.warning("%s failed and is left out: %s", name, error)
        return
    # What was tuned in the image tower is extracted from images; a prompt's class vectors are there already.
    if ExtractionConfig in method.takes and not task.own_class_vectors:
        needs = {*needs, IMAGES}
    alone = variant.method in WEAK_ALONE
    note = None if alone else next((NOTES[need] for need in NOTES if need in needs), None)
    note = CONTROL if variant.method == UNTUNED else note
    if task.labels is None:
        metrics = _agreement(answer.logits, task.tuned)
    else:
        metrics = score_logits(answer.logits, task.labels, base)
        metrics["ece"] = expected_calibration_error(answer.logits, task.labels)
    cost = {} if answer.given else cost
    scores = {metric: Score(name, split, metric, value, **cost) for metric, value in metrics.items()}
    found.rows[name] = Row(
        answer.logits, scores, needs, note, answer.size, answer.classifier, method.models, _open(task, answer, needs)
    )


def _open(task: Task, answer: Answer, needs: Collection[str]) -> bool | None:
    """Whether any class names can be asked. Of what is no classifier, heads on class names have been trained; the rest
    is zero-shot, or the tuned model by itself or with others."""
    if answer.classifier is not None:
        return answer.classifier.open_vocabulary
    if answer.given:
        return None
    return BACKPROP not in needs and (answer.size == 0 or task.tuned_model is not None)


def _agreement(logits: Tensor, tuned: Tensor) -> dict[str, float]:
    said = tuned.argmax(1)
    return {
        "agreement": 100 * float((logits.argmax(1) == said).float().mean()),
        "confidence": 100 * float(logits.softmax(1).amax(1).mean()),
        "calibration gap": expected_calibration_error(logits, said),
    }


def _advise(found: Comparison, evidence: Evidence, way: str, reason: str) -> None:
    """The verdict, what may be worse than doing nothing first; `way` and `reason` are what [`recommend`] says."""
    found.recommended, row = way, found.rows.get(way)
    found.evidence = {**evidence.facts, **({} if row is None or way == STRONG else evidence.of(row.logits))}
    if way == STRONG:
        said = f"{_KEEP}: {reason}"
    elif row is None:
        missing = found.skipped.get(way, "it is not among the rows").rstrip(".")
        said = (
            f"Whether {way} beats the strong model as it is was not measured: {missing}. It is the way since {reason}"
        )
    elif found.labels is None:
        said = f"{_untested(found, way, len(evidence.strong))} Why {way}: {reason}"
    else:
        gain, error = paired_gain(row.logits, evidence.strong, found.labels)
        found.evidence |= {"gain": gain, "standard_error": error}
        keep = gain <= error + 1e-6  # one picture more is no evidence
        found.recommended = STRONG if keep else way
        before, chance = found.value(way) - gain, ", which may be chance" if gain <= 2 * error else ""
        scored = (
            f"{way} scores {found.value(way):.1f} against {before:.1f}, {gain:+.1f} ± {error:.1f} points on these "
            f"{len(found.labels)} labelled test images"
        )
        said = f"{_KEEP}: {scored}." if keep else f"Take {way}: {scored}{chance}. Why {way}: {reason}"
    found.advice = " ".join([said, *_others(found, evidence)])


def _untested(found: Comparison, way: str, count: int) -> str:
    """What is known of an upgrade without labels, and how many would tell."""
    facts, kl = found.evidence, None
    adapter = found.rows[way].classifier and found.rows[way].classifier.adapter_config
    if adapter is not None and "refit_on" in adapter.provenance:
        kl = adapter.provenance.get("held_out_kl")
    known = "" if kl is None else f", and its held-out KL to the experts' labels is {kl:.3f}"
    differ = facts["changes"] / 100
    needed = 4 * differ / VISIBLE_GAIN**2
    return (
        f"Take {way}, but test it first: without labels nobody can know whether it is better than the strong model "
        f"as it is. The tuning changed {facts['changed']:.1f} % of the weak model's predictions on these {count} "
        f"images; {way} agrees with the tuned model on {facts['agreement']:.1f} % and "
        f"changes {facts['changes']:.1f} % of the strong model's predictions{known}. A gain of "
        f"{100 * VISIBLE_GAIN:.0f} points would be two standard errors on about {needed:,.0f} pictures, of which the "
        f"{needed * differ:,.0f} where the two differ need a label."
    )


def _others(found: Comparison, evidence: Evidence) -> Iterator[str]:
    """What else the labels of the test images say: rows that scored higher by more than two standard errors."""
    own = found.recommended
    if found.labels is None or own not in (STRONG, *found.rows):
        return
    logits = {name: row.logits for name, row in found.rows.items()} | {STRONG: evidence.strong}

    def ahead(rows: Collection[str], rival: str) -> tuple[str, str] | None:
        """The best of the rows, and by how much it is ahead of the rival; `None` where that may be chance."""
        best = max(rows, key=found.value, default=rival)
        gain, error = paired_gain(logits[best], logits[rival], found.labels)
        if gain <= 2 * error:
            return None
        return best, f"{best} scored higher than {rival} ({found.value(best):.1f}, {gain:+.1f} ± {error:.1f} points)"

    if own != STRONG and UNTUNED in logits:
        gain, error = paired_gain(logits[own], logits[UNTUNED], found.labels)
        rest = "" if gain > error else ", so what was gained comes from the pictures and not from the tuning"
        yield (
            f"An untuned teacher reaches {found.value(UNTUNED):.1f}, by self-training alone: the tuning's share is "
            f"{gain:+.1f} ± {error:.1f} points{rest}."
        )
    labelled = [name for name, row in found.rows.items() if LABELS in row.needs]
    free = [name for name, row in found.rows.items() if name not in labelled and row.note != CONTROL]
    higher = ahead(free, own)
    if higher is not None:
        note = f"; it {found.notes[higher[0]]}" if higher[0] in found.notes else ""
        yield f"On these images {higher[1]}{note}."
    with_labels = ahead(labelled, own if higher is None else higher[0])
    if with_labels is not None:
        todo = _IF_LABELLED.get(with_labels[0], "take that")
        yield f"With labels, {with_labels[1]}: where there are labels, {todo}."
