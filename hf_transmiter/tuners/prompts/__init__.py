"""Prompt learners: vectors in the token-embedding space of a text tower, learnt instead of written.

The names stay words: prompts of a model tuned this way are ``"{}."``, the learnt context comes before them by itself.
"""

from ..registration import PeftType, register
from .config import CoOpConfig, PromptConfig
from .layer import CoOpLayer, PromptLayer
from .model import CoOpModel, PromptModel, phrase_token_ids


register(PeftType.COOP, CoOpConfig, CoOpModel)

__all__ = [
    "CoOpConfig",
    "CoOpLayer",
    "CoOpModel",
    "PromptConfig",
    "PromptLayer",
    "PromptModel",
    "phrase_token_ids",
]
