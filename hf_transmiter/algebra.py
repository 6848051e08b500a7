"""The algebra of the method as pure functions of tensors: no models, no files, no gradients.

Shapes: N images, K anchors, C task classes, d embedding width. Sums are kept in float64, one row block at a time, so
memory does not grow with N, and every sum can be added up over processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from .settings import LAMBDAS


ORTHOGONALITY = 5e-3  # entries of the Gram matrix may be off by this much: bfloat16 rounds to 2⁻⁹
FEWEST = 30  # images that tell anything about an accuracy
EPS = 1e-6  # of the published standardisation (arXiv 2508.08604, section 3)


def check_finite(rows: Tensor, what: str) -> Tensor:
    """Returns `rows` (N, ...) unchanged, or a vector or number.

    Raises:
        ValueError: a value is NaN or infinite; the message names the first such row.
    """
    finite = torch.isfinite(rows.detach())
    bad = ~(finite.flatten(1).all(1) if rows.ndim > 1 else finite.all().reshape(1))
    if bad.any() and len(bad) == 1:
        raise ValueError(f"{what} hold NaN or infinite values: they are damaged; load or make them anew.")
    if bad.any():
        raise ValueError(
            f"{what} hold NaN or infinite values, first in row {int(bad.nonzero()[0])} (in {int(bad.sum())} rows); "
            "look at that image, or compute in float32 if the model runs in half precision."
        )
    return rows


def check_weights(tensors: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        ValueError: a value of one of the floating-point tensors is NaN or infinite; `what` says whose they are, with
            the tensor's name in place of ``{}``.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta:
            check_finite(tensor.reshape(-1), what.replace("{}", name))


def check_unit(rows: Tensor, what: str, whose, first: int = 0) -> Tensor:
    """Returns embeddings (N, d) that were divided by their length, unchanged; `first` is the number of the first one.

    Raises:
        ValueError: one is no unit row: NaN, or zero because its length was infinite or nothing. The message names it.
    """
    bad = ~((rows.float().norm(dim=-1) - 1).abs() < 0.1)
    if bad.any():
        raise ValueError(
            f"{whose}: the {what} embedding of row {first + int(bad.nonzero()[0])} is not finite, or zero: look at "
            f"that {what}, compute in float32 if the model runs in half precision, or load the model anew."
        )
    return rows


def check_semi_orthogonal(matrix: Tensor, what: str, *, full_rank: bool = False) -> Tensor:
    """Returns `matrix` M (m, k) unchanged.

    ``G = MᵀM`` (or ``MMᵀ``, whichever is smaller) must be a projection, ``GG = G``: M keeps lengths or maps to zero.
    With `full_rank`, ``G = 1``: it keeps all of them.

    Raises:
        ValueError: it is not, by more than the rounding of half precision (`ORTHOGONALITY`).
    """
    m = matrix.detach().double()
    gram = m.T @ m if m.shape[1] <= m.shape[0] else m @ m.T
    target = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) if full_rank else gram @ gram
    if not torch.allclose(gram, target, rtol=0, atol=ORTHOGONALITY):
        raise ValueError(f"{what} is not orthogonal; the file was changed or damaged.")
    return matrix


def standardise(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z = (logits - mean) / (std + 1e-6)`` per image, unbiased std (arXiv 2508.08604, section 3).

    Returns:
        `z` (N, K), and `std` + 1e-6 (N, 1) and `mean` (N, 1) which undo it: ``logits = z * std + mean``.
    """
    mean = logits.mean(-1, keepdim=True)
    std = logits.std(-1, keepdim=True) + EPS
    return (logits - mean) / std, std, mean


def polar(moment: Tensor, rank_tolerance: float = 0.0) -> Tensor:
    """The orthogonal factor of ``moment = U S Vᵀ``: ``argmax_Q tr(Qᵀ moment)`` = ``U Vᵀ`` (orthogonal Procrustes).

    Args:
        moment (`Tensor`): (m, n) float64.
        rank_tolerance (`float`, *optional*, defaults to 0.0):
            Directions with a singular value below this share of the largest are mapped to zero instead of to an
            arbitrary direction: with fewer images than dimensions nothing is known about them.

    Returns:
        `Q` (m, n), a (partial) isometry.
    """
    u, s, vh = torch.linalg.svd(moment, full_matrices=False)
    keep = s > rank_tolerance * s[0] if rank_tolerance else torch.ones_like(s, dtype=torch.bool)
    return u[:, keep] @ vh[keep]


