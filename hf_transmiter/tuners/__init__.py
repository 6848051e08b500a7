"""Adapters as PEFT methods. Importing this package registers them."""

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
