"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) in single precision.

`torch.optim.Muon` orthogonalises in bfloat16, which most CPUs emulate: there it takes five times as long as the rest
of a training step. This one works in float32, on all matrices of a shape at once.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """About ``U V^T`` of every ``M = U S V^T``, by five Newton-Schulz steps ``M <- a M + (b A + c A^2) M, A = M M^T``.

    Args:
        matrices (`Tensor`): shape `(N, rows, columns)`.

    Returns:
        `Tensor`: the same shape; singular values between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    m = matrices.mT if tall else matrices
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = m @ m.mT
        m = a * m + (b * gram + c * gram @ gram) @ m
    return m.mT if tall else m


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, for matrices.

    ``W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) orthogonalize(momentum)``; the factor gives updates the root
    mean square of AdamW's (Liu et al., 2025, arXiv 2502.16982).

    Args:
        params (`Iterable`): matrices, or groups of them.
        lr (`float`): the learning rate.
        momentum (`float`, *optional*, defaults to 0.95): of the running mean of the gradients.
        weight_decay (`float`, *optional*, defaults to 0.05): decoupled weight decay.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            momentum, by_shape = group["momentum"], defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                    mean.lerp_(matrix.grad, 1 - momentum)
                    by_shape[matrix.shape].append((matrix, matrix.grad.lerp(mean, momentum)))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                for (matrix, _), update in zip(pairs, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(update, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)
