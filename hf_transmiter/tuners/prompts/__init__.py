"""Prompt learners: vectors in the token-embedding space of a text tower, learnt instead of written.

The names stay words: prompts of a model tuned this way are ``"{}."``, the learnt context comes beside them by itself.
"""

from .config import PromptConfig
from .layer import PromptLayer, layers
from .logits import (
    class_vectors,
    image_conditioned,
    image_conditioned_logits,
    prompt_layer,
    set_classes,
)
from .model import PromptModel  # with its subclasses, which register the methods
from .texts import class_inputs, phrase_token_ids


__all__ = [
    "PromptConfig",
    "PromptLayer",
    "PromptModel",
    "class_inputs",
    "class_vectors",
    "image_conditioned",
    "image_conditioned_logits",
    "layers",
    "phrase_token_ids",
    "prompt_layer",
    "set_classes",
]
