"""Figures of the study of prompt learners across an upgrade of the base model, in the style of `figures`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_transmiter.evaluation.drift import LayerDrift
from hf_transmiter.evaluation.figures import _COLORS, _MARKERS, _drawn, _figure, _legend, _save, curves


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = "#A6CEE8"


@_drawn
def drift_figure(
    parameters: Sequence[LayerDrift] | None,
    features: Sequence[LayerDrift],
    path: str | os.PathLike,
    *,
    title: str = "What the upgrade changed in the text tower",
) -> Path | None:
    """Change of weights and of hidden states, part by part: bars for its size, a line for its share of the old size.

    Where old and new have no common coordinates (other widths or depths), the line shows the similarity instead.

    Args:
        parameters (`Sequence[LayerDrift]` or `None`): of [`parameter_drift`]; without, there is one panel.
        features (`Sequence[LayerDrift]`): of [`feature_drift`].
        path (`str` or `os.PathLike`): PNG to write; its folder is made. Atomic.

    Returns:
        `Path`: of the PNG; `None` without matplotlib.

    Raises:
        ValueError: no rows.
    """
    panels = [("Parameters", "root mean square change per parameter", parameters)] if parameters is not None else []
    panels.append(("Hidden states", "mean distance old to new", features))
    if not all(rows for *_, rows in panels):
        raise ValueError("there is no part of a text tower to draw.")
    widths = [1.8 + max(2.4, 0.19 * len(rows)) for *_, rows in panels]
    figure = _figure(max(5.0, sum(widths)), 4.0, title)
    for axes, (name, label, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(name)
        axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=90 if len(rows) > 12 else 40)
        if len(rows) <= 12:
            for tick in axes.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", length=0, labelsize=7.5)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        if any(row.absolute is None for row in rows):
            _line(axes, [row.similarity for row in rows], "similarity (linear CKA)", _COLORS[2])
            axes.set_ylim(0, 1.05)
        else:
            axes.bar(range(len(rows)), [row.absolute for row in rows], width=0.7, color=_BAR)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(label, color=_COLORS[0])
            right = axes.twinx()
            _line(right, [_percent(row.relative) for row in rows], "relative change (%)", _COLORS[1])
            right.spines["right"].set_visible(True)
            right.set_ylim(0, 1.08 * right.get_ylim()[1])
    return _save(figure, path)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _line(axes: Axes, values: Sequence[float | None], label: str, color: str) -> None:
    values = [np.nan if value is None else value for value in values]
    axes.plot(range(len(values)), values, color=color, marker="o", markersize=4, linewidth=1.4)
    axes.set_ylabel(label, color=color)


def layer_study_figure(
    scores: Mapping[str, Sequence[tuple[int, float, float]]],
    path: str | os.PathLike,
    floors: Mapping[str, float] | None = None,
    *,
    title: str = "Where a prompt is learnt, and what it is worth after the upgrade",
) -> Path | None:
    """Accuracy against the layer of the text tower at which the prompt was learnt, one line per model.

    Args:
        scores (`Mapping[str, Sequence[tuple]]`): points (layer, mean, std) in percent, by model.
        path (`str` or `os.PathLike`): PNG to write; its folder is made. Atomic.
        floors (`Mapping[str, float]`, *optional*): accuracies without a prompt, as dashed lines.

    Returns:
        `Path`: of the PNG; `None` without matplotlib.

    Raises:
        ValueError: as [`curves`].
    """
    xlabel = "layer the prompt was learnt at"
    return curves(scores, path, title=title, xlabel=xlabel, xscale="linear", reference=floors)


@_drawn
def context_length_figure(
    scores: Mapping[str, Sequence[tuple[int, float, float]]],
    path: str | os.PathLike,
    *,
    title: str = "Length of the context",
) -> Path | None:
    """Harmonic mean of old and upgraded accuracy against the number of context vectors M, one line per method.

    Args:
        scores (`Mapping[str, Sequence[tuple]]`): points (M, mean, std) in percent, by method.
        path (`str` or `os.PathLike`): PNG to write; its folder is made. Atomic.

    Returns:
        `Path`: of the PNG; `None` without matplotlib.

    Raises:
        ValueError: no method.
    """
    if not scores:
        raise ValueError("there is no method to draw.")
    figure = _figure(6.4, 4.4, title)
    axes = figure.add_subplot()
    for i, (method, points) in enumerate(scores.items()):
        x, y, std = np.array(sorted(points), dtype=float).T
        apart = 1 + 0.025 * (i - (len(scores) - 1) / 2)  # so that error bars do not hide each other
        style = {"color": _COLORS[i % 7], "marker": _MARKERS[(i + i // 7) % 7], "linestyle": "-" if i < 7 else "--"}
        axes.errorbar(x * apart, y, std, **style, markersize=4.5, linewidth=1.6, capsize=2.5, label=method)
    ticks = sorted({point[0] for points in scores.values() for point in points})
    axes.set(xscale="log", xlabel="context vectors M", ylabel="harmonic mean of old and upgraded (%)")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    _legend(figure, axes)
    return _save(figure, path)
