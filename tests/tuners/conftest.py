"""Fixtures of the adapters' tests."""

import copy
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
from peft import get_peft_model
from transformers import AutoTokenizer

from hf_transmiter import backbone
from hf_transmiter.backbone import DualEncoder
from hf_transmiter.tuners.prompts import prompt_layer, texts


@pytest.fixture(autouse=True, scope="session")
def _read_tokenizers_once():
    """Every new adapter looks for the tokenizer beside its model: here a thousand times in the same few folders."""
    read = SimpleNamespace(from_pretrained=functools.cache(AutoTokenizer.from_pretrained))
    processors = functools.cache(backbone._load_processor)
    with mock.patch.object(texts, "AutoTokenizer", read), mock.patch.object(backbone, "_load_processor", processors):
        yield


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
def fresh(encoders):
    """``fresh(family="clip")``: an encoder whose model the test may change."""

    def make(family="clip"):
        return DualEncoder(copy.deepcopy(encoders(family).model), encoders(family).processor)

    return make


@pytest.fixture
def encoder(fresh):
    """A fresh tiny CLIP."""
    return fresh()


@pytest.fixture
def prompted(fresh):
    """``prompted(config, family="clip")``: a fresh model with the prompt learner on it, and its layer."""

    def make(config, family="clip"):
        model = get_peft_model(fresh(family).model, config)
        return model, prompt_layer(model)

    return make
