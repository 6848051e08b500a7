"""Fixtures of the adapters' tests."""

import copy

import pytest
from peft import get_peft_model

from hf_transmiter.backbone import DualEncoder
from hf_transmiter.tuners.prompts import prompt_layer


@pytest.fixture(scope="session")
def encoders(model_dir):
    """``encoders(family="clip")``: read once; models are copied, not changed."""
    known = {}

    def get(family="clip"):
        if family not in known:
            known[family] = DualEncoder.from_pretrained(model_dir(family))
        return known[family]

    return get


@pytest.fixture
def prompted(encoders):
    """``prompted(config, family="clip")``: a fresh model with the prompt learner on it, and its layer."""

    def make(config, family="clip"):
        model = get_peft_model(copy.deepcopy(encoders(family).model), config)
        return model, prompt_layer(model)

    return make
