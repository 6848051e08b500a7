"""What is minimised when a dual encoder is tuned on labelled images."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def near_zero_shot(logits: Tensor, zero_shot: Tensor) -> Tensor:
    """``KL(q ‖ p)``, mean over images: how far the tuned posterior ``p`` has moved from the zero-shot one ``q``.

    Args:
        logits (`Tensor`): (B, C) of the model in training, scale included.
        zero_shot (`Tensor`): (B, C) of the frozen model on the same images, scale included.

    Source: the zero-shot teacher of Zhu et al., "Prompt-aligned Gradient for Prompt Tuning" (arXiv 2205.14865), at
    temperature 1.
    """
    return kl_div(logits.log_softmax(-1), zero_shot.log_softmax(-1), reduction="batchmean", log_target=True)


def classification_loss(logits: Tensor, labels: Tensor, zero_shot: Tensor, keep_near: float) -> Tensor:
    """``CE(logits, labels) + keep_near · KL(zero-shot ‖ tuned)``, mean over images.

    Args:
        logits (`Tensor`): (B, C) of the model in training, scale included.
        labels (`Tensor`): (B,) class indices.
        zero_shot (`Tensor`): (B, C), scale included.
        keep_near (`float`): weight of the pull.
    """
    return cross_entropy(logits, labels) + keep_near * near_zero_shot(logits, zero_shot)
