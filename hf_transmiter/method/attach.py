"""[`attach`]: a saved prompt adapter on another base model, as it is; [`token_map`] for a model of another width.

What depends on classes (token ids, embeddings of the names, class vectors) is never saved with a prompt: the model it
is attached to makes it anew, with its own tokenizer, token table and logit scale.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from torch import Tensor, nn

from ..algebra import check_finite
from ..encoders.dual_encoder import DualEncoder
from ..hub.adapter_files import CONFIG, WEIGHTS
from ..hub.checks import read_header
from ..hub.repo import fetch, read_json
from ..tuners import CoOpConfig
from ..tuners.injection import adapter_state, inject
from ..tuners.prompts import PromptConfig, PromptLayer, prompt_layer, set_classes
from ..tuners.prompts.model import TOKEN_TABLES, base_facts, misfit


logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."  # of every key PEFT saves
# λ of the token map: on the sandbox it tells more of unrelated models' held-out tokens than 0, and hardly less of an
# upgrade's.
TOKEN_RIDGE = 0.1


class Incompatible(ValueError):
    """A saved adapter cannot be attached to a model, for the `reason`."""

    def __init__(self, adapter: str, reason: str):
        super().__init__(f"the adapter {adapter!r} cannot be attached: {reason}.")
        self.reason = reason


def attach(adapter: str | os.PathLike, encoder: DualEncoder, *, token_map: Tensor | None = None) -> DualEncoder:
    """A copy of a model with a saved prompt adapter in it, unchanged: no image, no label, no gradient step.

    Args:
        adapter (`str` or `os.PathLike`):
            Folder or Hub id (``id@revision`` too) of a prompt learner's adapter; only safetensors are read.
        encoder (`DualEncoder`): the model it was learnt on, or an upgrade of that; stays untouched.
        token_map (`Tensor`, *optional*):
            A (d_old, d_new) of [`token_map`]: a context v of CoOp or KgCoOp becomes ``v A``, so the text tower may
            have another width.

    Returns:
        [`DualEncoder`]: prompts of it are ``"{}."``. Saved by
        ``AnchorClassifier(attached, anchors).save_pretrained(folder)``, as any tuned model.

    Raises:
        Incompatible: not a prompt adapter; another width, depth or vocabulary of the text tower, of the image tower
            or the embeddings where they matter; something other than a context to be mapped; a tensor that is missing,
            of another shape, or not finite.
        ValueError: the model has adapters already, or the map has another shape.
        FileNotFoundError, OSError: nothing there.

    ```python
    >>> upgraded = attach("out/contcoop", DualEncoder.from_pretrained("laion/CLIP-ViT-B-16-laion2B-s34B-b88K"))
    >>> AnchorClassifier(upgraded, Anchors(("cat", "dog"), templates=("{}.",))).predict("tabby.jpg")
    ```
    """
    source = os.fspath(adapter)
    if getattr(encoder.model, "peft_config", None):
        raise ValueError(f"{encoder.name_or_path!r} has adapters already: merge or unload them before attaching one.")
    config = read_config(source)
    if encoder.family not in TOKEN_TABLES:
        raise Incompatible(source, f"prompt learning does not know the family {encoder.family!r}")
    facts = _facts(encoder)
    if token_map is None:
        reason = misfit(config, facts)
    else:
        reason = misfit(config, {**facts, "text_width": None}) or _why_not_mapped(config)
    if reason is not None:
        raise Incompatible(source, reason)
    if token_map is not None:
        _check_map(token_map, ((config.base or {}).get("text_width"), facts["text_width"]))
    # Compared above, by the encoder's own tokenizer; PEFT would compare with the one beside the model.
    config.base, config.revision = {**facts, "vocabulary": None}, encoder.revision
    try:
        attached = with_prompts(encoder, config)
    except ValueError as error:  # too few layers, or no room for the context
        raise Incompatible(source, str(error).rstrip(".")) from error
    model = attached.model
    model.peft_config["default"].base = facts
    set_peft_model_state_dict(model, _read_weights(source, model, token_map))
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


def _why_not_mapped(config: PromptConfig) -> str | None:
    if not isinstance(config, CoOpConfig):
        kind = config.peft_type.value
        return f"only what lives among token embeddings can be mapped, a context of CoOp or KgCoOp; {kind} learns more"
    if config.layer:
        return f"its context belongs to layer {config.layer}, not among the token embeddings that a map relates"
    return None


def token_map(old: DualEncoder, new: DualEncoder) -> Tensor:
    """The linear map from the token space of one model to that of another with the same vocabulary.

    ``A = argmin ‖E_old A - E_new‖²_F`` with a small ridge (`TOKEN_RIDGE`); E (V, d) are the two token tables. How well
    it fits is logged: ``R² = 1 - ‖E_old A - E_new‖²_F / ‖E_new - mean‖²_F``, 1 where every token arrives at its place
    in the new table, 0 where all might as well arrive at its mean.

    Returns:
        `Tensor`: A (d_old, d_new), float32, for [`attach`].

    Raises:
        ValueError: other tokens, or a family without a token table that is known.
    """
    for encoder in (old, new):
        if encoder.family not in TOKEN_TABLES:
            raise ValueError(f"where the family {encoder.family!r} keeps its token table is not known.")
    facts = [_facts(encoder) for encoder in (old, new)]
    if facts[0]["vocabulary"] is None or facts[0]["vocabulary"] != facts[1]["vocabulary"]:
        raise ValueError(
            f"{old.name_or_path!r} and {new.name_or_path!r} have other tokens: a map between their token tables needs "
            "one vocabulary."
        )
    tables = [encoder.model.get_submodule(TOKEN_TABLES[encoder.family]) for encoder in (old, new)]
    rows = min(fact["vocabulary_size"] for fact in facts)  # some tables are padded
    before, after = (getattr(table, "base_layer", table).weight.detach().cpu().float()[:rows] for table in tables)
    mapping = solve_token_map(before, after, TOKEN_RIDGE)
    left, spread = (before @ mapping - after).square().sum(), (after - after.mean(0)).square().sum()
    fit = 1 - float(left / spread)
    logger.info("token map from %s to %s: R² = %.3f", old.name_or_path, new.name_or_path, fit)
    return mapping


def solve_token_map(old: Tensor, new: Tensor, ridge: float = 0.0) -> Tensor:
    """The linear map between two token tables of one vocabulary, for what lives among an old model's token embeddings.

    ``argmin_M ‖E_old M - E_new‖² + λ·ē·‖M‖²`` with ē the mean eigenvalue of ``E_oldᵀ E_old``; of several minima, the
    smallest. A context ``v`` (M, d_old) becomes ``v @ solve_token_map(...)`` (M, d_new).

    Args:
        old, new (`Tensor`): E_old (V, d_old) and E_new (V, d_new), row i the embedding of token i.
        ridge (`float`, *optional*, defaults to 0.0): λ.

    Returns:
        `Tensor`: (d_old, d_new), float32.

    Raises:
        ValueError: tables of different lengths, a negative λ, or a value that is not finite.
    """
    if old.ndim != 2 or new.ndim != 2 or len(old) != len(new):
        raise ValueError(
            f"token tables must have a row for each token of one vocabulary, got {tuple(old.shape)} and "
            f"{tuple(new.shape)}."
        )
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}.")
    x, y = (check_finite(table.detach().cpu(), "the token embeddings").double() for table in (old, new))
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return (torch.linalg.pinv(gram, hermitian=True) @ (x.T @ y)).float()


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
    attached = with_prompts(strong, copy.deepcopy(layer.active_config))
    state = get_peft_model_state_dict(tuned.model, adapter_name=layer.active_name)
    set_peft_model_state_dict(attached.model, state)
    return attached


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


def with_prompts(strong: DualEncoder, config: PeftConfig) -> DualEncoder:
    """A frozen copy of the strong model with a fresh adapter."""
    model = copy.deepcopy(strong.model).eval()
    inject(model, config)
    return DualEncoder(model.requires_grad_(False), strong.processor, strong.name_or_path, strong.revision)


def _facts(encoder: DualEncoder) -> dict:
    return base_facts(encoder.model, getattr(encoder.processor, "tokenizer", None))


def _check_map(mapping: Tensor, shape: tuple[int | None, int]) -> None:
    if mapping.ndim != 2 or mapping.shape[1] != shape[1] or shape[0] not in (None, mapping.shape[0]):
        raise ValueError(f"the token map must be {shape}, from the old to the new width; got {tuple(mapping.shape)}.")
    check_finite(mapping, "the token map")


def _read_weights(source: str, model: nn.Module, mapping: Tensor | None) -> dict[str, Tensor]:
    """Tensors of a saved adapter, checked by the file's header before any is read, and then mapped."""
    path = fetch(source, WEIGHTS)
    if path is None:
        raise Incompatible(source, f"it holds no {WEIGHTS}, and nothing else is read")
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter_state(model).items()}
    if mapping is not None:
        shapes = {key: (*shape[:-1], len(mapping)) for key, shape in shapes.items()}
    try:
        header = read_header(path)[1]
    except ValueError as error:
        raise Incompatible(source, f"{WEIGHTS} is damaged ({error})") from error
    for key, shape in shapes.items():
        if key not in header:
            raise Incompatible(source, f"its file lacks {key.removeprefix(_PREFIX)!r}")
        found = header[key][1]
        if found != shape:
            raise Incompatible(source, f"{key.removeprefix(_PREFIX)!r} is {found} in its file, not {shape}")
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in shapes}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise Incompatible(source, f"{key.removeprefix(_PREFIX)!r} is not finite")
    if mapping is not None:
        tensors = {key: tensor.float() @ mapping.cpu().float() for key, tensor in tensors.items()}
    return tensors