def total(partial: Tensor, accelerator) -> Tensor:
    """The sum of a tensor over all processes, on the CPU; the tensor as it is where there is one."""
    if accelerator is None or accelerator.num_processes == 1:
        return partial
    return accelerator.reduce(partial.to(accelerator.device), "sum").cpu()


@dataclass
class PairSums:
    """``n, Σx, Σy, Σxxᵀ, Σxyᵀ`` of paired rows x (d) and y (C), in float64: all that a centred ridge and a linear
    discriminant need. Memory is d² + dC, whatever N; sums add up over blocks and over processes."""

    n: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def zeros(cls, d: int, c: int) -> Self:
        """A name tells the shape: `x` is (d,), `xy` is (d, c)."""
        size = {"x": d, "y": c}
        shapes = {one.name: [size[letter] for letter in one.name] for one in fields(cls) if one.name != "n"}
        return cls(n=0.0, **{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})

    @classmethod
    def of(cls, blocks: Iterable[tuple[Tensor, Tensor]], d: int, c: int, accelerator=None) -> Self:
        """Of the blocks of all processes.

        Raises:
            ValueError: fewer than two rows.
        """
        sums = cls.zeros(d, c)
        for x, y in blocks:
            sums.update(x, y)
        sums.reduce(accelerator)
        if sums.n < 2:
            raise ValueError(f"a fit needs at least two images, got {int(sums.n)}.")
        return sums

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a block: x (B, d) and y (B, C)."""
        x, y = x.double(), y.double()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def __sub__(self, part: Self) -> Self:
        """The sums without the rows of `part`."""
        return type(self)(*(getattr(self, field.name) - getattr(part, field.name) for field in fields(self)))

    def standardised(self) -> tuple[Self, Tensor, Tensor]:
        """The sums of ``(x - μ) / σ`` and y, with μ and σ (d); a direction that never varies has σ = 1."""
        mean = self.x / self.n
        covariance = self.xx / self.n - torch.outer(mean, mean)
        std = covariance.diagonal().clamp(min=0).sqrt()
        std = torch.where(std > EPS * std.max(), std, 1.0)
        xx = self.n * covariance / torch.outer(std, std)
        xy = (self.xy - torch.outer(mean, self.y)) / std[:, None]
        return PairSums(self.n, torch.zeros_like(mean), self.y, xx, xy), mean, std

    def reduce(self, accelerator) -> Self:
        """Adds the sums of all processes up, in place; every process ends with the total. Returns `self`."""
        for name, value in vars(self).items():
            found = total(torch.as_tensor(value, dtype=torch.float64), accelerator)
            setattr(self, name, found if found.ndim else found.item())
        return self


@dataclass
class RidgeSolution:
    """``y ≈ x @ weight + bias``; `lam` is the chosen penalty in units of the mean eigenvalue of the centred Gram
    matrix, `errors` the mean squared leave-one-out error of each candidate."""

    weight: Tensor
    bias: Tensor
    lam: float
    errors: dict[float, float]


def ridge(
    blocks: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    prior: Tensor,
    lambdas: Sequence[float] = LAMBDAS,
    accelerator=None,
) -> RidgeSolution:
    """Ridge regression around a prior, the penalty chosen by leave-one-out error in closed form.

    ``argmin_{W,b} Σ‖xW + b - y‖² + λ·ē·‖W - prior‖²`` with ē the mean eigenvalue of the centred Gram matrix.
    Leaving image i out changes its residual to ``r_i / (1 - h_i)`` with the leverage
    ``h_i = 1/n + x̃ᵢᵀ (G + λē)⁻¹ x̃ᵢ``, so one more pass over the blocks scores every λ without a refit.

    Args:
        blocks: called twice (once with a single λ), yields x (B, d) and y (B, C).
        prior (`Tensor`): (d, C), where infinite λ ends.
        lambdas: candidates; with one, no second pass is made.
        accelerator (`Accelerator`, *optional*): sums are added up over processes, each with its own blocks.

    Raises:
        ValueError: fewer than two rows, or a value that is not finite.
    """
    prior = prior.double()
    checked = ((check_finite(x, "the embeddings"), check_finite(y, "the targets")) for x, y in blocks())
    sums = PairSums.of(((x, y.double() - x.double() @ prior) for x, y in checked), *prior.shape, accelerator)
    mean_x, mean_y = sums.x / sums.n, sums.y / sums.n
    gram = sums.xx - sums.n * torch.outer(mean_x, mean_x)
    moment = sums.xy - sums.n * torch.outer(mean_x, mean_y)
    eig, vec = torch.linalg.eigh(gram)
    eig, rotated = eig.clamp(min=0), vec.T @ moment
    unit = eig.mean().clamp(min=torch.finfo(torch.float64).tiny)
    weights = {lam: rotated / (eig + lam * unit)[:, None] for lam in lambdas}
    errors: dict[float, float] = {}
    if len(weights) > 1:
        squares = torch.zeros(len(weights) + 1, dtype=torch.float64)
        for x, y in blocks():
            p = (x.double() - mean_x) @ vec
            target = y.double() - x.double() @ prior - mean_y
            for i, (lam, weight) in enumerate(weights.items()):
                leverage = 1 / sums.n + (p**2 / (eig + lam * unit)).sum(1, keepdim=True)
                squares[i] += ((target - p @ weight) / (1 - leverage).clamp(min=1e-6)).square().sum()
            squares[-1] += target.numel()
        squares = total(squares, accelerator)
        errors = {lam: float(squares[i] / squares[-1]) for i, lam in enumerate(weights)}
    lam = min(errors, key=errors.__getitem__) if errors else next(iter(weights))
    delta = vec @ weights[lam]
    return RidgeSolution((prior + delta).float(), (mean_y - mean_x @ delta).float(), float(lam), errors)


def discriminant(sums: PairSums, shrinkage: float | None = None, pseudo_count: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis with soft labels and one shared covariance, in closed form.

    ``w_c = Σ⁻¹ (μ_c - μ)`` and ``b_c = -½ (μ_c + μ)ᵀ w_c``, the logits of Gaussian classes with means μ_c and
    covariance Σ, up to a constant per image. Σ is the within-class covariance plus `shrinkage` times its mean
    variance; class means are shrunk to the grand mean μ by `pseudo_count` images, so that a class that (almost) no
    image belongs to gets (almost) no weight instead of a wild one.

    Args:
        sums (`PairSums`): of N embeddings x (d) and soft labels y (C) that sum to one.
        shrinkage (`float`, *optional*):
            ``d / (N - 1)``, at least 0.3 and at most 1, when omitted: the fewer images, the less of Σ is known.

    Returns:
        weight (C, d) and bias (C,), float32.
    """
    mean = sums.x / sums.n
    mass, weighted = sums.y, sums.xy.T  # Σq (C,) and Σ q xᵀ (C, d)
    means = weighted / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    within = (sums.xx - (means.T * mass) @ means) / sums.n
    d = len(mean)
    if shrinkage is None:
        shrinkage = min(max(d / (sums.n - 1), 0.3), 1.0)
    covariance = within + shrinkage * within.trace() / d * torch.eye(d, dtype=torch.float64)
    offset = (weighted - mass[:, None] * mean) / (mass + pseudo_count)[:, None]
    weight = torch.linalg.solve(covariance, offset.T).T
    bias = -((offset / 2 + mean) * weight).sum(1)
    return weight.float(), bias.float()


