"""Puts a [`PromptLayer`] in the place of a dual encoder's token table and takes it off again."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import AutoTokenizer

from ...families import FAMILIES, SIGLIP, is_dual_encoder, text_positions
from .config import PromptConfig
from .layer import CoOpLayer, PromptLayer


TOKEN_TABLES = {
    "clip": "text_model.embeddings.token_embedding",
    "siglip": "text_model.embeddings.token_embedding",
    "metaclip_2": "text_model.embeddings.token_embedding",
    "altclip": "text_model.roberta.embeddings.word_embeddings",
    "chinese_clip": "text_model.embeddings.word_embeddings",
}
"""Where each supported family keeps its token table.

Tokenizers that mark a space before a word only inside a text (Gemma's, of the SigLIP 2 checkpoints) give a name alone
other tokens than the same name after words; a context learns just as well there, but its first forward pass is not
exactly that of the written phrase.
"""


def phrase_token_ids(tokenizer, phrase: str) -> list[int]:
    """Token ids of a phrase without start and end tokens, as they would stand before a name.

    Raises:
        ValueError: the phrase has no token.
    """
    ids = tokenizer(phrase, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the phrase {phrase!r} has no token to start the context from.")
    return list(ids)


class PromptModel(BaseTuner):
    """PEFT tuner of all prompt learners; a learner is a subclass that names its layer and its prefix.

    The root is a transformers two-tower model (`TOKEN_TABLES` lists the families). A hook before the text tower makes
    room for the context; `unload` removes it.

    Raises:
        ValueError: the model is no dual encoder of such a family, `init_phrase` meets a model without a tokenizer, or
            the adapter's name is part of the parameter prefix.
    """

    target_module_mapping = TOKEN_TABLES

    def _check_new_adapter_config(self, config: PromptConfig) -> None:
        super()._check_new_adapter_config(config)
        name = next((name for name, known in self.peft_config.items() if known is config), "")
        if name and (name in self.prefix or self.prefix in name):
            raise ValueError(f"the adapter name {name!r} clashes with the prefix {self.prefix!r}: choose another one.")

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        family = model_config.get("model_type")
        if not is_dual_encoder(self.model) or family not in TOKEN_TABLES:
            supported = ", ".join(f"{FAMILIES[known]} ({known})" for known in TOKEN_TABLES)
            raise ValueError(
                f"prompt learning needs a whole two-tower model of a supported family, got "
                f"{type(self.model).__name__} of type {family!r}. Supported: {supported}."
            )
        if peft_config.init_phrase is not None and peft_config.init_token_ids is None:
            peft_config.init_token_ids = phrase_token_ids(self._tokenizer(), peft_config.init_phrase)
            peft_config.n_ctx = len(peft_config.init_token_ids)
        peft_config.target_modules = TOKEN_TABLES[family]
        return peft_config

    def _tokenizer(self):
        config = self.model.config
        try:
            return AutoTokenizer.from_pretrained(
                config._name_or_path, revision=getattr(config, "_commit_hash", None), trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"init_phrase needs a tokenizer and there is none beside the model ({config._name_or_path!r}): load "
                "the model from a folder that has one, or give init_token_ids = phrase_token_ids(tokenizer, phrase)."
            ) from error

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, PromptLayer):
            target.update_layer(adapter_name, peft_config)
            return
        start = 0 if self.model.config.model_type in SIGLIP else 1
        layer = self.tuner_layer_cls(target, text_positions(self.model), start)
        layer._active_adapter = self.active_adapters
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)
        layer.hooks.append(self.model.text_model.register_forward_pre_hook(layer.insert, with_kwargs=True))

    def _post_injection_hook(self, model: nn.Module, config: PromptConfig, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        config.target_modules = None

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            raise NotImplementedError("a learnt context cannot be merged into the token table; use unload().")
        for module in self.model.modules():
            if isinstance(module, PromptLayer):
                for hook in module.hooks:
                    hook.remove()
        return super()._unload_and_optionally_merge(merge=False, **kwargs)


class CoOpModel(PromptModel):
    """PEFT tuner of CoOp."""

    prefix = "coop_"
    tuner_layer_cls = CoOpLayer
