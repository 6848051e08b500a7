"""Which weights an adapter takes on a model: its own, or those of a finished transfer in its repository."""

from __future__ import annotations

import logging
from dataclasses import fields

from torch import nn
from torch.nn.functional import cosine_similarity

from ...backbone import DualEncoder
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
    encoder = _encoder(root)
    own = ModelId(config.base_model_name_or_path, config.revision, config.base_fingerprint)
    if encoder is None or own.is_of(encoder):
        return
    source, hub = config.source or (None, {})
    entries = [] if source is None else list_transfers(source, **hub)
    entry = next((entry for entry in entries if entry.model.is_of(encoder)), None)
    if entry is not None:
        found = read_transfer(source, entry, **hub)
        if entry.kind == "bridge":
            from ...transferring import carry  # not at the top: it comes later in the order of the package

            found = carry(*read_adapter(source, **hub), encoder, found)
        _become(config, *found)
    elif not _same_texts(config, encoder):
        raise ValueError(missing_transfer(source or "this adapter", own.name, encoder.name_or_path, entries))


def _encoder(root: nn.Module) -> DualEncoder | None:
    if hasattr(root, "encoder"):  # an AnchorClassifier
        return root.encoder
    try:
        encoder = DualEncoder(root)
    except (OSError, ValueError):
        encoder = None
    if encoder is None or encoder.processor is None:
        logger.warning("cannot tell whether this is the adapter's model: there is no processor beside it.")
        return None
    return encoder


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
    for item in fields(config):
        if item.name not in ("inference_mode", "target_modules", "exclude_modules"):
            setattr(config, item.name, getattr(found, item.name))
    config.tensors = tensors
