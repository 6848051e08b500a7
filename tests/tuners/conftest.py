"""Fixtures of the adapters' tests."""

import copy
import functools
from types import SimpleNamespace

import pytest
from contract import ask, stir
from peft import get_peft_model
from transformers import AutoTokenizer

from hf_transmiter.encoders import dual_encoder
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.tuners.prompts import prompt_layer, texts


# Every new adapter looks for the tokenizer beside its model: here a thousand times in the same few folders.
READ_ONCE = {
    (texts, "AutoTokenizer"): SimpleNamespace(from_pretrained=functools.cache(AutoTokenizer.from_pretrained)),
    (dual_encoder, "load_processor"): functools.cache(dual_encoder.load_processor),
}


@pytest.fixture(autouse=True, scope="module")
def _read_tokenizers_once():
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), reader in READ_ONCE.items():
            patch.setattr(module, name, reader)
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


# The contract's models


@pytest.fixture
def new(encoders):
    """``new(root)``: a fresh model of that kind."""

    def make(root):
        return copy.deepcopy(encoders(root).model)

    return make


@pytest.fixture(scope="session")
def inputs(encoders, make_images):
    """``inputs(root)``: pixels and texts for it."""

    def make(root):
        encoder = encoders(root)
        texts = encoder.processor.tokenizer(
            ["cat.", "old dog."], padding="max_length", max_length=8, return_tensors="pt"
        )
        return {"pixel_values": encoder.preprocess(make_images(3)), **texts}

    known = {root: make(root) for root in ("clip", "siglip")}
    return known.__getitem__


@pytest.fixture(scope="session")
def known():
    return {}


@pytest.fixture
def tuned(new, inputs, known, tmp_path_factory):
    """``tuned(method, root)``: a PEFT model that answers unlike its base, its logits, and a folder it was saved to."""

    def make(method, root):
        key = id(method), root
        if key not in known:
            model = get_peft_model(new(root), method.make())
            ask(model, method, inputs(root))
            stir(model, method)
            folder = str(tmp_path_factory.mktemp("saved"))
            model.save_pretrained(folder)
            known[key] = model, folder
        model, folder = known[key]
        model = copy.deepcopy(model)
        return model, ask(model, method, inputs(root)), folder

    return make
