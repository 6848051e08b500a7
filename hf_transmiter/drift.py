"""What an upgrade of the base model changed inside its text tower, part by part: weights and hidden states.

A prompt learnt for the old model enters the new one through the same door; how far the rooms behind it have moved says
where a prompt may survive. Source of the idea: ContCoOp (arXiv 2412.20895), which compares parameters and output
features of the text encoder per layer before and after an upgrade.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .anchors import DEFAULT_TEMPLATES
from .backbone import DualEncoder
from .families import SIGLIP
from .scores import NOTHING, table


# In this order: the first pattern that fits a parameter's name says which part of the text tower it belongs to.
_PARTS = (
    (r"embeddings\.(token_embedding|word_embeddings)\.", "token table"),
    (r"embeddings\.position_embeddings?\.|positional_embedding$", "positions"),
    (r"embeddings\.", "embedding norm"),  # of the BERT-likes, with their table of token types
    (r"(?:encoder\.layers?|transformer\.resblocks)\.(\d+)\.", "layer"),
    (r"text_model\.(final_layer_norm|pre_LN|ln_final)\.", "final norm"),
    (r"text_model\.pooler\.", "pooler"),
    (r"text_projection(\.|$)|text_model\.(head|transformation)\.", "projection"),
)
# These pool at their end token, the last one the mask shows; BERT-likes at the first token.
_POOLS_AT_THE_END = ("clip", "metaclip_2", "open_clip")


@dataclass(frozen=True)
class LayerDrift:
    """How far one part of the text tower has moved.

    Args:
        name (`str`): of the part, layers counted from 1; ``"layer 2 (new: 4)"`` pairs layers of unequal depths.
        absolute (`float` or `None`), relative (`float` or `None`):
            Size of the change, and as a share of the old size (0.1 is a tenth). `None` where old and new have no
            common coordinates, or the old size is 0.
        similarity (`float`, *optional*):
            [`linear_cka`] of hidden states, 1 for the same up to rotation and scale. `None` for parameters, and where
            one model says the same for all texts.
    """

    name: str
    absolute: float | None
    relative: float | None
    similarity: float | None = None


def parameter_drift(old: DualEncoder, new: DualEncoder) -> list[LayerDrift]:
    """Change of the weights of the text tower, from input to output.

    With ``θ`` all n parameters of a part, ``absolute = ‖θ_new - θ_old‖ / √n`` (root mean square per parameter) and
    ``relative = ‖θ_new - θ_old‖ / ‖θ_old‖`` (Frobenius norms).

    Args:
        old, new (`DualEncoder`): before and after the upgrade, without adapters inside.

    Returns:
        `list[LayerDrift]`: "token table", "positions", "layer 1" ... "layer D", "final norm", "projection"; where the
        family has them also "embedding norm" and "pooler".

    Raises:
        ValueError: a part has other tensors or shapes (width, depth, vocabulary, adapters), or the tokenizers differ.
            [`feature_drift`] still compares such models, by similarity.
    """
    before, after = _text_parameters(old), _text_parameters(new)
    _check_comparable(before, after)
    _check_vocabulary(old, new)
    return [_tensor_drift(part, before[part].values(), after[part].values()) for part in before]


def _text_parameters(encoder: DualEncoder) -> dict[str, dict[str, Tensor]]:
    """Parameters of the text tower by part, parts from input to output, tensors of a part by name."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in encoder.model.named_parameters():
        if not name.startswith(("text_model.", "text_projection.")):
            continue
        for rank, (pattern, part) in enumerate(_PARTS):
            if match := re.search(pattern, name):
                layer = int(match[1]) + 1 if part == "layer" else 0
                found.setdefault((rank, layer), {})[name] = tensor.detach()
                break
        else:
            raise ValueError(f"the parameter {name} of a {encoder.family} text tower belongs to no known part.")
    parts = {}
    for rank, layer in sorted(found):
        parts[f"layer {layer}" if layer else _PARTS[rank][1]] = dict(sorted(found[rank, layer].items()))
    return parts


