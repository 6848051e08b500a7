"""[`attach`]: a saved prompt adapter on another base model, as it is; [`copy_adapter`]: layers of LoRA and the like.

What depends on classes (token ids, embeddings of the names, class vectors) is never saved with a prompt: the model it
is attached to makes it anew, with its own tokenizer, token table and logit scale.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn

from ..encoders.dual_encoder import DualEncoder
from ..hub.adapter_files import CONFIG, WEIGHTS
from ..hub.checks import check_tensors
from ..hub.repo import fetch, read_json
from ..tuners import TransMiterConfig
from ..tuners.injection import inject
from ..tuners.prompts import PromptConfig, PromptLayer, prompt_layer, set_classes
from ..tuners.prompts.model import TOKEN_TABLES, base_facts, misfit


class Incompatible(ValueError):
    """A saved adapter cannot be attached to a model, for the `reason`."""

    def __init__(self, adapter: str, reason: str):
        super().__init__(f"the adapter {adapter!r} cannot be attached: {reason}.")
        self.reason = reason


def attach(adapter: str | os.PathLike, encoder: DualEncoder) -> DualEncoder:
    """A copy of a model with a saved prompt adapter in it, unchanged: no image, no label, no gradient step.

    Args:
        adapter (`str` or `os.PathLike`):
            Folder or Hub id (``id@revision`` too) of a prompt learner's adapter; only safetensors are read.
        encoder (`DualEncoder`): the model it was learnt on, or an upgrade of that; stays untouched.

    Returns:
        [`DualEncoder`]: prompts of it are ``"{}."``. Saved by
        ``AnchorClassifier(attached, anchors).save_pretrained(folder)``, as any tuned model.

    Raises:
        Incompatible: not a prompt adapter; another width, depth or vocabulary of the text tower, of the image tower
            or the embeddings where they matter; a tensor that is missing, of another shape, or not finite; a model
            that has adapters already.
        FileNotFoundError, OSError: nothing there.

    ```python
    >>> upgraded = attach("out/contcoop", DualEncoder.from_pretrained("laion/CLIP-ViT-B-16-laion2B-s34B-b88K"))
    >>> AnchorClassifier(upgraded, Anchors(("cat", "dog"), templates=("{}.",))).predict("tabby.jpg")
    ```
    """
    source = os.fspath(adapter)
    config = read_config(source)
    if encoder.family not in TOKEN_TABLES:
        raise Incompatible(source, f"prompt learning does not know the family {encoder.family!r}")
    facts = _facts(encoder)
    reason = misfit(config, facts)
    if reason is not None:
        raise Incompatible(source, reason)
    # Compared above, by the encoder's own tokenizer; PEFT would compare with the one beside the model.
    config.base, config.revision = {**facts, "vocabulary": None}, encoder.revision
    try:
        attached = with_adapter(encoder, config)
    except ValueError as error:  # too few layers, no room for the context, or another adapter
        raise Incompatible(source, str(error).rstrip(".")) from error
    model = attached.model
    model.peft_config["default"].base = facts
    _load_weights(source, model)
    if getattr(config, "class_specific", False):  # which context is whose, by the encoder's own tokenizer
        set_classes(model, config.class_names, encoder.processor.tokenizer)
    return attached


def read_config(source: str) -> PromptConfig:
    """Configuration of a saved prompt adapter.

    Raises:
        Incompatible: no adapter, another kind of adapter, or a damaged file.
    """
    try:
        saved = read_json(source, CONFIG)
    except ValueError as error:
        raise Incompatible(source, f"its configuration is damaged: {error}") from error
    if saved is None:
        raise Incompatible(source, f"it holds no {CONFIG}")
    kind = saved.get("peft_type")
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None or not issubclass(known, PromptConfig):
        raise Incompatible(source, f"it is a {kind} adapter, not a prompt learner's")
    try:
        return PeftConfig.from_peft_type(**saved)
    except (TypeError, ValueError) as error:
        raise Incompatible(source, f"its configuration is damaged: {error}") from error


def why_not_reattached(tuned: DualEncoder, strong: DualEncoder) -> str | None:
    """Why the learnt prompts of one model cannot be put into another one as they are, `None` where they can."""
    layer = active_prompts(tuned)
    if layer is None:
        return "the tuned model has no prompt learner on it"
    return why_closed(strong) or misfit(replace(layer.active_config, base=_facts(tuned)), _facts(strong))


def reattach_prompt(tuned: DualEncoder, strong: DualEncoder) -> DualEncoder:
    """A copy of the strong model with the tuned model's learnt prompts in it, unchanged: no image, no training.

    Raises:
        ValueError: no prompts, or [`why_not_reattached`] says why they do not fit.
    """
    reason = why_not_reattached(tuned, strong)
    if reason is not None:
        raise ValueError(f"the prompts cannot be re-attached: {reason}.")
    layer = active_prompts(tuned)
    attached = with_adapter(strong, copy.deepcopy(layer.active_config))
    state = get_peft_model_state_dict(tuned.model, adapter_name=layer.active_name)
    set_peft_model_state_dict(attached.model, state)
    return attached


def copy_adapter(tuned: DualEncoder, strong: DualEncoder) -> DualEncoder:
    """A copy of the strong model with the tuned model's layers in it, unchanged: no image, no training.

    What is tried first between models of one architecture: ``W_strong + ΔW`` in place of ``W_weak + ΔW`` in every
    layer that LoRA, or another PEFT method that changes layers, was put on.

    Raises:
        ValueError: what was tuned are no such layers, a strong model that has adapters already, or one whose layers
            have other names or shapes.
    """
    name, config = next(iter((getattr(tuned.model, "peft_config", None) or {}).items()), (None, None))
    if config is None or isinstance(config, (PromptConfig, TransMiterConfig)):
        raise ValueError("the tuned model has no layers of LoRA or the like")
    if getattr(strong.model, "peft_config", None):
        raise ValueError("the strong model has adapters already: unload them first")
    try:
        with torch.random.fork_rng():  # of the weights that are replaced here
            copied = with_adapter(strong, copy.deepcopy(config))
    except ValueError as error:
        raise ValueError("the strong model has none of the tuned model's layers") from error
    state, own = (
        get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        for model, adapter in ((tuned.model, name), (copied.model, "default"))
    )
    shapes = [{key: tuple(tensor.shape) for key, tensor in part.items()} for part in (state, own)]
    if shapes[0] != shapes[1]:
        raise ValueError("the tuned layers have other names or shapes in the strong model")
    set_peft_model_state_dict(copied.model, state)
    return copied


def why_closed(strong: DualEncoder) -> str | None:
    """Why a model takes no prompts at all."""
    if strong.family not in TOKEN_TABLES:
        return f"prompt learning does not know the family {strong.family!r}"
    if getattr(strong.model, "peft_config", None):
        return "the strong model has adapters already: unload them first"
    return None


def active_prompts(tuned: DualEncoder) -> PromptLayer | None:
    """The prompt learner that answers, if there is one."""
    layer = prompt_layer(tuned.model)
    return None if layer is None or layer.active_name is None else layer


def with_adapter(strong: DualEncoder, config: PeftConfig) -> DualEncoder:
    """A frozen copy of the strong model with a fresh adapter."""
    model = copy.deepcopy(strong.model).eval()
    inject(model, config)
    return DualEncoder(model.requires_grad_(False), strong.processor, strong.name_or_path, strong.revision)


def _facts(encoder: DualEncoder) -> dict:
    return base_facts(encoder.model, getattr(encoder.processor, "tokenizer", None))


def _load_weights(source: str, model: nn.Module) -> None:
    """Tensors of a saved adapter into `model`; the file's header is checked before any is read."""
    path = fetch(source, WEIGHTS)
    if path is None:
        raise Incompatible(source, f"it holds no {WEIGHTS}, and nothing else is read")
    own = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    try:
        shapes = {f"base_model.model.{key}": tuple(tensor.shape) for key, tensor in own.items()}
        check_tensors(path, shapes, what="prompt adapter of this configuration")
        set_peft_model_state_dict(model, load_file(path))
    except ValueError as error:
        raise Incompatible(source, str(error).rstrip(".")) from error
