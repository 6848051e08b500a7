"""How far a classifier's confidence can be believed.

Confidence of an image is its largest probability. A classifier is calibrated where, among the images it is c percent
sure about, it is right in c percent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reliability(NamedTuple):
    """What [`reliability_bins`] finds, from the least to the most confident bin.

    Args:
        confidence (`Tensor`): (M,) mean confidence in [0, 1] of each bin's images; NaN in an empty bin.
        accuracy (`Tensor`): (M,) share of each bin's images that are predicted right; NaN in an empty bin.
        count (`Tensor`): (M,) images per bin.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error in percent, see [`expected_calibration_error`]."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num()
        return 100 * float((gaps * self.count).sum() / self.count.sum())


def reliability_bins(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence and accuracy of images of about the same confidence, the points of a reliability diagram.

    Bin m of M holds the images with confidence in ((m - 1) / M, m / M].

    Args:
        logits (`Tensor`): (N, C).
        labels (`Tensor`): (N,) in [0, C).
        bins (`int`, *optional*, defaults to 15): M.

    Returns:
        [`Reliability`]

    Raises:
        ValueError: shapes do not fit, no image, logits that are not finite, a label without a column, or no bin.
    """
    if labels.ndim != 1:
        raise ValueError(f"labels must be (N,), one whole number per image; got {tuple(labels.shape)}.")
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"logits must be (N, C) on {len(labels)} images, got {tuple(logits.shape)}.")
    if not len(logits) or logits.shape[1] < 2:
        raise ValueError(f"there must be an image and two classes at least, got logits {tuple(logits.shape)}.")
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite.")
    if bins < 1:
        raise ValueError(f"there must be at least one bin, got bins={bins}.")
    logits = logits.detach().double()
    labels = labels.to(logits.device).long()
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must lie in [0, {logits.shape[1]}), found {int(labels.min())}..{int(labels.max())}.")
    confidence, predicted = logits.softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)[1:-1]
    rows = torch.bucketize(confidence, edges)  # edges[m - 1] < confidence <= edges[m]
    count = torch.bincount(rows, minlength=bins)
    sums = [
        torch.bincount(rows, weights=what, minlength=bins) for what in (confidence, (predicted == labels).double())
    ]
    return Reliability(*(total.div(count).cpu() for total in sums), count.cpu())


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean gap between accuracy and confidence, in percent (Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599).

    ECE = 100 Σ_m (|B_m| / N) |accuracy(B_m) - confidence(B_m)|, B_m the bins of [`reliability_bins`]

    Args:
        logits (`Tensor`): (N, C).
        labels (`Tensor`): (N,) in [0, C); another model's predictions give the gap to that model instead.
        bins (`int`, *optional*, defaults to 15): of equal width.

    Returns:
        `float`: percent; 0 is perfect.

    Raises:
        ValueError: as [`reliability_bins`].
    """
    return reliability_bins(logits, labels, bins).error