def discriminant_head(
    blocks: Callable[[], Iterable[tuple[Tensor, Tensor]]], prior: Tensor, shrinkage: float, accelerator=None
) -> Tensor:
    """A discriminant of soft labels and a head known beforehand, each in units of its own spread over classes.

    ``W / σ_W + T / σ_T`` with W from [`discriminant`] of ``q = softmax(label logits)`` and σ the root mean square of
    the logits minus their mean over classes. Two passes of streamed sums.

    Args:
        blocks: called twice, yields x (B, d) and label logits (B, C).
        prior (`Tensor`): T (C, d).
        shrinkage (`float`), accelerator: as in [`discriminant`] and [`ridge`].

    Returns:
        Class vectors (C, d).

    Raises:
        ValueError: fewer than two images, or a value that is not finite.
    """
    checked = ((check_finite(x, "the embeddings"), check_finite(z, "the label logits")) for x, z in blocks())
    sums = PairSums.of(((x, logits.softmax(1)) for x, logits in checked), prior.shape[1], len(prior), accelerator)
    weight, bias = discriminant(sums, shrinkage)
    squares = torch.zeros(2, dtype=torch.float64)
    for x, _ in blocks():
        squares += torch.stack([deviation(z).square().sum() for z in (x @ weight.T + bias, x @ prior.T)])
    fitted, known = (total(squares, accelerator) / (sums.n * len(prior))).clamp(min=1e-12).sqrt().tolist()
    return weight / fitted + prior / known


