"""[`Score`]: one number of a method. Its mean and spread over seeds, a markdown table, a JSON file."""

from __future__ import annotations

import itertools
import logging
import math
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .checks import check_json, load_json, printable
from .files import write_json


logger = logging.getLogger(__name__)

THIS = "this model"
"""Method of the rows in ``scores.json`` that are about the artefact itself; the others are what it is compared to."""
NOTHING = "–"
_MARKS = "†‡§¶"
_LOWEST = ("ece", "calibration gap")  # metrics whose best value is the lowest
_UNRANKED = ("agreement", "confidence")  # and those that have no best
_OPTIONAL = ("dataset", "num_images")  # left out where they are not known


@dataclass(frozen=True)
class Score:
    """One number. `value` in percent; `std` over seeds (0 with one); `seconds` of making the method, without
    embedding the images, which all methods share; `dataset` (Hub id, ``id@revision`` too, or ``sandbox:NAME``) and
    `num_images` say what it was scored on."""

    method: str
    split: str
    metric: str
    value: float
    std: float = 0.0
    seconds: float | None = None
    seeds: int = 1
    dataset: str | None = None
    num_images: int | None = None


def aggregate(runs: Sequence[Sequence[Score]]) -> list[Score]:
    """Mean and sample standard deviation over seeds, row by row in the order of first appearance."""
    rows: dict[tuple, list[Score]] = {}
    for scores in runs:
        for score in scores:
            rows.setdefault((score.method, score.split, score.metric), []).append(score)

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    return [
        replace(
            same[0],
            value=statistics.fmean(s.value for s in same),
            std=statistics.stdev([s.value for s in same]) if len(same) > 1 else 0.0,
            seconds=mean(s.seconds for s in same),
            seeds=len(same),
        )
        for same in rows.values()
    ]


