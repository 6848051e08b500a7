"""Puts a [`PromptLayer`] in the place of a dual encoder's token table and takes it off again."""

from __future__ import annotations

import re

from torch import nn

from ...encoders.families import FAMILIES, is_dual_encoder, shared_width, text_positions, unwrap
from ...encoders.identity import vocabulary_hash
from ..registration import Tuner, register
from . import config as configs
from . import learners
from .config import PromptConfig
from .layer import PromptLayer, takes_image_prompts
from .logits import prompt_layer, set_classes
from .texts import final_token_ids, load_tokenizer, phrase_token_ids


TOKEN_TABLES = {
    "clip": "text_model.embeddings.token_embedding",
    "siglip": "text_model.embeddings.token_embedding",
    "metaclip_2": "text_model.embeddings.token_embedding",
    "altclip": "text_model.roberta.embeddings.word_embeddings",
    "chinese_clip": "text_model.embeddings.word_embeddings",
    "open_clip": "text_model.embeddings.token_embedding",
}
"""Where each supported family keeps its token table.

Tokenizers that mark a space before a word only inside a text (Gemma's, of the SigLIP 2 checkpoints) give a name alone
other tokens than the same name after words; a context learns just as well there, but its first forward pass is not
exactly that of the written phrase.
"""

_WORDS = {
    "text_width": "the text tower is {new} wide, the one it was learnt on {old}",
    "vocabulary_size": "the tokenizer has {new} tokens, the one it was learnt with {old}",
    "vocabulary": "the tokenizer has other tokens than the one it was learnt with",
    "vision_width": "the image tower is {new} wide, the one it was learnt on {old}",
    "embed_dim": "embeddings have {new} dimensions, those it was learnt on {old}",
}


def base_facts(model: nn.Module, tokenizer=None) -> dict:
    """Sizes of a dual encoder that a prompt depends on, and the digest of its vocabulary (`None` if unknown)."""
    table = model.get_submodule(TOKEN_TABLES[model.config.model_type])
    table = getattr(table, "base_layer", table)
    return {
        "text_width": table.embedding_dim,
        "vocabulary_size": table.num_embeddings,
        "vocabulary": None if tokenizer is None else vocabulary_hash(tokenizer),
        "vision_width": model.config.vision_config.hidden_size,
        "embed_dim": shared_width(model),
    }


def misfit(config: PromptConfig, facts: dict) -> str | None:
    """Why an adapter cannot be attached to a model with these facts, `None` where nothing is against it."""
    known = config.base or {}
    for key in config.must_match:
        old, new = known.get(key), facts.get(key)
        if old is not None and new is not None and old != new:
            return _WORDS[key].format(old=old, new=new)
    return None


class PromptModel(Tuner):
    """PEFT tuner of all prompt learners; a learner is a subclass with its own `config` and `layer`,
    which registers it.

    The root is a transformers two-tower model (`TOKEN_TABLES` lists the families). Hooks on it make room for the
    context; `unload` removes them.

    Raises:
        ValueError: the model is no dual encoder of such a family or does not fit the adapter, another prompt learner
            is on it already, `init_phrase` meets a model without a tokenizer, or the adapter's name is part of the
            parameter prefix.
    """

    target_module_mapping = TOKEN_TABLES

    def __init_subclass__(cls, config: type[PromptConfig], layer: type[PromptLayer], **kwargs):
        super().__init_subclass__(**kwargs)
        cls.prefix, cls.tuner_layer_cls = layer.prefix, layer
        register(config.kind, config, cls)

    def set_classes(self, class_names: list[str], tokenizer=None) -> None:
        """See [`set_classes`](hf_transmiter.tuners.prompts.set_classes)."""
        set_classes(self.model, class_names, tokenizer)

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        family = model_config.get("model_type")
        if not is_dual_encoder(self.model) or family not in TOKEN_TABLES:
            supported = ", ".join(f"{FAMILIES[known]} ({known})" for known in TOKEN_TABLES)
            raise ValueError(
                f"prompt learning needs a whole two-tower model of a supported family, got "
                f"{type(self.model).__name__} of type {family!r}. Supported: {supported}."
            )
        if "vision_width" in peft_config.must_match and not takes_image_prompts(self.model):
            raise ValueError(
                f"{peft_config.peft_type.value} puts prompts into the image tower, which models of {FAMILIES[family]} "
                "do not take: use coop, kgcoop, cocoop or contcoop, or a model of transformers."
            )
        other = prompt_layer(self.model)
        if other is not None and type(other) is not self.tuner_layer_cls:
            raise ValueError(
                f"the model has a {other.prefix.rstrip('_')} adapter already, and two methods cannot share its token "
                "table: unload that one first."
            )
        tokenizer, known = self._learn_words(peft_config), peft_config.base
        facts = base_facts(self.model, tokenizer)
        wanted = known is None or known.get("vocabulary") is not None
        if tokenizer is None and wanted and misfit(peft_config, facts) is None:
            facts = base_facts(self.model, load_tokenizer(self.model))
        reason = misfit(peft_config, facts)
        if reason is not None:
            raise ValueError(
                f"this {peft_config.peft_type.value} adapter does not fit the model: {reason}. Load the model it was "
                "learnt on, or carry its class vectors over with hf_transmiter.extract and hf_transmiter.transfer."
            )
        known = {key: value for key, value in facts.items() if value is not None}
        peft_config.base = {**facts, **(peft_config.base or {}), **known}
        # Also inside a PeftModel, whose adapters stay as they are.
        peft_config.target_modules = rf"(base_model\.model\.)*{re.escape(TOKEN_TABLES[family])}"
        return peft_config

    def _learn_words(self, config: PromptConfig):
        """What only a tokenizer knows; a configuration that was saved has it all. The tokenizer, if it was needed."""
        phrase = config.init_phrase if config.init_token_ids is None else None
        period = config.reads_names and config.period_id is None
        if phrase is None and not period:
            return None
        tokenizer = load_tokenizer(self.model)
        if tokenizer is None:
            wanted = "init_token_ids = phrase_token_ids(tokenizer, phrase)" if phrase is not None else "period_id"
            cause = "init_phrase" if phrase is not None else "a learner that reads names"
            raise ValueError(
                f"{cause} needs a tokenizer and there is none beside the model ({self.model.config._name_or_path!r}): "
                f"load the model from a folder that has one, or give {wanted}."
            )
        if phrase is not None:
            config.start_from(phrase_token_ids(tokenizer, phrase))
        if period:
            config.period_id, config.end_id = final_token_ids(tokenizer)
        return tokenizer

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        root = unwrap(self.model)
        if isinstance(target, PromptLayer):
            target.update_layer(adapter_name, peft_config, root)
            return
        layer = self.tuner_layer_cls(target, root.config, text_positions(root))
        layer._active_adapter = self.active_adapters
        layer.update_layer(adapter_name, peft_config, root)
        self._replace_module(parent, target_name, layer, target)
        layer.attach(root)


for _name in ("CoOp", "KgCoOp", "CoCoOp", "ContCoOp", "IVLP", "PromptSRC", "MaPLe"):
    _parts = {"config": getattr(configs, f"{_name}Config"), "layer": getattr(learners, f"{_name}Layer")}
    _about = {"__module__": __name__, "__doc__": f"PEFT tuner of {_name}."}
    globals()[f"{_name}Model"] = type(PromptModel)(f"{_name}Model", (PromptModel,), _about, **_parts)