def deviation(logits: Tensor) -> Tensor:
    """Logits (N, C) minus their mean over classes, in float64: all that a softmax sees of them."""
    return (logits - logits.mean(1, keepdim=True)).double()


def spread(logits: Tensor) -> float:
    """Root mean square of the [`deviation`], over images and classes."""
    return float(deviation(logits).square().mean().clamp(min=1e-24).sqrt())


def class_pull(logits: Tensor, rounds: int = 50) -> Tensor:
    """The classes' unequal pull ``log β`` (C,) on label logits L (N, C): ``softmax(L - log β)`` are even labels.

    β is the fixed point of ``β = P β``, with ``P_jk`` the mean probability of class j over the images that are
    labelled k: how often each class is answered whatever is asked (Frolic, arXiv 2410.19294, section 3). It assumes
    that the images hold all classes about equally often.
    """
    classes, said = logits.shape[1], logits.argmax(1)
    confused = torch.zeros(classes, classes, dtype=torch.float64)
    for block, answers in zip(logits.split(4096), said.split(4096), strict=True):
        confused.index_add_(0, answers, block.double().softmax(1))
    confused = (confused / said.bincount(minlength=classes).clamp(min=1)[:, None]).T
    beta = torch.full((classes,), 1 / classes, dtype=torch.float64)
    for _ in range(rounds):
        beta = confused @ beta
        beta = beta / beta.sum().clamp(min=1e-12)
    return beta.clamp(min=EPS).log().to(logits.dtype)


def coverage(labels) -> float:
    """How many of the C classes N images hold, as a share of how many as many images of equally frequent classes
    would: ``exp(H(q̄)) / (C (1 - e^(-N/C)))`` with q̄ the mean of the soft labels (N, C), a tensor or by blocks of
    rows, and H its entropy."""
    count, classes = labels.shape
    mean = sum(labels[start : start + 4096].double().sum(0) for start in range(0, count, 4096)) / count
    held = torch.special.entr(mean).sum().exp()
    return float(held) / (classes * -math.expm1(-count / classes))


def divergence(labels: Tensor, logits: Tensor) -> float:
    """``KL(q ‖ softmax(z))``, mean over images, of soft labels q (N, C) and logits z (N, C)."""
    return float(torch.nn.functional.kl_div(logits.double().log_softmax(1), labels.double(), reduction="batchmean"))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The factor τ > 0 with the smallest ``KL(q ‖ softmax(τ z))`` to soft labels q (N, C), by Newton's method on the
    convex function of τ.

    The slope is ``Σ ⟨p - q, z⟩`` and the curvature the variance of z under p.
    """
    z, q, factor = deviation(logits), labels.double(), 1 / spread(logits)
    for _ in range(100):
        p = (factor * z).softmax(1)
        mean = (p * z).sum(1)
        slope, curvature = (mean - (q * z).sum(1)).mean(), ((p * z.square()).sum(1) - mean.square()).mean()
        new = min(max(factor - float(slope / curvature.clamp(min=1e-12)), factor / 2), factor * 2)
        if abs(new - factor) < 1e-9 * factor:
            break
        factor = new
    return factor


def guessing(accuracy: float, count: int, classes: int) -> float | None:
    """What guessing among C classes would score, 100 / C, where an accuracy (all in percent) on N images is not above
    that by two standard errors, ``√(p (1 - p) / N)``; `None` where it is, and of too few images to tell."""
    chance = 1 / max(classes, 1)
    error = (chance * (1 - chance) / max(count, 1)) ** 0.5
    return 100 * chance if count >= FEWEST and classes > 1 and accuracy <= 100 * (chance + 2 * error) else None
