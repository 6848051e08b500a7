"""[`Score`] rows as markdown tables, JSON files and a report with figures (drawn by `figures`)."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from .evaluation import Score
from .files import replace_file
from .trust import check_json, load_json


if TYPE_CHECKING:
    from .comparison import Comparison

logger = logging.getLogger(__name__)

NOTHING = "–"
_MARKS = "†‡§¶"
_LOWEST = ("ece", "calibration gap")  # metrics whose best value is the lowest
_UNRANKED = ("agreement", "confidence")  # and those that have no best
_NEEDS = {
    "labels": "labels",
    "task_images": "task images",
    "backprop": "backprop",
    "weak_at_run_time": "weak model at run time",
}
_OPTIONAL = ("dataset", "num_images")  # not in files of earlier versions; left out where they are not known


@dataclass(frozen=True)
class Section:
    """One part of a report, in this order: heading, text, table, figures.

    Args:
        title (`str`): heading.
        text (`str`, *optional*): markdown.
        scores (`Sequence[Score]`, *optional*): shown by [`markdown_table`].
        figures (`Sequence[Path | None]`, *optional*): PNG files inside the report's directory. What the functions of
            `figures` return can be passed as it is: `None`, a figure that could not be drawn, is left out.
        notes (`Mapping[str, str]`, *optional*), baseline (`str`, *optional*): as in [`markdown_table`].
    """

    title: str
    text: str = ""
    scores: Sequence[Score] = ()
    figures: Sequence[Path | None] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    baseline: str | None = None


def markdown_table(
    scores: Sequence[Score],
    *,
    metrics: Sequence[str] | None = None,
    baseline: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """One row per method, one column per split and metric, then what making the method cost.

    Rows and columns keep the order of first appearance. The best value of a column (of a calibration error the lowest;
    confidence and agreement have none) is bold, all of them if they tie as printed; a method with a note has an
    advantage (a ceiling, labels, the weak model at run time), so it is marked and never bold. Seconds and peak memory
    are means over the method's rows, and left out if none is known.

    Args:
        scores (`Sequence[Score]`): at most one per method, split and metric, see [`aggregate`].
        metrics (`Sequence[str]`, *optional*): which metrics, in this order; all when omitted.
        baseline (`str`, *optional*): method whose distance, in points, is printed in brackets for all others.
        notes (`Mapping[str, str]`, *optional*): footnote of a method; equal notes share a symbol.

    Returns:
        `str`: markdown, ending in a newline.

    Raises:
        ValueError: no scores, two scores for one cell, a metric or baseline that has no score.
    """
    cells = _cells(scores)
    known = list(dict.fromkeys(score.metric for score in scores))
    for metric in metrics or ():
        if metric not in known:
            raise ValueError(f"there is no score {metric!r}; the metrics are {known}.")
    methods = list(dict.fromkeys(score.method for score in scores))
    if baseline is not None and baseline not in methods:
        raise ValueError(f"the baseline {baseline!r} has no score; the methods are {methods}.")
    splits = dict.fromkeys(score.split for score in scores)
    pairs = {(score.split, score.metric) for score in scores}
    columns = [(s, m) for s in splits for m in dict.fromkeys(metrics or known) if (s, m) in pairs]

    notes = {method: text for method, text in (notes or {}).items() if method in methods}
    marks = {text: _MARKS[i % 4] * (1 + i // 4) for i, text in enumerate(dict.fromkeys(notes.values()))}
    body = [[_escape(method) + (" " + marks[notes[method]] if method in notes else "") for method in methods]]
    for split, metric in columns:
        body.append(_column({m: cells.get((m, split, metric)) for m in methods}, baseline, notes, metric))
    header = ["method", *(_escape(f"{split} {_title(metric)}") for split, metric in columns)]
    for name, title in (("seconds", "seconds"), ("peak_mb", "peak MB")):
        costs = [_cost(scores, method, name) for method in methods]
        if set(costs) != {NOTHING}:
            header.append(title)
            body.append(costs)
    return _lines(header, body) + "\n" + _legend([cells[c] for c in cells if c[1:] in columns], baseline, marks)


def comparison_table(found: Comparison) -> str:
    """A comparison for people who have to choose: one row per method with its scores, what making it cost, the bytes
    to be stored for it, and what it needs. Rows that could not be had follow, with the reasons.

    Bold as in [`markdown_table`]: methods that need labels, or strong, tuned and weak model at run time, are never.

    Args:
        found (`Comparison`): what `compare` returned.

    Returns:
        `str`: markdown, ending in a newline.
    """
    methods, header, body = list(found.logits), ["method"], [[_escape(method) for method in found.logits]]
    cells = {(score.method, score.metric): score for score in found.scores}
    for metric in dict.fromkeys(score.metric for score in found.scores):
        header.append(_escape(_title(metric)))
        body.append(_column({m: cells.get((m, metric)) for m in methods}, None, found.notes, metric))
    header += ["seconds", "peak MB", "size", *_NEEDS.values()]
    body += [[_cost(found.scores, method, name) for method in methods] for name in ("seconds", "peak_mb")]
    body.append([_size(found.sizes.get(method)) for method in methods])
    body += [["yes" if getattr(found.needs[method], need) else "no" for method in methods] for need in _NEEDS]
    left_out = "".join(f"- {_escape(method)}: {_escape(reason)}\n" for method, reason in found.skipped.items())
    table = _lines(header, body) + "\n" + _TABLE_LEGEND if methods else ""
    return table + (f"\nNot in the table:\n\n{left_out}" if left_out else "")


_TABLE_LEGEND = (
    "Scores in percent; seconds and memory of making it, without embedding the images; size: what is stored beside "
    "the pre-trained models; bold: best of the methods that need neither labels nor several models at run time.\n"
)


def _size(count: int | None) -> str:
    if count is None:
        return NOTHING
    if count < 1e6:
        return f"{count / 1e3:.0f} kB" if count else "0"
    return f"{count / 1e6:.1f} MB"


def _lines(header: list[str], body: Sequence[Sequence[str]]) -> str:
    """Columns as a markdown table, the first one flush left."""
    lines = [header, [":---"] + ["---:"] * (len(header) - 1), *zip(*body, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def _column(
    scores: Mapping[str, Score | None], baseline: str | None, notes: Mapping[str, str], metric: str
) -> list[str]:
    # Rounded as printed: what looks the same is marked the same.
    fair = {method: round(s.value, 1) for method, s in scores.items() if _known(s) and method not in notes}
    choose = min if metric in _LOWEST else max
    best = choose(fair.values()) if len(fair) > 1 and metric not in _UNRANKED else None
    base = scores.get(baseline)
    texts = []
    for method, score in scores.items():
        if not _known(score):
            texts.append(NOTHING)
            continue
        text = f"{score.value:.1f}" + (f" ± {score.std:.1f}" if score.seeds > 1 else "")
        if fair.get(method) == best is not None:
            text = f"**{text}**"
        if _known(base) and method != baseline:
            text += f" ({score.value - base.value:+.1f})"
        texts.append(text)
    return texts


def _cost(scores: Sequence[Score], method: str, name: str) -> str:
    values = [getattr(score, name) for score in scores if score.method == method]
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return NOTHING
    value = statistics.fmean(values)
    return f"{value:.1f}" if name == "seconds" and value < 100 else f"{value:.0f}"


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


def _title(metric: str) -> str:
    return "ECE" if metric == "ece" else metric


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write_scores(path: str | os.PathLike, scores: Sequence[Score]) -> None:
    """Writes a JSON list, one object per score; an unknown value (NaN) becomes null. Atomic; a file that is there
    already is replaced, which is logged.

    Raises:
        ValueError: a field that [`read_scores`] would refuse.
    """
    rows = []
    for score in scores:
        row = asdict(score)
        row["value"], row["std"] = (None if math.isnan(x) else x for x in (score.value, score.std))
        row = {key: value for key, value in row.items() if key not in _OPTIONAL or value is not None}
        rows.append(row)
    check_json(rows, "scores", "the scores")
    _write(Path(path), json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_scores(path: str | os.PathLike) -> list[Score]:
    """Reads what [`write_scores`] wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, too large, not a list of objects, a key missing or unknown, a value of the wrong kind.
    """
    rows = load_json(path, "scores")
    unknown = [{key: math.nan for key in ("value", "std") if row[key] is None} for row in rows]
    return [Score(**{**row, **nan}) for row, nan in zip(rows, unknown, strict=True)]


def write_report(directory: str | os.PathLike, sections: Sequence[Section], *, title: str, intro: str = "") -> Path:
    """Writes `report.md`: the sections' texts, tables and figures, figures by relative links. Atomic; a report that is
    there already is replaced, which is logged.

    Args:
        directory (`Path`): made if need be; the figures are in it already, by custom under `figures/`.
        sections (`Sequence[Section]`): in order.
        title, intro (`str`): heading and first paragraph.

    Returns:
        `Path`: of `report.md`.

    Raises:
        FileNotFoundError: a figure that does not exist.
        ValueError: a figure outside the directory, or scores that make no table.
    """
    directory = Path(directory)
    parts = [f"# {title}", intro.strip()]
    for section in sections:
        parts += [f"## {section.title}", section.text.strip()]
        if section.scores:
            table = markdown_table(section.scores, baseline=section.baseline, notes=section.notes)
            parts.append(table.strip())
        for figure in section.figures:
            if figure is not None:
                parts.append(f"![{Path(figure).stem.replace('_', ' ')}]({_link(Path(figure), directory)})")
    path = directory / "report.md"
    _write(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _link(figure: Path, directory: Path) -> str:
    if not figure.is_file():
        raise FileNotFoundError(f"the figure {figure} does not exist.")
    try:
        relative = figure.resolve().relative_to(directory.resolve())
    except ValueError:
        raise ValueError(
            f"the figure {figure} is outside {directory}, so the report could not be moved: "
            f"draw it under {directory / 'figures'}."
        ) from None
    return quote(relative.as_posix())


def _write(path: Path, text: str) -> None:
    if path.exists():
        logger.info("%s is replaced.", path)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
