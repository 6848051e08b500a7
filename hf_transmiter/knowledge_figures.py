"""Figures of what `knowledge.analyse` found, in the style of `figures`, and [`write_analysis`], which puts them beside
the text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .figures import (
    _COLORS,
    _DASHES,
    _GAIN,
    _LOSS,
    _MARKERS,
    _drawn,
    _figure,
    _legend,
    _save,
    confusion_change,
    picture_grid,
)
from .files import replace_file
from .image_sources import guess_columns
from .knowledge import AFTER, BEFORE, COSINE, EFFECT, Knowledge
from .knowledge_text import markdown
from .reliability import Reliability, reliability_bins


if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 40  # classes in a figure; of more, those that changed most
EXAMPLES = 10
_REPORT, _JSON = "analysis.md", "analysis.json"
_DIGITS = {COSINE: 2, EFFECT: 3}
_XLABELS = {
    COSINE: "cosine of the class vector's move with the name",
    EFFECT: "rise of the class (standardised) when the name's logit is one standard deviation higher",
}


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


@_drawn
def shift_figure(found: Knowledge, path: str | os.PathLike, *, title: str = "What the adapter prefers") -> Path | None:
    """Change of every class's mean probability; beside it the share of images predicted as it, before and after.

    Args:
        found (`Knowledge`): of `analyse`. Of more than 40 classes, those whose probability changed most are drawn.
        path (`str` or `os.PathLike`): PNG to write; its folder is made. Atomic.

    Returns:
        `Path`: of the PNG; `None` without matplotlib.
    """
    rows = sorted(found.classes, key=lambda change: -abs(change.probability_shift))[:ROWS]
    rows.sort(key=lambda change: -change.probability_shift)
    if len(rows) < len(found.classes):
        title += f": the {len(rows)} of {len(found.classes)} classes that changed most"
    figure = _figure(7.6, 1.6 + 0.19 * len(rows), title)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
    shifts = [change.probability_shift for change in rows]
    places = range(len(rows))
    left.barh(places, shifts, height=0.7, color=[_GAIN if shift > 0 else _LOSS for shift in shifts])
    left.axvline(0, color="#555555", linewidth=0.8)
    left.set_yticks(places, [_short(change.name) for change in rows], fontsize=7.5)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlabel("change of mean probability (points)")
    before, after = [change.share_before for change in rows], [change.share_after for change in rows]
    right.hlines(places, before, after, color="#BBBBBB", linewidth=1.4, zorder=1)
    right.scatter(before, places, s=18, facecolors="white", edgecolors="#555555", zorder=2, label="before (zero-shot)")
    right.scatter(after, places, s=18, color=_COLORS[0], zorder=3, label="with the adapter")
    right.set_xlim(left=-0.03 * max(*before, *after, 1e-9))
    right.set_xlabel("predicted as this class (% of images)")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.7)
        axes.set_axisbelow(True)
    _legend(figure, right)
    return _save(figure, path)


@_drawn
def reliability_figure(
    logits: Mapping[str, Tensor], labels: Tensor, path: str | os.PathLike, *, title: str, bins: int = 15
) -> Path | None:
    """Accuracy against confidence, a line per classifier, and how many images lie at which confidence.

    On the diagonal confidence is right; below it the classifier is too sure, above it not sure enough. A bin with less
    than 1 % of the images is left out of the line, it says too little.

    Args:
        logits (`Mapping[str, Tensor]`): (N, C) by the classifier's name, all on the same images.
        labels (`Tensor`): (N,).
        path (`str` or `os.PathLike`): PNG to write; its folder is made. Atomic.
        bins (`int`, *optional*, defaults to 15): of equal width.

    Returns:
        `Path`: of the PNG; `None` without matplotlib.

    Raises:
        ValueError: nothing to draw, or as `reliability.reliability_bins`.
    """
    if not logits:
        raise ValueError("there is no classifier to draw.")
    found: dict[str, Reliability] = {name: reliability_bins(z, labels, bins) for name, z in logits.items()}
    figure = _figure(5.6, 6.6, title)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle=_DASHES[0])
    edges = np.linspace(0, 100, bins + 1)
    for i, (name, bin_) in enumerate(found.items()):
        kept = (bin_.count >= 0.01 * bin_.count.sum()) & (bin_.count > 0)
        style = {"color": _COLORS[i % 7], "marker": _MARKERS[(i + i // 7) % 7], "markersize": 4.5, "linewidth": 1.6}
        line = 100 * bin_.confidence[kept], 100 * bin_.accuracy[kept]
        top.plot(*line, **style, label=f"{name} (calibration error {bin_.error:.1f} %)")
        share = 100 * bin_.count / bin_.count.sum()
        bottom.stairs(share.numpy(), edges, color=_COLORS[i % 7], linewidth=1.5, linestyle=("-", *_DASHES)[i % 5])
    top.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
    for place, text in (((2, 97), "not sure enough"), ((98, 3), "too sure")):
        right = text == "too sure"
        top.text(*place, text, ha="right" if right else "left", va="bottom" if right else "top", color="#777777")
    bottom.set(xlabel="confidence (%)", ylabel="images (%)")
    for axes in (top, bottom):
        axes.grid(color="#E5E5E5", linewidth=0.7)
        axes.set_axisbelow(True)
    _legend(figure, top)
    return _save(figure, path)


@_drawn
def neighbour_figure(
    found: Knowledge, path: str | os.PathLike, *, title: str = "Auxiliary names of what changed", count: int = 12
) -> Path | None:
    """Table of the auxiliary names that each of the most changed classes moved towards, the stronger the darker.

    Args:
        found (`Knowledge`): of `analyse`, with auxiliary names.
        path (`str` or `os.PathLike`): PNG to write; its folder is made. Atomic.
        count (`int`, *optional*, defaults to 12): classes.

    Returns:
        `Path`: of the PNG; `None` without matplotlib.

    Raises:
        ValueError: no class has auxiliary names.
    """
    rows = [change for change in found.changed_most(count) if change.towards]
    if not rows:
        raise ValueError("no class has auxiliary names to show: the adapter changes nothing, or has none.")
    columns = max(len(change.towards) for change in rows)
    values = np.full((len(rows), columns), np.nan)
    for i, change in enumerate(rows):
        values[i, : len(change.towards)] = [value for _, value in change.towards]
    figure = _figure(2.4 + 1.55 * columns, 1.3 + 0.34 * len(rows), title)
    axes = figure.add_subplot()
    limit = float(np.nanmax(values))
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * limit, aspect="auto")  # text stays readable on the darkest
    for i, change in enumerate(rows):
        for j, (name, value) in enumerate(change.towards):
            text = f"{_short(name, 24)}\n{value:.{_DIGITS[found.measure]}f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=6.8)
    axes.set_yticks(range(len(rows)), [_short(change.name) for change in rows], fontsize=8)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(_XLABELS[found.measure])
    return _save(figure, path)


def example_figures(found: Knowledge, dataset: Dataset, folder: Path, image_column: str | None = None) -> list[Path]:
    """Pictures that the adapter corrected and broke, the surest first; without labels, those it predicts otherwise.

    Args:
        found (`Knowledge`): of `analyse` on `dataset`.
        dataset (`datasets.Dataset`): the images.
        folder (`Path`): for `corrected.png` and `broken.png`, or `changed.png`.
        image_column (`str`, *optional*): guessed when omitted.

    Returns:
        `list[Path]`: of the PNGs that there was something to show in.
    """
    column, _ = guess_columns(dataset, image_column)
    was, now = (found.logits[name].argmax(1) for name in (BEFORE, AFTER))
    sets = {"changed": was != now}
    if found.labels is not None:
        labels = found.labels
        sets = {"corrected": (was != labels) & (now == labels), "broken": (was == labels) & (now != labels)}
    sure = {name: found.logits[name].softmax(1).max(1).values for name in (BEFORE, AFTER)}
    drawn, pictures = [], dataset.with_format(None)
    for name, chosen in sets.items():
        rows = chosen.nonzero()[:, 0]
        rows = rows[sure[AFTER][rows].argsort(descending=True, stable=True)][:EXAMPLES].tolist()
        if rows:
            captions = [_caption(found, row, sure) for row in rows]
            title = f"{name.capitalize()} by the adapter (zero-shot → with it), the surest first"
            images = [pictures[row][column] for row in rows]
            drawn.append(picture_grid(images, captions, folder / f"{name}.png", title=title))
    return [path for path in drawn if path is not None]


def _caption(found: Knowledge, row: int, sure: dict[str, Tensor]) -> str:
    said = [found.class_names[int(found.logits[name][row].argmax())] for name in (BEFORE, AFTER)]
    first, second = (f"{100 * float(sure[name][row]):.0f}\u00a0%" for name in (BEFORE, AFTER))  # stays on one line
    return f"{said[0]} {first}\n→ {said[1]} {second}"


def write_analysis(
    folder: str | os.PathLike,
    found: Knowledge,
    dataset: Dataset,
    *,
    title: str,
    image_column: str | None = None,
    count: int = 10,
) -> Path:
    """Writes `analysis.md`, `analysis.json` (every class) and `figures/`. Files are replaced one by one, atomically.

    Args:
        folder (`str` or `os.PathLike`): made if need be.
        found (`Knowledge`): of `analyse` on `dataset`.
        dataset (`datasets.Dataset`): the images, for the examples.
        title (`str`): heading.
        image_column (`str`, *optional*): guessed when omitted.
        count (`int`, *optional*, defaults to 10): rows per table.

    Returns:
        `Path`: of `analysis.md`.
    """
    folder = Path(folder)
    figures = folder / "figures"
    drawn = [shift_figure(found, figures / "shifts.png")]
    if found.labels is not None:
        pair = found.logits[BEFORE], found.logits[AFTER]
        heading = "With the adapter, against zero-shot"
        path = figures / "confusions.png"
        drawn.append(confusion_change(*pair, found.labels, found.class_names, path, title=heading))
        series = dict(found.logits)
        if found.temperature is not None:
            series[f"{AFTER}, temperature {found.temperature:.2f}"] = found.logits[AFTER] / found.temperature
        path = figures / "reliability.png"
        drawn.append(reliability_figure(series, found.labels, path, title="How far confidence can be believed"))
    if any(change.towards for change in found.changed_most(12)):
        drawn.append(neighbour_figure(found, figures / "neighbours.png"))
    drawn += example_figures(found, dataset, figures, image_column)
    links = [f"![{path.stem}](figures/{path.name})" for path in drawn if path is not None]
    parts = [f"# {title}", markdown(found, count).strip(), *(["## Figures", *links] if links else [])]
    text, values = (
        "\n\n".join(parts) + "\n",
        json.dumps(found.to_dict(), indent=1, ensure_ascii=False, allow_nan=False),
    )
    replace_file(folder / _JSON, lambda temporary: temporary.write_text(values + "\n", encoding="utf-8"))
    replace_file(folder / _REPORT, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder / _REPORT
