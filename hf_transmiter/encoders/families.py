"""What transformers' two-tower families share, and where they differ, for code that holds only the raw model.

Every supported model answers with logits of one form, ``z = s * x @ a.T + b``: unit rows ``x`` (B, d) for images and
``a`` (K, d) for texts, a positive scale ``s`` (CLIP: ``exp(logit_scale)``; ALIGN: ``1 / temperature``) and a bias
``b`` that only the SigLIP families have (0 elsewhere).

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020);
Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


FAMILIES = {
    "clip": "CLIP",
    "siglip": "SigLIP (also the fixed-resolution SigLIP 2 checkpoints)",
    "siglip2": "SigLIP 2 NaFlex",
    "metaclip_2": "MetaCLIP 2",
    "altclip": "AltCLIP",
    "chinese_clip": "Chinese-CLIP",
    "align": "ALIGN",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
    "open_clip": "open_clip",
}
"""`config.model_type` of each supported family, with the name people know it by."""

# SigLIP reads the last position of a text padded to its full length, and was trained without an attention mask.
SIGLIP = ("siglip", "siglip2")
TEXT_PARTS = ("text_model", "text_projection")
IMAGE_PARTS = ("vision_model", "visual_projection", "logit_scale", "logit_bias", "temperature")
# What makes embeddings and logits. Anything else hanging on the root is someone's head.
EMBEDDING_PARTS = (*IMAGE_PARTS, *TEXT_PARTS)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, adapters still active in its layers; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_dual_encoder(model: nn.Module) -> bool:
    """Whether `model` (a transformers model, or a `PeftModel` around one) is a two-tower model of a known family."""
    model = unwrap(model)
    known = getattr(getattr(model, "config", None), "model_type", None) in FAMILIES
    return known and hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def check_family(model_type: str | None, what: str) -> None:
    if model_type not in FAMILIES:
        supported = ", ".join(f"{name} ({model_type})" for model_type, name in FAMILIES.items())
        said = f"{what} is of type {model_type!r}, which is not a supported two-tower model"
        raise ValueError(f"{said}. Supported: {supported}.")


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Moves the weights to memory that torch has laid out, in place: equal weights then answer equally to the bit.

    Weights mapped from a file begin wherever the file has them, and kernels (one row times a matrix, convolutions)
    round differently by the alignment.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def image_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A two-tower model without its text side: `get_image_features` and [`logit_scale_and_bias`] work as ever."""
    model = AutoModel.from_config(config, trust_remote_code=False)
    for part in TEXT_PARTS:
        if hasattr(model, part):
            delattr(model, part)
    # The root's own initialisation would write to what is gone.
    model._is_hf_initialized = True
    return model


def logit_scale_and_bias(model: nn.Module) -> tuple[Tensor, Tensor | float]:
    """Scale ``s`` and bias ``b`` of ``z = s * x @ a.T + b``, 0-dimensional and attached to the model's parameters; for
    other families than SigLIP's ``b`` is the float 0.0."""
    model = unwrap(model)
    if hasattr(model, "temperature"):
        return 1 / model.temperature, 0.0
    bias = model.logit_bias.reshape(()) if hasattr(model, "logit_bias") else 0.0
    return model.logit_scale.exp().reshape(()), bias


def dummy_text_inputs(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The smallest text that `model`'s root forward accepts, for calls that only want the image side.

    ``model(**image_inputs(model, pixel_values), **dummy_text_inputs(model))`` runs for every family; its
    ``image_embeds`` are unit rows equal to [`DualEncoder.embed_pixels`], its logits are meaningless. Ids and mask are
    (1, 2) int64, on `device` or the model's.
    """
    model = unwrap(model)
    # The padding id would be masked (RoBERTa) or make BERT warn; any other token does.
    token = 1 if model.config.text_config.pad_token_id == 0 else 0
    ids = torch.full((1, 2), token, dtype=torch.long, device=model.device if device is None else device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(model: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    """The image arguments of `model`'s forward for a batch of square pictures.

    Every family but one takes ``pixel_values`` (B, 3, H, W), normalised as by [`DualEncoder.preprocess`], as it is.
    SigLIP 2 NaFlex takes flattened patches (B, patches, patch_size ** 2 * 3) with their mask and grid.
    """
    model = unwrap(model)
    if model.config.model_type != "siglip2":
        return {"pixel_values": pixel_values}
    patch = model.config.vision_config.patch_size
    count, channels, height, width = pixel_values.shape
    if height % patch or width % patch:
        raise ValueError(f"SigLIP 2 pixels of {height} x {width} are not a whole number of {patch}-pixel patches.")
    grid = (height // patch, width // patch)
    patches = pixel_values.reshape(count, channels, grid[0], patch, grid[1], patch)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(count, grid[0] * grid[1], -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device),
        "spatial_shapes": torch.tensor([grid] * count, dtype=torch.long, device=patches.device),
    }


def unit_rows(features) -> Tensor:
    """What `get_image_features` or `get_text_features` returned to unit rows (B, d), float32."""
    # transformers 5 returns an output whose pooler_output is the projected feature.
    pooled = features if torch.is_tensor(features) else features.pooler_output
    return normalize(pooled.float(), dim=-1)


def feature_rows(features, tower: bool = False) -> Tensor:
    """What `get_image_features` returned to rows ``f`` of one picture each, float32: the unit row ``x`` (B, d) and,
    with `tower`, what is in the tower's last layer beside it, ``[x | first token | mean of all tokens]`` (B, d + 2D).

    Cells of a convolutional map (ALIGN) count as tokens. A model that gives none (open_clip) has ``x`` alone.
    """
    x = unit_rows(features)
    hidden = getattr(features, "last_hidden_state", None) if tower else None
    return x if hidden is None else torch.cat([x, token_rows(hidden)], dim=-1)


def token_rows(hidden: Tensor) -> Tensor:
    """First token and mean of all tokens, (B, 2D) float32, of a tower's last layer: (B, T, D), or (B, D, H, W)."""
    tokens = (hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden).float()
    return torch.cat([tokens[:, 0], tokens.mean(1)], dim=-1)


def shared_width(model: nn.Module) -> int:
    """Width ``d`` of the space both towers map to."""
    config = unwrap(model).config
    return config.vision_config.hidden_size if config.model_type in SIGLIP else config.projection_dim


def text_positions(model: nn.Module) -> int:
    """Most tokens the text tower has positions for."""
    config = unwrap(model).config
    text = config.text_config
    # RoBERTa counts positions from the padding id on, so the first entries of its table are never used.
    unused = text.pad_token_id + 1 if config.model_type == "altclip" or "roberta" in text.model_type else 0
    return text.max_position_embeddings - unused


def tokenize(tokenizer, texts: list[str], family: str, limit: int) -> dict[str, Tensor]:
    """Token ids (B, L) and mask of texts, padded as the family was trained: to the longest one, cut after `limit`.

    The SigLIP families read all `limit` positions and no mask.
    """
    padding = "max_length" if family in SIGLIP else "longest"
    inputs = tokenizer(texts, padding=padding, truncation=True, max_length=limit, return_tensors="pt")
    names = ("input_ids",) if family in SIGLIP else tuple(inputs)
    return {name: inputs[name] for name in names}
