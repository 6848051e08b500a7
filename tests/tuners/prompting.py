"""Helpers and fixtures of the prompt learners' tests."""

import torch

from hf_transmiter.tuners.prompts import class_inputs


NAMES = ["cat", "big red dog", "old x3 car"]
PHRASE = "a photo of a"


def inputs_of(encoder, names=NAMES):
    """Tokenised ``"{}."``, as the family is."""
    return class_inputs(names, encoder.processor.tokenizer, encoder.family, encoder.context_length, 0)


def features(model, encoder, names=NAMES):
    """Projected text features (C, d) of ``"{}."``."""
    return model.get_text_features(**inputs_of(encoder, names)).pooler_output


def parameters(model, adapter="default"):
    """The adapter's parameters by what they are: ``ctx``, ``text``, ``down.weight`` …"""
    found = {}
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name:
            store, _, rest = name.partition(f".{adapter}")
            found[store.rpartition(".")[2].partition("_")[2] + rest] = parameter
    return found


def stir(model, std=0.3, seed=0):
    """Random weights for the adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters(model).values():
        parameter.data = std * torch.randn(parameter.shape, generator=generator)


def close(left, right, atol=1e-5):
    torch.testing.assert_close(left, right, atol=atol, rtol=1e-5)
