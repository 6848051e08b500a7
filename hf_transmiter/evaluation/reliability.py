"""How far a classifier's confidence can be believed, and the temperature that mends it without labels.

Confidence of an image is its largest probability. A classifier is calibrated where, among the images it is c percent
sure about, it is right in c percent. Temperature scaling divides all logits by one number: predictions stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


_STEPS = 200  # of the search for the temperature; Newton needs about ten


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
    logits = _checked(logits, labels)
    if bins < 1:
        raise ValueError(f"there must be at least one bin, got bins={bins}.")
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


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature by which logits must be divided to say most nearly what a target says.

    T = argmin_T Σ_n KL(target_n ‖ softmax(z_n / T))

    Convex in β = 1 / T, with derivative Σ_n (E_softmax(β z_n)[z_n] - E_target_n[z_n]); solved by Newton steps on β
    kept inside a shrinking bracket, in float64. With one-hot labels it is the temperature scaling of Guo et al. (arXiv
    1706.04599). With a tuned weak model's probabilities, or its predictions as one-hot labels, on unlabelled images no
    label is needed; but then it calibrates to that model, not to the truth. Measured (`tests/studies`,
    `calibration.py`), the predictions are the better target and mend much where both are about equally right, and do
    harm where the upgraded model is much better than the tuned one, or both make the same mistakes.

    Args:
        logits (`Tensor`): (N, C).
        target (`Tensor`): (N, C) probabilities, rows sum to 1.

    Returns:
        `float`: T > 0; above 1 the logits were too sure of themselves (as seen from the target), below 1 too unsure.

    Raises:
        ValueError: shapes do not fit, no image, one class only, values that are not finite, rows of the target that
            are not probabilities, or no temperature is best: the target is no more likely on classes with high logits
            (T would be infinite), or certain of the highest logit in every image (T would be 0).
    """
    z = _checked(logits, target)
    if target.shape != logits.shape:
        raise ValueError(
            f"logits and target must both be (N, C), got {tuple(logits.shape)} and {tuple(target.shape)}."
        )
    target = target.to(z)
    sums = target.sum(1)
    if not torch.isfinite(target).all() or target.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), 1e-3):
        raise ValueError("the rows of target must be probabilities: none negative, sum 1. Apply softmax to logits.")
    z = z - z.max(1, keepdim=True).values
    scale = float(z.abs().mean())  # the search is then the same for logits in any unit
    if not scale:
        raise ValueError("no temperature is best: every image's logits are equal for all classes.")
    z = z / scale
    wanted = float((target * z).sum(1).mean())

    def slope(beta: float) -> tuple[float, float]:
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        return float(mean.mean()) - wanted, float(((p * z * z).sum(1) - mean**2).mean())

    if slope(0.0)[0] >= 0:
        raise ValueError(
            "no temperature is best: the target gives classes with high logits no more than the others get. "
            "Are the columns of logits and target the same classes?"
        )
    if wanted >= -1e-9:  # in units of the logits' mean distance from the highest
        raise ValueError("no temperature is best: the target is certain of the highest logit in every image.")
    return scale / _root(slope)


def _root(slope) -> float:
    """Where an increasing function, given with its derivative, crosses 0 on the positive axis."""
    low, high, beta = 0.0, float("inf"), 1.0
    for _ in range(_STEPS):
        value, curvature = slope(beta)
        low, high = (beta, high) if value < 0 else (low, beta)
        step = beta - value / curvature if curvature > 0 else float("inf")
        if not low < step < high:
            step = 2 * beta if high == float("inf") else (low + high) / 2
        if abs(step - beta) <= 1e-12 * beta:
            break
        beta = min(step, 4 * beta)  # a flat curve would throw a Newton step far out
    return beta


def _checked(logits: Tensor, other: Tensor) -> Tensor:
    """Logits (N, C) in float64, as many rows as `other`."""
    if logits.ndim != 2 or len(logits) != len(other):
        raise ValueError(f"logits must be (N, C) on {len(other)} images, got {tuple(logits.shape)}.")
    if not len(logits) or logits.shape[1] < 2:
        raise ValueError(f"there must be an image and two classes at least, got logits {tuple(logits.shape)}.")
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite.")
    return logits.detach().double()
