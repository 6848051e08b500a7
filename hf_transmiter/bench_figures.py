"""The figure of base-to-novel benches, in the style of `figures`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .figures import _COLORS, _MARKERS, _drawn, _figure, _finite, _save


@_drawn
def base_novel_figure(
    scores: Mapping[str, tuple[float, float]], path: str | os.PathLike, *, title: str
) -> Path | None:
    """Accuracy among the base classes against that among the novel ones, a point per method; lines join what has the
    same harmonic mean.

    Args:
        scores (`Mapping[str, tuple[float, float]]`): (base, novel) in percent by method.
        path (`str` or `os.PathLike`): PNG to write; its folder is made. Atomic.

    Returns:
        `Path`: of the PNG; `None` without matplotlib.

    Raises:
        ValueError: no method, or a value that is not finite.
    """
    if not scores:
        raise ValueError("there is no method to draw.")
    for method, pair in scores.items():
        _finite(pair, f"accuracies of {method}")
    figure = _figure(8.6, max(4.8, 1.2 + 0.21 * len(scores)), title)
    axes = figure.add_subplot()
    for i, (method, (base, novel)) in enumerate(scores.items()):
        # The later the smaller and the further in front, so that equal scores do not hide each other.
        size = 110 - 80 * i / max(1, len(scores) - 1)
        style = {"facecolors": "none", "edgecolors": _COLORS[i % 7], "marker": _MARKERS[(i + i // 7) % 7]}
        axes.scatter(base, novel, s=size, linewidths=1.5, zorder=3 + i, **style, label=method)
    axes.margins(0.12)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    (left, right), (bottom, top) = (max(left, 0), min(right, 101)), (max(bottom, 0), min(top, 101))
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    lines = axes.contour(x, y, 2 * x * y / (x + y + 1e-9), levels=6, colors="#BBBBBB", linewidths=0.8, zorder=1)
    axes.clabel(lines, fmt="%g", fontsize=7)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="accuracy among base classes (%)", ylabel="accuracy among novel classes (%)")
    axes.set_title("grey: equal harmonic mean", fontsize=8, color="#777777")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7.5)
    return _save(figure, path)
