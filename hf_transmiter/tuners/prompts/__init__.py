"""Prompt learners: vectors in the token-embedding space of a text tower, learnt instead of written.

The names stay words: prompts of a model tuned this way are ``"{}."``, the learnt context comes beside them by itself.
"""

from ..registration import PeftType, register
from .config import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptConfig,
    PromptSRCConfig,
)
from .layer import PromptLayer, layers
from .logits import (
    class_contexts,
    class_vectors,
    image_conditioned,
    image_conditioned_logits,
    prompt_layer,
    set_classes,
)
from .model import (
    CoCoOpModel,
    ContCoOpModel,
    CoOpModel,
    IVLPModel,
    KgCoOpModel,
    MaPLeModel,
    PromptSRCModel,
)
from .texts import class_inputs, phrase_token_ids


register(PeftType.COOP, CoOpConfig, CoOpModel)
register(PeftType.KGCOOP, KgCoOpConfig, KgCoOpModel)
register(PeftType.COCOOP, CoCoOpConfig, CoCoOpModel)
register(PeftType.CONTCOOP, ContCoOpConfig, ContCoOpModel)
register(PeftType.IVLP, IVLPConfig, IVLPModel)
register(PeftType.MAPLE, MaPLeConfig, MaPLeModel)
register(PeftType.PROMPTSRC, PromptSRCConfig, PromptSRCModel)

__all__ = [
    "CoCoOpConfig",
    "CoOpConfig",
    "ContCoOpConfig",
    "IVLPConfig",
    "KgCoOpConfig",
    "MaPLeConfig",
    "PromptConfig",
    "PromptLayer",
    "PromptSRCConfig",
    "class_contexts",
    "class_inputs",
    "class_vectors",
    "image_conditioned",
    "image_conditioned_logits",
    "layers",
    "phrase_token_ids",
    "prompt_layer",
    "set_classes",
]
