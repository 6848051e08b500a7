"""What is minimised in tuning: cross-entropy to labels, hard or soft, and a pull back to zero-shot."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div


class Answers(NamedTuple):
    """What a model says about a batch.

    Args:
        logits (`Tensor`): (B, C), scale included.
        class_vectors (`Tensor` or `None`): (C, d), unit rows; `None` where every image has its own.
        images (`Tensor`): (B, d), unit rows.
    """

    logits: Tensor
    class_vectors: Tensor | None
    images: Tensor


def kl(tuned: Answers, frozen: Answers) -> Tensor:
    """``KL(q ‖ p)``, mean over images: how far the tuned posterior ``p`` has moved from the zero-shot one ``q``.

    Source: the zero-shot teacher of Zhu et al., "Prompt-aligned Gradient for Prompt Tuning" (arXiv 2205.14865), at
    temperature 1.
    """
    p, q = tuned.logits.log_softmax(-1), frozen.logits.log_softmax(-1)
    return kl_div(p, q, reduction="batchmean", log_target=True)


def cosine(tuned: Answers, frozen: Answers) -> Tensor:
    """``1 - mean_c cos(w_c, w⁰_c)`` between class vectors and their zero-shot versions.

    Source: the published code of Yao et al., KgCoOp (arXiv 2303.13283); the paper writes it as a squared distance.
    """
    return 1 - cosine_similarity(tuned.class_vectors, frozen.class_vectors, dim=-1).mean()


def l2(tuned: Answers, frozen: Answers) -> Tensor:
    """``mean_c ‖w_c - w⁰_c‖²``, for unit vectors twice the cosine's."""
    return (tuned.class_vectors - frozen.class_vectors).square().sum(-1).mean()


def l1(tuned: Answers, frozen: Answers) -> Tensor:
    """Mean over classes and dimensions of ``|w - w⁰|``, the text part of PromptSRC."""
    return (tuned.class_vectors - frozen.class_vectors).abs().mean()


def promptsrc(tuned: Answers, frozen: Answers) -> Tensor:
    """``25 · mean |w - w⁰| + 10 · mean |x - x⁰| + Σ KL(q ‖ p) / (B · C)`` over class vectors, images and predictions.

    Source: Khattak et al. (arXiv 2307.06948), weights and reductions of the published code.
    """
    image = (tuned.images - frozen.images).abs().mean()
    prediction = kl(tuned, frozen) / tuned.logits.shape[-1]
    return 25 * l1(tuned, frozen) + 10 * image + prediction


PULLS = {"kl": kl, "cosine": cosine, "l2": l2, "l1": l1, "promptsrc": promptsrc}


def losses(tuned: Answers, frozen: Answers, labels: Tensor, pull: str) -> tuple[Tensor, Tensor]:
    """Cross-entropy ``CE(z, y)``, mean over images, of labels (B,) or probabilities (B, C), and the pull (a key of
    `PULLS`) back to the frozen model's answers on the same images.

    Raises:
        ValueError: a pull between class vectors where every image has its own.
    """
    if tuned.class_vectors is None and pull != "kl":
        raise ValueError(f"pull={pull!r} compares class vectors, and here every image has its own: use pull='kl'.")
    return cross_entropy(tuned.logits, labels), PULLS[pull](tuned, frozen)
