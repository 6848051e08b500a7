"""The methods that the contract tests go over, and what these tests ask.

A new method joins by a line in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
    TransMiterConfig,
)


NAMES, AUXILIARY = ["cat", "dog", "car"], ["tree", "ship"]
PLAIN = "vision_model.encoder.layers.0.self_attn.q_proj"


@dataclass
class Method:
    """`make(**kwargs)` gives a config; `texts`: the method shows in calls with texts, not in calls without; `chosen`:
    the model answers about the classes that it was told by `set_classes`."""

    make: Callable
    roots: tuple[str, ...]
    texts: bool

    @property
    def chosen(self):
        return self.texts and self.prefix != "transmiter_"

    @property
    def prefix(self):
        return self.make().peft_type.value.lower() + "_"


def transmiter(**kwargs):
    return TransMiterConfig(class_names=NAMES, auxiliary_names=AUXILIARY, **kwargs)


def linear(**kwargs):
    return TransMiterConfig(class_names=NAMES, form="linear", **kwargs)


METHODS = {
    "mlp": Method(transmiter, ("clip", "siglip"), texts=False),
    "wide": Method(lambda **kwargs: transmiter(width=8, train_basis=True, **kwargs), ("clip",), texts=False),
    "text_side": Method(linear, ("clip",), texts=False),
    "image_side": Method(lambda **kwargs: linear(image_side=16, **kwargs), ("clip", "siglip"), texts=False),
    "image_side_tower": Method(lambda **kwargs: linear(image_side=48, **kwargs), ("clip", "siglip"), texts=True),
    "both_sides": Method(
        lambda **kwargs: linear(image_side=48, text_side=64, **kwargs), ("clip", "siglip"), texts=False
    ),
    "coop": Method(lambda **kwargs: CoOpConfig(n_ctx=4, **kwargs), ("clip", "siglip"), texts=True),
    "coop_middle": Method(lambda **kwargs: CoOpConfig(n_ctx=4, position="middle", **kwargs), ("clip",), texts=True),
    "coop_class_specific": Method(
        lambda **kwargs: CoOpConfig(n_ctx=2, class_specific=True, class_names=["cat", "old dog"], **kwargs),
        ("clip", "siglip"),
        texts=True,
    ),
    "coop_layer": Method(lambda **kwargs: CoOpConfig(init_phrase="a photo", layer=1, **kwargs), ("clip",), texts=True),
    "kgcoop": Method(KgCoOpConfig, ("clip",), texts=True),
    "cocoop": Method(CoCoOpConfig, ("clip", "siglip"), texts=True),
    "contcoop": Method(ContCoOpConfig, ("clip", "siglip"), texts=True),
    "contcoop_heads": Method(
        lambda **kwargs: ContCoOpConfig(heads=2, n_ctx=6, **kwargs),
        ("clip",),
        texts=True,
    ),
    "ivlp": Method(
        lambda **kwargs: IVLPConfig(text_depth=2, vision_depth=2, **kwargs), ("clip", "siglip"), texts=True
    ),
    "maple": Method(lambda **kwargs: MaPLeConfig(depth=2, **kwargs), ("clip", "siglip"), texts=True),
    "promptsrc": Method(
        lambda **kwargs: PromptSRCConfig(text_depth=2, vision_depth=1, **kwargs), ("clip",), texts=True
    ),
}
MATRIX = [pytest.param(method, root, id=f"{name}-{root}") for name, method in METHODS.items() for root in method.roots]
matrix = pytest.mark.parametrize(("method", "root"), MATRIX)


def call(method, inputs, texts=None):
    texts = method.texts if texts is None else texts
    return inputs if texts else {"pixel_values": inputs["pixel_values"]}


@torch.no_grad()
def ask(model, method, inputs, texts=None):
    """Logits of the kind of call the method shows in."""
    return model(**call(method, inputs, texts)).logits_per_image.clone()


def same(left, right):
    """Between models in different places of memory, whose matrix products round differently."""
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def stir(model, method, adapter="default", seed=0, std=0.3):
    """Gives the adapter weights that matter; returns their names."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for name, parameter in model.named_parameters():
        if method.prefix in name and f".{adapter}" in name and "anchors" not in name:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
            if "transmiter_basis" in name:  # another one than the seed gives, and a basis still
                parameter.data.copy_(torch.linalg.qr(parameter.data)[0])
            changed.append(name)
    assert changed
    return changed


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