def _check_comparable(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> None:
    for part in [*before, *(part for part in after if part not in before)]:
        old, new = before.get(part, {}), after.get(part, {})
        for name in [*old, *(name for name in new if name not in old)]:
            shapes = [tuple(side[name].shape) if name in side else "missing" for side in (old, new)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the parameters of the two text towers cannot be compared: in the part {part!r}, {name} is "
                    f"{shapes[0]} in the old model and {shapes[1]} in the new one. Hidden states can still be "
                    "compared, by similarity (feature_drift)."
                )


def _check_vocabulary(old: DualEncoder, new: DualEncoder) -> None:
    if old.processor is None or new.processor is None:
        return
    ids = [encoder.processor.tokenizer.get_vocab() for encoder in (old, new)]
    if ids[0] != ids[1]:
        raise ValueError(
            "the parameters of the two text towers cannot be compared: the tokenizers give different ids to the same "
            f"token, so rows of the part 'token table' do not belong together ({len(ids[0])} tokens in the old "
            f"model, {len(ids[1])} in the new one). Hidden states can still be compared, by similarity "
            "(feature_drift)."
        )


def _tensor_drift(name: str, old: Iterable[Tensor], new: Iterable[Tensor]) -> LayerDrift:
    change = size = count = 0.0
    for before, after in zip(old, new, strict=True):
        before, after = before.cpu().double(), after.cpu().double()
        change += float((after - before).square().sum())
        size += float(before.square().sum())
        count += before.numel()
    return LayerDrift(name, (change / count) ** 0.5, (change / size) ** 0.5 if size else None)


def feature_drift(
    old: DualEncoder,
    new: DualEncoder,
    names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
) -> list[LayerDrift]:
    """Change of what the text tower says, from its embeddings to the class vector.

    With ``h`` the hidden state of a text at the position the tower pools, ``absolute = mean ‖h_new - h_old‖`` and
    ``relative = mean (‖h_new - h_old‖ / ‖h_old‖)`` over texts; `similarity` is [`linear_cka`] with texts as samples,
    which also compares towers of different widths. Layers of unequal depths are paired by their share of the depth.

    Args:
        old, new (`DualEncoder`): before and after the upgrade; adapters inside take part.
        names (`Sequence[str]`): K names. With few of them CKA lies near 1 for any two models: take a hundred or more.
        templates (`Sequence[str]`, *optional*, defaults to `("a photo of a {}.",)`): hidden states are those of every
            name in every template, class vectors those of [`DualEncoder.embed_names`].
        batch_size (`int`, *optional*, defaults to 64): texts per forward pass.

    Returns:
        `list[LayerDrift]`: "embeddings", "layer 1" ... "layer D" of the old model, "class vector". `absolute` and
        `relative` are `None` between widths or layer numbers that differ.

    Raises:
        ValueError: no name, or templates that [`DualEncoder.embed_names`] refuses.
    """
    if not names:
        raise ValueError("feature drift needs at least one name to ask both models about.")
    before, after = (_text_states(encoder, names, templates, batch_size) for encoder in (old, new))
    rows = [_state_drift("embeddings", before[0], after[0])]
    depth, new_depth = len(before) - 2, len(after) - 2
    for layer in range(1, depth + 1):
        partner = max(1, (2 * layer * new_depth + depth) // (2 * depth))  # layer * new_depth / depth, rounded
        if partner == layer:
            rows.append(_state_drift(f"layer {layer}", before[layer], after[layer]))
        else:
            similarity = linear_cka(before[layer], after[partner])
            rows.append(LayerDrift(f"layer {layer} (new: {partner})", None, None, similarity))
    return [*rows, _state_drift("class vector", before[-1], after[-1])]


def _state_drift(name: str, old: Tensor, new: Tensor) -> LayerDrift:
    absolute = relative = None
    if old.shape == new.shape:
        change, size = (new - old).norm(dim=1), old.norm(dim=1)
        absolute, relative = float(change.mean()), float((change / size).mean()) if size.all() else None
    return LayerDrift(name, absolute, relative, linear_cka(old, new))


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of two descriptions of the same N samples.

    ``CKA(X, Y) = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` with centred columns and Frobenius norms: between 0 and 1, unchanged by
    rotations, reflections, shifts and scalings of either side.

    Args:
        x (`Tensor`): (N, p).
        y (`Tensor`): (N, q), rows in the same order.

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


def _text_states(
    encoder: DualEncoder, names: Sequence[str], templates: Sequence[str], batch_size: int
) -> list[Tensor]:
    """(K T, width) pooled hidden states after the embeddings and after each layer, then (K, d) class vectors."""
    with _recorded(encoder) as batches:
        vectors = encoder.embed_names(names, templates, batch_size)
    return [*(torch.cat(states).double() for states in zip(*batches, strict=True)), vectors.cpu().double()]


@contextmanager
def _recorded(encoder: DualEncoder) -> Iterator[list[list[Tensor]]]:
    """Inside, every forward pass of the text tower appends its hidden states at the position that is pooled."""
    tower, batches, under_way = encoder.model.text_model, [], []

    def ask(module, args, kwargs):
        under_way.append(module)
        return args, {**kwargs, "output_hidden_states": True}

    def keep(module, args, kwargs, output):
        under_way.pop()
        if under_way:  # a prompt learner asks the tower something for itself
            return
        states = output.hidden_states
        # Not of the text as it was tokenized: a learnt context has made it longer by now.
        where = _pooled_position(encoder.family, kwargs.get("attention_mask"), states[0])
        rows = torch.arange(len(states[0]), device=where.device)
        batches.append([state[rows, where].float().cpu() for state in states])

    hooks = [
        tower.register_forward_pre_hook(ask, with_kwargs=True, prepend=True),  # before a prompt learner's own
        tower.register_forward_hook(keep, with_kwargs=True),
    ]
    try:
        yield batches
    finally:
        for hook in hooks:
            hook.remove()


def _pooled_position(family: str, mask: Tensor | None, states: Tensor) -> Tensor:
    """(B,) position of each text (B, L, width) from which the tower makes its answer."""
    count, length = states.shape[:2]
    if family in SIGLIP:
        return torch.full((count,), length - 1, device=states.device)
    if family in _POOLS_AT_THE_END:
        return length - 1 - mask.to(states.device).flip(1).argmax(1)
    return torch.zeros(count, dtype=torch.long, device=states.device)


def drift_table(rows: Sequence[LayerDrift]) -> str:
    """Markdown: a row per part, with the columns that somebody has; changes relative to the old size in percent."""
    columns = [(None, "part", "{}".format)]
    for attribute, title, write in (
        ("absolute", "change", "{:.3g}".format),
        ("relative", "relative", "{:.1%}".format),
        ("similarity", "similarity", "{:.3f}".format),
    ):
        if any(getattr(row, attribute) is not None for row in rows):
            columns.append((attribute, title, write))
    lines = []
    for row in rows:
        values = [(getattr(row, attribute), write) for attribute, _, write in columns[1:]]
        lines.append([row.name, *(NOTHING if value is None else write(value) for value, write in values)])
    return table([title for _, title, _ in columns], lines) + "\n"
