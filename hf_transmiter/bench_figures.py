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
    figure = _figure(8.4, max(4.6, 1.2 + 0.21 * len(scores)), title)
    axes = figure.add_subplot()
    for i, (method, (base, novel)) in enumerate(scores.items()):
        style = {"color": _COLORS[i % 7], "marker": _MARKERS[(i // 7) % 7], "s": 34}
        axes.scatter(base, novel, **style, edgecolors="white", linewidths=0.5, zorder=3, label=method)
    axes.margins(0.12)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    right, top = min(right, 101), min(top, 101)
    x, y = np.meshgrid(np.linspace(max(left, 0.1), right, 200), np.linspace(max(bottom, 0.1), top, 200))
    lines = axes.contour(x, y, 2 * x * y / (x + y), levels=6, colors="#BBBBBB", linewidths=0.8, zorder=1)
    axes.clabel(lines, fmt="%g", fontsize=7)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="accuracy among base classes (%)", ylabel="accuracy among novel classes (%)")
    axes.set_title("grey: equal harmonic mean", fontsize=8, color="#777777")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7.5)
    return _save(figure, path)
