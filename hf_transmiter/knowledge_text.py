"""[`markdown`]: what `knowledge.analyse` found, in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .knowledge import COSINE, EFFECT, ClassChange, Knowledge
from .scores import NOTHING, cell_text, table


_MEASURES = {
    COSINE: (
        "Auxiliary names whose text embedding points where the class vector moved (cosine in brackets). They say "
        "something where the class moved and the model knows the names."
    ),
    EFFECT: (
        "Auxiliary names whose logit raises the class (how far, in units of the standardised logits, when the name's "
        "logit is one standard deviation higher)."
    ),
}


def markdown(found: Knowledge, count: int = 10) -> str:
    """Sections of a report, headings of the second level, tables of at most `count` rows.

    Args:
        found (`Knowledge`): of `analyse`.
        count (`int`, *optional*, defaults to 10): rows per table.

    Returns:
        `str`: markdown, ending in a newline.
    """
    parts = [_summary(found), "## Confidence", _confidence(found)]
    parts += ["## Classes that changed most", _classes(found.changed_most(count))]
    if found.labels is None:
        parts += ["## Changed predictions", _moves(found, count)]
    else:
        parts += ["## Confusions that came and went", _confusions(found, count)]
    names = _neighbours(found, count)
    if names:
        parts += ["## What the changes look like", _MEASURES[found.measure], names]
    return "\n\n".join(parts) + "\n"


def _summary(found: Knowledge) -> str:
    share = f"{found.changed} of {found.num_images} predictions changed ({_share(found.changed, found.num_images)})"
    if found.labels is None:
        text = f"{share}. The images have no labels, so whether for better or worse is not known."
    else:
        elsewhere = found.changed - found.corrected - found.broken
        text = f"{share}: {found.corrected} corrected, {found.broken} broken, {elsewhere} wrong before and after."
    if found.agreement is not None:
        text += f" The tuned model predicts the same on {found.agreement:.1f} %."
    return text


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _confidence(found: Knowledge) -> str:
    rows = [
        (row.name, _number(row.accuracy), _number(row.confidence), _number(row.calibration_error))
        for row in found.confidence
    ]
    made = _table(("", "accuracy", "mean confidence", "calibration error"), rows)
    note = f"{made}\n\nPercent. Temperature without labels: {found.temperature_note}."
    if found.temperature is not None:
        note += (
            " It makes the adapter about as sure as the tuned model agrees with it, which is how often it is right "
            "where the two are about equally good: check it on a few labels before dividing logits by it."
        )
    return note


def _classes(changes: Sequence[ClassChange]) -> str:
    labelled = any(change.images is not None for change in changes)
    header = ["class", "mean probability (points)", "mean logit", "predicted before", "after"]
    header += ["images", "accuracy before", "after"] if labelled else []
    rows = []
    for change in changes:
        row = [change.name, f"{change.probability_shift:+.2f}", f"{change.logit_shift:+.2f}"]
        row += [f"{change.share_before:.1f} %", f"{change.share_after:.1f} %"]
        row += [change.images, _number(change.accuracy_before), _number(change.accuracy_after)] if labelled else []
        rows.append(row)
    return _table(header, rows)


def _moves(found: Knowledge, count: int) -> str:
    if not found.moves:
        return "None."
    return _table(("before", "after", "images"), found.moves[:count])


def _confusions(found: Knowledge, count: int) -> str:
    if not found.confusions:
        return "None."
    rows = [(c.source, c.target, c.before, c.after, f"{c.after - c.before:+d}") for c in found.confusions[:count]]
    return _table(("true class", "predicted", "before", "after", "change"), rows)


def _neighbours(found: Knowledge, count: int) -> str:
    digits = 2 if found.measure == COSINE else 3

    def listed(pairs: Iterable[tuple[str, float]]) -> str:
        return ", ".join(f"{name} ({value:+.{digits}f})" for name, value in pairs)

    rows = [(change.name, listed(change.towards), listed(change.away)) for change in found.changed_most(count)]
    if not any(towards for _, towards, _ in rows):
        return ""
    return _table(("class", "towards", "away from"), rows)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    return table(header, ([cell_text(str(value)) for value in row] for row in rows))
