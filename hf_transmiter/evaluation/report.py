"""A comparison as one table, and reports: sections of text and figures (drawn by `figures`).

What writes one makes the directory if need be, replaces its files one by one, atomically, and returns the path of
`report.md`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..hub.checks import printable
from ..hub.files import replace_file, write_json
from ..hub.scores import NOTHING, cell_text, column, mean_seconds, metric_title, table
from . import figures
from .analyse import AFTER, BEFORE, Knowledge, markdown
from .methods import CONTROL, LABELS, NEEDS, STRONG


if TYPE_CHECKING:
    from .compare import Comparison

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """One part of a report: heading, markdown, figures.

    Figures are PNG files inside the report's directory, as the functions of `figures` return them: `None`, one that
    could not be drawn, is left out, and so is a section that holds nothing else.
    """

    title: str
    text: str = ""
    figures: Sequence[Path | None] = ()


def comparison_table(found: Comparison) -> str:
    """What `compare` found as markdown: a row per method with its scores, what making it cost, the bytes to be stored
    for it, whether any class names can be asked, and what it needs. Rows that could not be had follow, and why.

    Bold as in [`markdown_table`]: methods that need labels, or strong, tuned and weak model at run time, are never.
    """
    columns = {"method": list(map(cell_text, found.rows))}
    for metric in dict.fromkeys(score.metric for score in found.scores):
        scores = {name: row.scores.get(metric) for name, row in found.rows.items()}
        columns[cell_text(metric_title(metric))] = column(scores, None, found.notes, metric)
    columns["seconds"] = [mean_seconds(found.scores, row) for row in found.rows]
    columns["size"] = [_size(row.size) for row in found.rows.values()]
    said = {True: "yes", False: "no", None: NOTHING}
    columns["any class names"] = [said[row.open_names] for row in found.rows.values()]
    for need in NEEDS:
        columns[need] = ["yes" if need in row.needs else "no" for row in found.rows.values()]
    left_out = "".join(f"- {cell_text(method)}: {cell_text(reason)}\n" for method, reason in found.skipped.items())
    shown = table(list(columns), zip(*columns.values(), strict=True)) + "\n\n" + _TABLE_LEGEND if found.rows else ""
    return shown + (f"\nNot in the table:\n\n{left_out}" if left_out else "")


_TABLE_LEGEND = (
    "Scores in percent; seconds of making it, without embedding the images; size: what is stored beside the "
    "pre-trained models; bold: best of the methods that need neither labels nor several models at run time.\n"
)


def _size(count: int | None) -> str:
    if count is None:
        return NOTHING
    if count < 1e6:
        return f"{count / 1e3:.0f} kB" if count else "0"
    return f"{count / 1e6:.1f} MB"


def write_report(directory: str | os.PathLike, sections: Sequence[Section], *, title: str, intro: str = "") -> Path:
    """Writes `report.md`: `title`, `intro` and the sections, with relative links to figures. Replacing one is logged.

    Raises:
        ValueError: a figure outside the directory.
    """
    directory = Path(directory)
    parts = [f"# {title}", intro.strip()]
    for section in sections:
        shown = [section.text.strip()]
        for figure in filter(None, section.figures):
            link = quote(figure.relative_to(directory).as_posix())
            shown.append(f"![{figure.stem.replace('_', ' ')}]({link})")
        parts += [f"## {section.title}", *shown] if any(shown) else []
    path = directory / "report.md"
    text = printable("\n\n".join(filter(None, parts))) + "\n"
    if path.exists():
        logger.info("%s is replaced.", path)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def draw_ways(path: str | os.PathLike, found: Comparison, *, title: str) -> Path | None:
    """The figure of every upgrade without labels, see [`figures.ways`]; `None` where there is none."""
    metric, ylabel = _measure(found)
    lines = {row: found.value(row, metric) for row in (STRONG, "tuned weak") if row in found.rows}
    free = {}
    for name, row in found.rows.items():
        if name not in (*lines, "zero-shot weak") and LABELS not in row.needs and row.note != CONTROL:
            score = row.scores[metric]
            free[name] = figures.Way(score.value, score.seconds or 0.0, row.models, bool(row.open_names))
    if not free:
        return None
    return figures.ways(free, path, title=title, ylabel=ylabel, reference=lines, best=found.recommended)


def _measure(found: Comparison) -> tuple[str, str]:
    """What is compared, and how an axis says it."""
    if found.labels is None:
        return "agreement", "agreement with the tuned weak model (%)"
    return "accuracy", "accuracy (%)"


def write_comparison(directory: str | os.PathLike, found: Comparison, *, title: str) -> Path:
    """Writes `report.md`, `comparison.json` and `figures/` of what `compare` found: the scores of all rows and, with
    labels, how far confidence can be believed."""
    directory, drawn = Path(directory), []
    metric, label = _measure(found)
    lines = {row: found.value(row, metric) for row in (STRONG, "tuned weak") if row in found.rows}
    drawn.append(draw_ways(directory / "figures" / "ways.png", found, title=f"Which way to upgrade: {title}"))
    values = {row: [found.value(row, metric)] for row in found.rows if row not in lines}
    if values:
        path = directory / "figures" / "methods.png"
        drawn.append(figures.bars(values, path, title=title, xlabel=label, reference=lines))
    if found.labels is not None:
        shown = [row for row in (*lines, found.recommended) if row in found.rows] or found.rows
        answers, path = {row: found.rows[row].logits for row in shown}, directory / "figures" / "reliability.png"
        drawn.append(figures.reliability_figure(answers, found.labels, path, title=title))
    write_json(directory / "comparison.json", found.to_dict())
    section = Section("Comparison", f"{found.advice}\n\n{comparison_table(found)}", figures=drawn)
    return write_report(directory, [section], title=title)


def write_analysis(directory: str | os.PathLike, found: Knowledge, *, title: str) -> Path:
    """Writes `report.md`, `analysis.json` (every class) and `figures/` of what `analyse` found."""
    directory = Path(directory)
    folder = directory / "figures"
    drawn = [figures.shift_figure(found, folder / "shifts.png")]
    if found.labels is not None:
        pair, path = (found.logits[BEFORE], found.logits[AFTER]), folder / "confusions.png"
        about = {"title": "With the adapter, against zero-shot"}
        drawn.append(figures.confusion_change(*pair, found.labels, found.class_names, path, **about))
        about, path = {"title": "How far confidence can be believed"}, folder / "reliability.png"
        drawn.append(figures.reliability_figure(found.logits, found.labels, path, **about))
    write_json(directory / "analysis.json", found.to_dict())
    return write_report(directory, [Section("Figures", figures=drawn)], title=title, intro=markdown(found))
