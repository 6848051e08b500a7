"""`compare`: what upgrading is worth on one's own pictures."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import hf_transmiter as ht

from ..settings import SEED, SHOTS, check_choice, check_number
from .options import (
    LABELLED,
    TEST,
    UNLABELLED,
    DataOptions,
    Images,
    ModelOptions,
    NameOptions,
    Result,
    RunOptions,
    Seen,
    Strong,
    Teacher,
    Weak,
    expert,
)
from .output import OutputOptions


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

RETUNE = ("lora", "teacher")


def compare(
    weak: Weak,
    strong: Strong,
    teacher: Teacher,
    dataset: Images,
    data: DataOptions,
    names: NameOptions,
    models: ModelOptions,
    run: RunOptions,
    unlabelled: Annotated[str | None, "Unlabelled pictures of the task, from any source."] = None,
    labelled: Annotated[str | None, "Labelled pictures, for what needs labels."] = None,
    shots: Annotated[int, expert("Labelled pictures per class.")] = SHOTS,
    seed: Annotated[int, expert("Seed of the draw of labelled pictures.")] = 0,
    general: Annotated[str | None, expert("Any pictures, not the task's, for a general bridge.")] = None,
    bridge: Annotated[str | None, "A finished bridge: file, folder or Hub id."] = None,
    tuned_strong: Annotated[
        str | None, expert("The strong model tuned on labels, as a ceiling; tuned here if unset.")
    ] = None,
    retune: Annotated[str, expert("How it is tuned here: 'lora', or 'teacher', as the weak model was.")] = "lora",
    seen_classes: Seen = None,
    methods: Annotated[
        list[str] | None, "A row of the table: 'refit', or 'refit: {solver: ridge}'; may be repeated; all if unset."
    ] = None,
    vocabulary: Annotated[
        str | None, expert("Names beside the classes: a shipped list, or a file; common nouns if unset.")
    ] = None,
    min_gain: Annotated[
        float | None, "Exit with 1 where upgrading gains fewer points of accuracy than this over zero-shot strong."
    ] = None,
    gate: Annotated[str | None, "The row that --min-gain is about; the recommended one if unset."] = None,
    output_dir: Annotated[Path | None, "Folder for report.md, comparison.json, figures."] = None,
    overwrite: Annotated[bool, "Replace an existing report."] = False,
) -> Result:
    """Every way to upgrade and every cheap alternative on one task, in one table, the verdict first.

    Without labels the table has agreement with the tuned weak model, confidence and calibration instead of accuracy.

    [bold]Example:[/bold] hf-transmiter compare --weak sandbox:weak --strong sandbox:strong --teacher out/tuned --dataset sandbox:print --unlabelled sandbox:print
    """  # noqa: E501
    output = None if output_dir is None else OutputOptions(output_dir, overwrite)
    if output is not None:
        output.check(run, "comparison")
    check_choice("retune", retune, RETUNE)
    if labelled is None and (shots, seed, retune) != (SHOTS, 0, RETUNE[0]):
        raise ValueError("shots, seed and retune are about labelled pictures: pass --labelled, too.")
    if tuned_strong is not None and retune != RETUNE[0]:
        raise ValueError("retune says how the strong model is tuned here: leave it out, or tuned_strong.")
    for name, value, least in (("shots", shots, {"least": 1}), ("seed", seed, SEED)):
        check_number(name, value, **least)
    if min_gain is not None:
        check_number("min_gain", min_gain, float)
    if gate is not None and min_gain is None:
        raise ValueError("--gate says which row --min-gain is about: pass --min-gain, too.")
    if gate is not None and ht.Variant.of(gate).method in (ht.STRONG, *ht.WEAK_ALONE):
        what = "cannot gain over itself" if gate == ht.STRONG else "is no upgrade"
        raise ValueError(f"{gate} {what}: pass the row of an upgrade as --gate.")
    rows = _rows(methods, min_gain, gate)
    test = data.load(dataset, TEST, data.split)
    if min_gain is not None and ht.guess_columns(test, **data.columns, pictures=False)[1] is None:
        raise ValueError(
            "--min-gain compares accuracies, and the test pictures have no labels: pass a labelled --dataset (a "
            "subfolder per class, or a label column), or leave --min-gain out and read the agreement."
        )
    few = _few_shot(data.load(labelled, LABELLED), test, data, shots, seed)
    options = models.load(run)
    encoder, target = ht.load_encoder(weak, **options), ht.load_encoder(strong, **options)
    found = ht.compare(
        encoder,
        target,
        ht.load_teacher(teacher, encoder),
        test,
        unlabelled=data.load(unlabelled, UNLABELLED),
        labelled=few,
        general=data.load(general, UNLABELLED),
        tuned_strong=None if tuned_strong is None else ht.load_teacher(tuned_strong, target),
        tuning=ht.tuning_of(teacher) if retune == "teacher" else None,
        bridge=None if bridge is None else ht.Bridge.from_pretrained(bridge),
        class_names=ht.read_names(names.class_names),
        seen_classes=ht.read_names(seen_classes),
        templates=ht.teacher_templates(teacher, names.template, ht.usual_templates(dataset)),
        variants=rows,
        vocabulary=vocabulary,
        split=str(test.split),
        **data.embedding(run),
    )
    result = Result(found.to_dict(), f"{found.advice}\n\n{ht.comparison_table(found)}".rstrip())
    if not found.rows:
        result.failed = "no row could be had; the reasons are above."
    if min_gain is not None:
        _judge(result, found, min_gain, found.recommended if gate is None else ht.Variant.of(gate).name)
    if output is not None and found.rows:
        title = "{} to {} on {}".format(*map(ht.public_name, (weak, strong, dataset)))
        output.write(lambda folder: ht.write_comparison(folder, found, title=title), None, run)
    return result


def _rows(methods: Sequence[str] | None, min_gain: float | None, gate: str | None):
    """The rows asked for, with those that the gate looks at."""
    asked = [*(methods or ht.METHODS), ht.STRONG if min_gain is not None else None, gate]
    return list({row.name: row for row in map(ht.Variant.of, filter(None, asked))}.values())


def _few_shot(images: Dataset | None, test: Dataset, data: DataOptions, shots: int, seed: int) -> Dataset | None:
    """`shots` labelled pictures of each class, `None` without pictures."""
    if images is None:
        return None
    _, label = ht.guess_columns(images, **data.columns, pictures=False)
    if label is None:
        raise ValueError(f"the labelled pictures have no labels; their columns are {', '.join(images.column_names)}.")
    if images._fingerprint == test._fingerprint:
        raise ValueError(
            "the labelled pictures are the test pictures: what learns from them would be scored on what it saw. Pass "
            "others, or a dataset with a train and a test split."
        )
    labels = images[label][:]  # at once: one by one takes a minute for a million
    drawn = ht.few_shot(labels, shots, seed, allow_fewer=True)
    names = getattr(images.features[label], "names", None)
    counts = Counter(labels[row] for row in drawn)
    short = [names[kind] if names else str(kind) for kind, count in counts.items() if count < shots]
    if short:
        logger.warning(
            "%d of %d classes have fewer than %d labelled pictures, first %r: all that they have are taken.",
            len(short), len(counts), shots, short[0],
        )  # fmt: skip
    return images.select(drawn)


def _judge(result: Result, found: ht.Comparison, min_gain: float, gate: str) -> None:
    """Notes in the result whether a row gains enough over the zero-shot strong model, which cannot itself."""
    if gate == ht.STRONG:
        result.failed = "--min-gain finds no gain: the strong model as it is is recommended; --gate names another row."
        return
    missing = next((row for row in (gate, ht.STRONG) if row not in found.rows), None)
    if missing is not None:
        reason = found.skipped.get(missing, "it is not among --methods")
        result.failed = f"--min-gain has nothing to look at: no row {missing!r} ({reason})."
        return
    gain, own, before = found.value(gate) - found.value(ht.STRONG), found.value(gate), found.value(ht.STRONG)
    said = f"{gate} gains {gain:+.1f} points over {ht.STRONG} ({own:.1f} against {before:.1f})"
    result.data["gate"] = {"method": gate, "gain": gain, "min_gain": min_gain, "passed": gain >= min_gain}
    result.text += f"\nGate: {said}; {min_gain:g} are asked for."
    if not gain >= min_gain:
        result.failed = f"{said}, fewer than the {min_gain:g} of --min-gain."
