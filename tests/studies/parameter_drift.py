"""How far an upgrade moved the weights of the text tower, part by part (ContCoOp, arXiv 2412.20895)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.drift import LayerDrift


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