def markdown_table(
    scores: Sequence[Score],
    *,
    baseline: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """Markdown, ending in a newline: a row per method, a column per split and metric, then what the method cost.

    Rows and columns keep the order of first appearance. The best value of a column (of a calibration error the lowest;
    confidence and agreement have none) is bold, all of them if they tie as printed; a method with a note has an
    advantage (a ceiling, labels, the weak model at run time), so it is marked and never bold. Seconds are means over
    the method's rows, and left out if none is known.

    Args:
        scores (`Sequence[Score]`): at most one per method, split and metric, see [`aggregate`].
        baseline (`str`, *optional*): method whose distance, in points, is printed in brackets for all others.
        notes (`Mapping[str, str]`, *optional*): footnote of a method; equal notes share a symbol.

    Raises:
        ValueError: no scores, two scores for one cell, or a baseline that has no score.
    """
    cells = _cells(scores)
    methods = list(dict.fromkeys(score.method for score in scores))
    if baseline is not None and baseline not in methods:
        raise ValueError(f"the baseline {baseline!r} has no score; the methods are {methods}.")
    splits, metrics = (dict.fromkeys(getattr(score, key) for score in scores) for key in ("split", "metric"))
    columns = [pair for pair in itertools.product(splits, metrics) if pair in {cell[1:] for cell in cells}]

    notes = {method: text for method, text in (notes or {}).items() if method in methods}
    marks = {text: _MARKS[i % 4] * (1 + i // 4) for i, text in enumerate(dict.fromkeys(notes.values()))}
    body = [[cell_text(method) + (" " + marks[notes[method]] if method in notes else "") for method in methods]]
    for split, metric in columns:
        body.append(column({m: cells.get((m, split, metric)) for m in methods}, baseline, notes, metric))
    header = ["method", *(cell_text(f"{split} {metric_title(metric)}") for split, metric in columns)]
    costs = [mean_seconds(scores, method) for method in methods]
    if set(costs) != {NOTHING}:
        header.append("seconds")
        body.append(costs)
    return table(header, zip(*body, strict=True)) + "\n\n" + _legend(scores, baseline, marks)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown: the first column to the left, the others to the right."""
    lines = [header, [":---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(scores: Sequence[Score]) -> dict[tuple[str, str, str], Score]:
    if not scores:
        raise ValueError("there is no score to show.")
    cells = {}
    for score in scores:
        key = (score.method, score.split, score.metric)
        if key in cells:
            raise ValueError(f"two scores for {' / '.join(key)}: pass runs of several seeds through aggregate first.")
        cells[key] = score
    return cells


def _known(score: Score | None) -> bool:
    return score is not None and not math.isnan(score.value)


def shown(value: float | None, form: str = ".1f") -> str:
    """As a cell of a table; a dash where there is none."""
    return NOTHING if value is None else format(value, form)


def column(
    scores: Mapping[str, Score | None], baseline: str | None, notes: Collection[str], metric: str, digits: int = 1
) -> list[str]:
    """Cells of one metric, the best of the methods without a note in bold."""
    # Rounded as printed: what looks the same is marked the same.
    fair = {method: round(s.value, digits) for method, s in scores.items() if _known(s) and method not in notes}
    choose = min if metric in _LOWEST else max
    best = choose(fair.values()) if len(fair) > 1 and metric not in _UNRANKED else None
    base = scores.get(baseline)
    texts = []
    for method, score in scores.items():
        if not _known(score):
            texts.append(NOTHING)
            continue
        text = f"{score.value:.{digits}f}" + (f" ± {score.std:.{digits}f}" if score.seeds > 1 else "")
        if fair.get(method) == best is not None:
            text = f"**{text}**"
        if _known(base) and method != baseline:
            text += f" ({score.value - base.value:+.1f})"
        texts.append(text)
    return texts


def mean_seconds(scores: Sequence[Score], method: str) -> str:
    values = [score.seconds for score in scores if score.method == method]
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return NOTHING
    value = statistics.fmean(values)
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _legend(scores: Sequence[Score], baseline: str | None, marks: Mapping[str, str]) -> str:
    seeds = sorted({score.seeds for score in scores if score.seeds > 1})
    text = "Values in percent"
    if seeds:
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        text += f", ± standard deviation over {count} seeds"
    if baseline is not None:
        text += f"; in brackets, points above or below {baseline}"
    text += "; bold: best of the methods without a mark." if marks else "; bold: best of its column."
    return text + "\n" + "".join(f"\n{mark} {note}\n" for note, mark in marks.items())


def metric_title(metric: str) -> str:
    return "ECE" if metric == "ece" else metric


def cell_text(text: str) -> str:
    """In a table, on a terminal or a page: one line that ends no cell, begins no tag and turns no writing round."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def write_scores(path: str | os.PathLike, scores: Sequence[Score]) -> None:
    """Writes a JSON list, one object per score; an unknown value (NaN) becomes null. Atomic; a file that is there
    already is replaced, which is logged.

    Raises:
        ValueError: a field that [`read_scores`] would refuse.
    """
    rows = []
    for score in scores:
        row = asdict(score) | {key: None for key in ("value", "std") if math.isnan(getattr(score, key))}
        rows.append({key: value for key, value in row.items() if key not in _OPTIONAL or value is not None})
    check_json(rows, "scores", "the scores")
    if Path(path).exists():
        logger.info("%s is replaced.", path)
    write_json(path, rows, "scores")


def read_scores(path: str | os.PathLike) -> list[Score]:
    """Reads what [`write_scores`] wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, too large, not a list of objects, a key missing or unknown, a value of the wrong kind.
    """
    rows = load_json(path)
    if isinstance(rows, list):  # earlier files have memory, too
        rows = [{k: v for k, v in row.items() if k != "peak_mb"} if isinstance(row, dict) else row for row in rows]
    check_json(rows, "scores", str(path))
    return [Score(**row | {key: math.nan for key in ("value", "std") if row[key] is None}) for row in rows]
