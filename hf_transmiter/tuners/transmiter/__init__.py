"""The TransMiter adapter (arXiv 2508.08604): what a fine-tuning changed, on the logits of a dual encoder."""

from ..registration import PeftType, register
from .config import TransMiterConfig
from .layer import TransMiterLayer
from .model import TransMiterModel


register(PeftType.TRANSMITER, TransMiterConfig, TransMiterModel)

__all__ = ["TransMiterConfig", "TransMiterLayer", "TransMiterModel"]
