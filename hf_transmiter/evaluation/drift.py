"""[`feature_drift`]: how far an upgrade of the base model moved the hidden states of its text tower, layer by layer.

A prompt learnt for the old model enters the new one through the same door; how far the rooms behind it have moved says
where a prompt may survive. Source of the idea: ContCoOp (arXiv 2412.20895).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoders.dual_encoder import DualEncoder
from ..encoders.families import SIGLIP
from ..hub.scores import shown, table


# These pool at their end token, the last one the mask shows; BERT-likes at the first token.
_POOLS_AT_THE_END = ("clip", "metaclip_2", "open_clip")
_TEMPLATE = "a photo of a {}."
_BATCH_SIZE = 64


@dataclass(frozen=True)
class LayerDrift:
    """How far one part of the text tower has moved.

    Args:
        absolute, relative:
            Size of the change, and as a share of the old size (0.1 is a tenth). `None` where old and new have no
            common coordinates, or the old size is 0.
        similarity: [`linear_cka`] of hidden states. `None` where one model says the same for all texts.
    """

    name: str
    absolute: float | None
    relative: float | None
    similarity: float | None = None


def feature_drift(old: DualEncoder, new: DualEncoder, names: Sequence[str]) -> list[LayerDrift]:
    """Change of what the text tower says about ``"a photo of a NAME."``, from its embeddings to the class vector.

    With ``h`` the hidden state of a text at the position the tower pools, ``absolute = mean ‖h_new - h_old‖`` and
    ``relative = mean (‖h_new - h_old‖ / ‖h_old‖)`` over texts; `similarity` is [`linear_cka`] with texts as samples,
    which also compares towers of different widths. Of towers of unequal depths only both ends are compared.

    Args:
        old, new (`DualEncoder`): before and after the upgrade, without prompts inside.
        names (`Sequence[str]`): K names. With few of them CKA lies near 1 for any two models: take a hundred or more.

    Returns:
        `list[LayerDrift]`: "embeddings", "layer 1" ... "layer D" of the old model, "class vector".

    Raises:
        ValueError: no name.
    """
    if not names:
        raise ValueError("feature drift needs at least one name to ask both models about.")
    before, after = (_text_states(encoder, names) for encoder in (old, new))
    depth = len(before) - 2
    if len(after) != len(before):
        depth, before, after = 0, before[:: len(before) - 1], after[:: len(after) - 1]
    parts = ["embeddings", *(f"layer {layer}" for layer in range(1, depth + 1)), "class vector"]
    found = []
    for part, h, moved in zip(parts, before, after, strict=True):
        absolute = relative = None
        if h.shape == moved.shape:
            change, size = (moved - h).norm(dim=1), h.norm(dim=1)
            absolute, relative = float(change.mean()), float((change / size).mean()) if size.all() else None
        found.append(LayerDrift(part, absolute, relative, linear_cka(h, moved)))
    return found


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of two descriptions of the same N samples.

    ``CKA(X, Y) = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` with centred columns and Frobenius norms: between 0 and 1, unchanged by
    rotations, reflections, shifts and scalings of either side.

    Args:
        x, y (`Tensor`): (N, p) and (N, q), rows in the same order.

    Returns:
        `float` or `None`: `None` where all rows of one side are the same.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414), eq. 5.
    """
    centred = []
    for side in (x.double(), y.double()):
        centred.append(side - side.mean(dim=0))
        # What rounding leaves of equal rows is no variation.
        if centred[-1].norm() <= 1e-6 * side.norm():
            return None
    x, y = centred
    value = float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
    return min(value, 1.0)  # rounding alone goes beyond


@torch.no_grad()
def _text_states(encoder: DualEncoder, names: Sequence[str]) -> list[Tensor]:
    """(K, width) pooled hidden states after the embeddings and after each layer, then (K, d) class vectors."""
    texts, batches = [_TEMPLATE.format(name.replace("_", " ")) for name in names], []
    for start in range(0, len(texts), _BATCH_SIZE):
        inputs = encoder.tokenize(texts[start : start + _BATCH_SIZE])
        states = encoder.model.text_model(**inputs, output_hidden_states=True).hidden_states
        where = _pooled_position(encoder.family, inputs.get("attention_mask"), states[0])
        rows = torch.arange(len(where), device=where.device)
        batches.append([state[rows, where].float().cpu() for state in states])
    vectors = encoder.embed_texts(texts).cpu()
    return [*(torch.cat(states).double() for states in zip(*batches, strict=True)), vectors.double()]


def _pooled_position(family: str, mask: Tensor | None, states: Tensor) -> Tensor:
    """(B,) position of each text (B, L, width) from which the tower makes its answer."""
    count, length = states.shape[:2]
    if family in SIGLIP:
        return torch.full((count,), length - 1, device=states.device)
    if family in _POOLS_AT_THE_END:
        return length - 1 - mask.to(states.device).flip(1).argmax(1)
    return torch.zeros(count, dtype=torch.long, device=states.device)


def drift_table(rows: Sequence[LayerDrift]) -> str:
    """Markdown: a row per part; changes relative to the old size in percent."""
    cells = [(r.name, shown(r.absolute, ".3g"), shown(r.relative, ".1%"), shown(r.similarity, ".3f")) for r in rows]
    return table(["part", "change", "relative", "similarity"], cells) + "\n"
