"""Class vectors and logits of a prompted model, for as many classes as there are."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from ...encoders.families import logit_scale_and_bias, unwrap
from .layer import PromptLayer, seeing
from .texts import load_tokenizer


CHUNK = 256
"""Texts per forward pass. With gradients, the activations of one pass at a time are in memory."""


def prompt_layer(model: nn.Module) -> PromptLayer | None:
    """The layer of the prompt learner on `model` (a `PeftModel` or a plain model), `None` without one."""
    return next((module for module in unwrap(model).modules() if isinstance(module, PromptLayer)), None)


def image_conditioned(model: nn.Module) -> PromptLayer | None:
    """The layer of an active learner whose class vectors depend on the image (CoCoOp), else `None`."""
    layer = prompt_layer(model)
    return None if layer is None or not layer.reads_images or layer.active_name is None else layer


def set_classes(model: nn.Module, class_names: list[str], tokenizer=None) -> None:
    """The classes that `model(pixel_values=...)` is asked about, for the active prompt learner.

    Works at any time and with any names, except for class-specific contexts, which know only theirs. The tokenizer is
    the one saved beside the model when omitted.

    Raises:
        ValueError: no active prompt learner, no tokenizer, no names, a repeated name, a name too long for the text
            tower beside the context, or one that class-specific contexts do not know.
    """
    layer, root = prompt_layer(model), unwrap(model)
    if layer is None or layer.active_name is None:
        raise ValueError("the model has no active prompt learner: attach one with get_peft_model first.")
    if tokenizer is None:
        tokenizer = load_tokenizer(root)
    layer.set_classes(layer.active_name, class_names, tokenizer, root.config.model_type)


def class_vectors(model: nn.Module, inputs: dict[str, Tensor], chunk_size: int = CHUNK) -> Tensor:
    """Tokenised prompts (C, L) to unit class vectors (C, d), float32.

    More than `chunk_size` prompts go through the text tower in parts; with gradients, each part is computed again in
    the backward pass, so that memory does not grow with C.
    """
    root = unwrap(model)

    def encode(**part: Tensor) -> Tensor:
        return normalize(root.get_text_features(**part).pooler_output.float(), dim=-1)

    count = len(inputs["input_ids"])
    if count <= chunk_size:
        return encode(**inputs)
    again = partial(checkpoint, encode, use_reentrant=False) if torch.is_grad_enabled() else encode
    return torch.cat([again(**part) for part in _parts(inputs, chunk_size)])


def _parts(inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    pieces = {key: value.split(size) for key, value in inputs.items()}
    return [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]


def image_conditioned_logits(
    model: nn.Module, layer: PromptLayer, images: Tensor, inputs: dict[str, Tensor], chunk_size: int = CHUNK
) -> Tensor:
    """``z_ic = s · x_i · a_c(x_i) + b`` with class vectors that each image makes for itself: (B, C) float32, also
    under autocast.

    Args:
        layer (`PromptLayer`): that of the active learner, one that reads images.
        images (`Tensor`): (B, d) unit image embeddings.
        inputs (`dict[str, Tensor]`): tokenised prompts (C, L).
        chunk_size (`int`, *optional*, defaults to 256): texts per forward pass; B · C in all.
    """
    root, count = unwrap(model), len(inputs["input_ids"])
    scale, bias = logit_scale_and_bias(root)

    def encode(x: Tensor, **texts: Tensor) -> Tensor:
        repeated = {key: value.repeat(x.shape[0], 1) for key, value in texts.items()}
        with seeing(x.repeat_interleave(len(texts["input_ids"]), 0)):
            features = root.get_text_features(**repeated).pooler_output.float()
        with torch.autocast(x.device.type, enabled=False):  # it would round the cosines
            return torch.einsum("bd,bcd->bc", x.float(), normalize(features, dim=-1).unflatten(0, (x.shape[0], -1)))

    # The number of images is not known while a model is exported.
    several = (images,) if torch.compiler.is_exporting() else images.split(max(1, chunk_size // count))
    parts = [inputs] if count <= chunk_size else _parts(inputs, chunk_size)
    save = torch.is_grad_enabled() and len(several) * len(parts) > 1

    def cosine(x: Tensor, part: dict[str, Tensor]) -> Tensor:
        return checkpoint(encode, x, use_reentrant=False, **part) if save else encode(x, **part)

    rows = [torch.cat([cosine(x, part) for part in parts], 1) for x in several]
    return scale.float() * torch.cat(rows) + bias
