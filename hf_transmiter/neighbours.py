"""Which auxiliary names explain what an adapter changes: by direction for class vectors, by influence for the MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .backbone import DualEncoder
from .features import FeatureTable
from .solvers import standardise


_BLOCK = 4096  # images at a time
_LAYER_NORM_EPS = 1e-5  # of nn.LayerNorm


def nearest(values: Tensor, auxiliary: Sequence[str], count: int) -> list[dict[str, tuple]]:
    """Per class the auxiliary names with the highest positive and the lowest negative values."""
    found, count = [], min(count, len(auxiliary))
    for row in values.cpu():
        sides = {}
        for side, sign in (("towards", 1.0), ("away", -1.0)):
            best = (sign * row).topk(count)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            sides[side] = tuple((auxiliary[i], sign * value) for i, value in pairs if value > 0)
        found.append(sides)
    return found


def directions(class_vectors: Tensor, zero_shot: Tensor, auxiliary: Tensor) -> Tensor:
    """Cosine of the direction in which each class vector moved with each auxiliary name.

    ``m_c = (t̂_c - mean t̂) - (a_c - mean a)`` with t̂ the class vectors at unit length, means over the classes: what
    moves all classes alike changes no prediction. Text embeddings are centred too, they share most of their length.

    Args:
        class_vectors (`Tensor`): T (C, d). zero_shot (`Tensor`): a (C, d), unit rows.
        auxiliary (`Tensor`): (A, d) unit text embeddings.

    Returns:
        `Tensor`: (C, A) in [-1, 1]; 0 for a class that did not move.
    """
    moved, start = (v - v.mean(0) for v in (normalize(class_vectors.float(), dim=-1), zero_shot.float()))
    text = auxiliary.float().to(moved.device)
    move = moved - start
    move[move.norm(dim=1) < 1e-5 * start.norm(dim=1).clamp(min=1)] = 0  # rounding has no direction
    return normalize(move, dim=-1) @ normalize(text - text.mean(0), dim=-1).T


def auxiliary_effects(table: FeatureTable, tensors: dict[str, Tensor], classes: int, encoder: DualEncoder) -> Tensor:
    """How the published adapter's change of each class depends on each auxiliary logit.

    ``E_cj = σ_j · mean_n ∂δ_c(z_n) / ∂z_nj``, minus the mean over c, with ``δ(z) = MLP(LN(z Wᵀ)) W`` the change of the
    standardised logits and σ_j the standard deviation of z_j over the images: how far class c rises above the others
    when auxiliary logit j is one standard deviation higher. For a linear δ these are its standardised coefficients.

    The mean of the Jacobians has a closed form. With ``ĥ = (h - mean h) / s``, ``u = Up(γ ∘ ĥ + β)``, ``g = GELU'(u)``

    ``mean_n J_n = M [diag(mean g/s) Up_γ (1 - 11ᵀ/D) - mean(((g/s) ∘ Up_γ ĥ) ĥᵀ) / D] W``, ``M = W_taskᵀ Down``,
    ``Up_γ = Up diag(γ)``: one pass over all images, no class-by-class gradients.

    Args:
        table (`FeatureTable`): N images. tensors (`dict[str, Tensor]`): weights of the adapter.
        classes (`int`): C. encoder (`DualEncoder`): the model.

    Returns:
        `Tensor`: (C, A).
    """
    basis, anchors, gamma = tensors["basis"], tensors["anchors"], tensors["norm.weight"]
    width = len(basis)
    up = tensors["up.weight"] * gamma
    shift = tensors["up.weight"] @ tensors["norm.bias"] + tensors["up.bias"]
    slope, outer = torch.zeros_like(up[:, 0]), torch.zeros_like(up)
    total, squares = (torch.zeros(len(anchors), dtype=torch.float64) for _ in range(2))
    for x in table.batches(_BLOCK):
        z = standardise(encoder.logits(x.to(anchors.device), anchors))[0].to(basis.dtype)
        h = z @ basis.T
        spread = (h.var(1, unbiased=False, keepdim=True) + _LAYER_NORM_EPS).sqrt()
        h = (h - h.mean(1, keepdim=True)) / spread
        product = h @ up.T
        u = product + shift
        normal = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
        g = (0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * normal) / spread
        slope += g.sum(0)
        outer += (g * product).T @ h
        total += z.double().sum(0).cpu()
        squares += z.double().square().sum(0).cpu()
    count = len(table)
    inner = slope[:, None] * (up - up.mean(1, keepdim=True)) - outer / width
    jacobian = (tensors["down.weight"].T @ basis[:, :classes]).T @ inner @ basis / count
    std = (squares / count - (total / count).square()).clamp(min=0).sqrt()
    effects = jacobian.cpu()[:, classes:] * std[classes:].float()
    return effects - effects.mean(0)
