"""What a transfer has to beat: every cheap alternative a practitioner has, on the same embeddings and scored alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from .training import FitConfig, fit


def emulated_fine_tuning(strong: Tensor, tuned: Tensor, weak: Tensor, alpha: float = 1.0) -> Tensor:
    """``z_strong + α (z_tuned - z_weak)`` (EFT, Mitchell et al., arXiv 2310.12962): needs the weak model and its tuned
    version for every prediction.

    Args:
        strong, tuned, weak (`Tensor`): task logits (N, C), scale included.
        alpha (`float`, *optional*, defaults to 1.0): strength of the change.
    """
    return strong + alpha * (tuned - weak)


def logit_ensemble(strong: Tensor, tuned: Tensor) -> Tensor:
    """Sum of log-probabilities (N, C) of the strong and the tuned weak model; needs both for every prediction."""
    return strong.log_softmax(1) + tuned.log_softmax(1)


def linear_head(
    x: Tensor, target: Tensor, zero_shot: Tensor, scale: float, config: FitConfig | None = None, progress: bool = True
) -> Tensor:
    """Unit class vectors fitted by cross-entropy on ``s · x Tᵀ``, from the zero-shot ones.

    With labels (N,) as `target` this is a linear probe, with a teacher's probabilities (N, C) its distillation.

    Args:
        x (`Tensor`): (N, d) unit image embeddings.
        target (`Tensor`): labels (N,) or probabilities (N, C).
        zero_shot (`Tensor`): (C, d) unit text embeddings.
        scale (`float`): s.
        config (`FitConfig`, *optional*): settings; 30 epochs of AdamW at 2e-3 without decay when omitted.

    Returns:
        `Tensor`: T (C, d), unit rows.
    """
    config = config or FitConfig(epochs=30, lr=2e-3, weight_decay=0.0)
    vectors = nn.Parameter(zero_shot.clone())

    def step(rows: Tensor, generator: torch.Generator) -> Tensor:
        return cross_entropy(scale * x[rows] @ normalize(vectors, dim=-1).T, target[rows])

    fit([vectors], step, len(x), config, description="Linear head", progress=progress)
    return normalize(vectors.detach(), dim=-1)
