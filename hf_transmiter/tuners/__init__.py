"""Adapters as PEFT methods. Importing this package registers them.

Beside a LoRA (or another PEFT method that changes layers) they work in every order: `get_peft_model` for one and
`inject_adapter_in_model` for the other on its `get_base_model()`, or a `PeftModel` of each around one model, made or
loaded; `peft.functional.set_adapter(model, [...])` says which answer. A merge or unload of the one leaves the other.
PEFT itself does not allow two types in one `PeftModel` (`add_adapter`, `mixed=True`), and loads a LoRA's file into a
model, not into a `PeftModel` around it. A LoRA of the token table must be there before a prompt learner.

State of a call is never on a module: threads and `nn.DataParallel` may share a model, `torch.export` takes it
(``strict=False``, any number of pictures; a fresh adapter after its first call).
"""

from .injection import inject, save_adapter
from .prompts import set_classes
from .prompts.config import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
)
from .registration import PeftType, register
from .transmiter import TransMiterConfig, TransMiterLayer, TransMiterModel


__all__ = [
    "CoCoOpConfig",
    "CoOpConfig",
    "ContCoOpConfig",
    "IVLPConfig",
    "KgCoOpConfig",
    "MaPLeConfig",
    "PeftType",
    "PromptSRCConfig",
    "TransMiterConfig",
    "TransMiterLayer",
    "TransMiterModel",
    "inject",
    "register",
    "save_adapter",
    "set_classes",
]
