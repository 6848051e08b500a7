"""How far a classifier's confidence can be believed.

Confidence of an image is its largest probability. A classifier is calibrated where, among the images it is c percent
sure about, it is right in c percent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reliability(NamedTuple):
    """What [`reliability_bins`] finds: (M,) each, from the least to the most confident bin.

    Args:
        confidence, accuracy (`Tensor`): mean confidence and share of right predictions in [0, 1]; NaN in an empty bin.
        count (`Tensor`): images per bin.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """See [`expected_calibration_error`]."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num()
        return 100 * float((gaps * self.count).sum() / self.count.sum())


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """
    Raises:
        ValueError: these are no logits (N, C) and labels (N,) in [0, C), or there is no image.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits must be (N, C) and labels (N,) on the same images, got {shapes}.")
    if not len(labels):
        raise ValueError("there is no image to score.")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must lie in [0, {logits.shape[1]}), found {int(labels.min())}..{int(labels.max())}.")


def reliability_bins(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence and accuracy of images of about the same confidence, the points of a reliability diagram.

    Bin m of M holds the images with confidence in ((m - 1) / M, m / M].

    Args:
        logits (`Tensor`): (N, C).
        labels (`Tensor`): (N,) in [0, C); another model's predictions give the gap to that model instead.
        bins (`int`, *optional*, defaults to 15): M.

    Raises:
        ValueError: as [`check_labels`]; fewer than two classes, logits that are not finite, or no bin.
    """
    check_labels(logits, labels)
    if logits.shape[1] < 2:
        raise ValueError("there must be two classes at least.")
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite.")
    if bins < 1:
        raise ValueError(f"there must be at least one bin, got bins={bins}.")
    logits = logits.detach().double()
    confidence, predicted = logits.softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)[1:-1]
    rows = torch.bucketize(confidence, edges)  # edges[m - 1] < confidence <= edges[m]
    count = torch.bincount(rows, minlength=bins)
    hits = (predicted == labels.to(logits.device)).double()
    sums = [torch.bincount(rows, weights=what, minlength=bins) for what in (confidence, hits)]
    return Reliability(*(total.div(count).cpu() for total in sums), count.cpu())


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean gap between accuracy and confidence, in percent (Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599).

    ECE = 100 Σ_m (|B_m| / N) |accuracy(B_m) - confidence(B_m)|, B_m the bins of [`reliability_bins`], which says what
    goes in and what is refused.
    """
    return reliability_bins(logits, labels, bins).error
