"""Adapters as PEFT methods. Importing this package registers them."""

from .registration import PeftType, register
from .transmiter import TransMiterConfig, TransMiterLayer, TransMiterModel


__all__ = ["PeftType", "TransMiterConfig", "TransMiterLayer", "TransMiterModel", "register"]
