"""Adapters as PEFT methods. Importing this package registers them."""

from .prompts import CoOpConfig, CoOpLayer, CoOpModel
from .registration import PeftType, register
from .transmiter import TransMiterConfig, TransMiterLayer, TransMiterModel


__all__ = [
    "CoOpConfig",
    "CoOpLayer",
    "CoOpModel",
    "PeftType",
    "TransMiterConfig",
    "TransMiterLayer",
    "TransMiterModel",
    "register",
]
