"""Which weights an adapter takes on a model: its own, or those of a finished transfer in its repository."""

from __future__ import annotations

import logging
from dataclasses import fields

from torch import nn
from torch.nn.functional import cosine_similarity

from ...backbone import DualEncoder, load_processor
from ...fingerprint import ModelId
from ...transfers import list_transfers, missing_transfer, read_adapter, read_transfer
from .config import TransMiterConfig


logger = logging.getLogger(__name__)

SAME_TEXTS = 0.99  # cosine from which text embeddings count as the same model's, in whatever precision


def take_transfer(config: TransMiterConfig, root: nn.Module) -> None:
    """Turns `config` into that of the finished transfer to `root`, where the adapter was made for another model.

    Raises:
        ValueError: there is no transfer to this model.
    """
    if config.base_fingerprint is None or config.tensors is not None:
        return
    source, hub = config.source or (None, {})
    own = ModelId(config.base_model_name_or_path, config.revision, config.base_fingerprint)
    encoder = _encoder(root, hub)
    if encoder is not None and own.is_of(encoder):
        return
    entries = [] if source is None else list_transfers(source, **hub)
    if encoder is None:
        _check_unknown(root, own, entries)
        return
    exact = [entry for entry in entries if entry.model.fingerprint == encoder.fingerprint]
    entry = next((entry for entry in exact or entries if entry.model.is_of(encoder)), None)
    if entry is not None:
        found = read_transfer(source, entry, **hub)
        if entry.kind == "bridge":
            from ...transferring import carry  # not at the top: it comes later in the order of the package

            found = carry(*read_adapter(source, **hub), encoder, found)
        _become(config, *found)
    elif _same_texts(config, encoder):
        logger.warning(
            "the weights of %r are not those of %r, which the adapter was made for; both embed its names alike, so "
            "they are taken for the same model in another precision or under another name.",
            encoder.name_or_path,
            own.name,
        )
    else:
        raise ValueError(missing_transfer(source or "this adapter", own.name, encoder.name_or_path, entries))


def _encoder(root: nn.Module, hub: dict) -> DualEncoder | None:
    """`None` where there is no processor beside the model, without which its fingerprint cannot be known."""
    if hasattr(root, "encoder"):  # an AnchorClassifier
        return root.encoder
    name = root.config._name_or_path
    try:
        shared = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if key in hub}
        return DualEncoder(root, load_processor(name, **shared)) if name else None
    except (OSError, ValueError):
        return None


def _check_unknown(root: nn.Module, own: ModelId, entries: list) -> None:
    name = root.config._name_or_path
    if name == own.name:
        return
    if name or entries:
        raise ValueError(
            f"cannot tell whether {name!r} is {own.name!r}, which the adapter was made for: its processor cannot be "
            "loaded (tokenizer and image processor, from the same place as the model). Pass token= or cache_dir= as "
            "for the model, or AnchorClassifier.from_pretrained(adapter, DualEncoder(model, processor))."
        )
    logger.warning("cannot tell whether this is the adapter's model: there is no processor beside it.")


def _same_texts(config: TransMiterConfig, encoder: DualEncoder) -> bool:
    """Whether the adapter's saved text embeddings are those of this model: the same weights under another name."""
    if config.source is None or config.embed_dim != encoder.embed_dim:
        return False
    source, hub = config.source
    saved = read_adapter(source, **hub)[1]["anchors"][:8]
    found = encoder.embed_names(config.anchors.names[: len(saved)], config.templates).cpu()
    return bool((cosine_similarity(found, saved.float()) > SAME_TEXTS).all())


def _become(config: TransMiterConfig, content: dict, tensors: dict) -> None:
    found = TransMiterConfig.from_peft_type(**content)
    if found.class_names != config.class_names:
        raise ValueError("the finished transfer answers over other class names than its adapter: push it again.")
    for item in fields(config):
        if item.name not in ("inference_mode", "target_modules", "exclude_modules"):
            setattr(config, item.name, getattr(found, item.name))
    config.tensors = tensors
