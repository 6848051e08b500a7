"""What every PEFT method of this package owes its users, over every kind of model it goes on: one matrix.

A new method joins by a line in `METHODS`.
"""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModel

from hf_transmiter.anchors import Anchors
from hf_transmiter.backbone import DualEncoder
from hf_transmiter.classifier import AnchorClassifier
from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PeftType,
    PromptSRCConfig,
    TransMiterConfig,
)


NAMES, AUXILIARY = ["cat", "dog", "car"], ["tree", "ship"]
PLAIN = "vision_model.encoder.layers.0.self_attn.q_proj"


@dataclass
class Method:
    """`make(**kwargs)` gives a config; `texts`: the method shows in calls with texts, not in calls without."""

    make: Callable
    roots: tuple[str, ...]
    texts: bool

    @property
    def prefix(self):
        return self.make().peft_type.value.lower() + "_"


def transmiter(**kwargs):
    return TransMiterConfig(class_names=NAMES, auxiliary_names=AUXILIARY, **kwargs)


METHODS = {
    "mlp": Method(transmiter, ("clip", "siglip", "classifier"), texts=False),
    "wide": Method(lambda **kwargs: transmiter(width=8, train_basis=True, **kwargs), ("clip",), texts=False),
    "class_vectors": Method(
        lambda **kwargs: TransMiterConfig(class_names=NAMES, form="class_vectors", **kwargs),
        ("clip", "classifier"),
        texts=False,
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
    "contcoop_offset": Method(
        lambda **kwargs: ContCoOpConfig(
            context_offset=True, class_embed="mean_token", attend_context=True, zero_init=False, **kwargs
        ),
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
RAW = [pytest.param(method, root, id=f"{name}-{root}") for name, method in METHODS.items() for root in method.roots
       if root != "classifier"]  # fmt: skip
matrix, raw = (pytest.mark.parametrize(("method", "root"), cases) for cases in (MATRIX, RAW))


@pytest.fixture(scope="module")
def encoders(model_dir):
    return {family: DualEncoder.from_pretrained(model_dir(family)) for family in ("clip", "siglip")}


@pytest.fixture
def new(encoders):
    """``new(root)``: a fresh model of that kind."""

    def make(root):
        encoder = encoders["clip" if root == "classifier" else root]
        model = copy.deepcopy(encoder.model)
        return (
            AnchorClassifier(DualEncoder(model, encoder.processor), Anchors(NAMES)) if root == "classifier" else model
        )

    return make


@pytest.fixture(scope="module")
def inputs(encoders, make_images):
    """``inputs(root)``: pixels and texts for it."""

    def make(root):
        encoder = encoders["clip" if root == "classifier" else root]
        texts = encoder.processor.tokenizer(
            ["cat.", "old dog."], padding="max_length", max_length=8, return_tensors="pt"
        )
        return {"pixel_values": encoder.preprocess(make_images(3)), **texts}

    known = {root: make(root) for root in ("clip", "siglip", "classifier")}
    return known.__getitem__


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
            changed.append(name)
    assert changed
    return changed


@pytest.fixture(scope="module")
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


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# What it changes, and how it goes


@matrix
def test_only_the_adapter_trains_and_training_shows(method, root, new, inputs):
    model = get_peft_model(new(root), method.make())
    before = ask(model, method, inputs(root))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(method.prefix in name for name in trainable)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    given = call(method, inputs(root))
    for _ in range(2):  # the last layer starts at zero: the ones before it move from the second step on
        optimizer.zero_grad()
        model(**given).logits_per_image.log_softmax(1)[:, 0].sum().neg().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, values[name])}
    assert changed == trainable
    assert not torch.equal(ask(model, method, inputs(root)), before)


@matrix
def test_disable_adapter(method, root, new, inputs):
    model, texts = new(root), root != "classifier"
    before = ask(model, method, inputs(root), texts)
    model = get_peft_model(model, method.make())
    ask(model, method, inputs(root))
    stir(model, method)
    answer = ask(model, method, inputs(root))
    with model.disable_adapter():
        without = ask(model, method, inputs(root), texts)
        if texts:
            assert torch.equal(without, before)
        same(without, before)  # a classifier's names were embedded in another batch
        assert (ask(model, method, inputs(root)) - answer).abs().max() > 1e-3
    assert torch.equal(ask(model, method, inputs(root)), answer)


@matrix
def test_unload_leaves_the_model_as_it_was(method, root, new, inputs):
    base, texts = new(root), root != "classifier"
    keys, number, answer = list(base.state_dict()), hooks(base), ask(base, method, inputs(root), texts)
    model = get_peft_model(base, method.make())
    stir(model, method)
    adapted = ask(model, method, inputs(root))
    with pytest.raises(NotImplementedError, match=r"use unload\(\)"):
        model.merge_and_unload()
    assert torch.equal(ask(model, method, inputs(root)), adapted)  # refusing to merge changed nothing
    back = model.unload()
    assert back is base and list(back.state_dict()) == keys and hooks(back) == number
    assert not any(isinstance(module, BaseTunerLayer) for module in back.modules())
    assert torch.equal(ask(back, method, inputs(root), texts), answer)
    again = get_peft_model(back, method.make())
    stir(again, method)
    ask(again, method, inputs(root))


@matrix
def test_several_adapters(method, root, inputs, tuned, tmp_path):
    model, first, _ = tuned(method, root)
    model.add_adapter("second", method.make(seed=5))
    assert torch.equal(ask(model, method, inputs(root)), first)  # added, not active
    model.set_adapter("second")
    ask(model, method, inputs(root))
    stir(model, method, "second", seed=1)
    second = ask(model, method, inputs(root))
    assert (second - first).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(ask(model, method, inputs(root)), first)
    model.save_pretrained(str(tmp_path / "both"))
    model.load_adapter(str(tmp_path / "both" / "second"), adapter_name="third")
    model.set_adapter("third")
    same(ask(model, method, inputs(root)), second)
    model.delete_adapter("second")
    model.delete_adapter("third")
    assert not [name for name, _ in model.named_parameters() if "second" in name or "third" in name]
    model.set_adapter("default")
    assert torch.equal(ask(model, method, inputs(root)), first)


@matrix
def test_hot_swap(method, root, inputs, tuned):
    """Loading over a live adapter replaces its weights."""
    model, first, folder = tuned(method, root)
    stir(model, method, seed=1)
    assert not torch.equal(ask(model, method, inputs(root)), first)
    model.load_adapter(folder, adapter_name="default")
    same(ask(model, method, inputs(root)), first)


# Files


@matrix
def test_save_and_load(method, root, new, inputs, tuned):
    model, answer, folder = tuned(method, root)
    config = PeftConfig.from_pretrained(folder)
    assert config.peft_type == method.make().peft_type and isinstance(config.peft_type, PeftType)
    assert config.target_modules is None
    state = get_peft_model_state_dict(model)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(new(root), folder, **options)
        same(ask(loaded, method, inputs(root)), answer)
        own = get_peft_model_state_dict(loaded, adapter_name=options.get("adapter_name", "default"))
        assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)
        assert any(p.requires_grad for p in loaded.parameters()) is bool(options.get("is_trainable"))
        assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


@matrix
def test_keys_carry_no_adapter_name(method, root, new, tmp_path):
    get_peft_model(new(root), method.make(), adapter_name="mine").save_pretrained(str(tmp_path))
    folder = tmp_path / "mine"
    keys = load_file(folder / "adapter_model.safetensors")
    assert keys and all(key.startswith("base_model.model.") and method.prefix in key for key in keys)
    assert not [key for key in keys if "mine" in key or "default" in key]
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == method.make().peft_type.value


@raw
def test_auto_peft_model(method, root, inputs, tuned, model_dir):
    _, answer, folder = tuned(method, root)
    assert PeftConfig.from_pretrained(folder).base_model_name_or_path == model_dir(root)
    same(ask(AutoPeftModel.from_pretrained(folder), method, inputs(root)), answer)


@raw
def test_transformers_own_adapters(method, root, new, inputs, tuned, tmp_path):
    _, answer, folder = tuned(method, root)
    model = new(root)
    plain = ask(model, method, inputs(root), True)
    model.load_adapter(folder)
    same(ask(model, method, inputs(root)), answer)
    model.disable_adapters()
    assert not torch.equal(ask(model, method, inputs(root)), answer)
    model.enable_adapters()
    same(ask(model, method, inputs(root)), answer)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(new(root), str(tmp_path / "again"))
    same(ask(again, method, inputs(root)), answer)
    model.delete_adapter("default")
    assert torch.equal(ask(model, method, inputs(root), True), plain)
    fresh = new(root)
    fresh.add_adapter(method.make())
    ask(fresh, method, inputs(root))
    stir(fresh, method)
    same(ask(fresh, method, inputs(root)), answer)
    same(ask(AutoModel.from_pretrained(folder), method, inputs(root)), answer)


@matrix
def test_state_dicts(method, root, new, inputs, tuned):
    model, answer, folder = tuned(method, root)
    state = get_peft_model_state_dict(model)
    assert state.keys() == load_file(f"{folder}/adapter_model.safetensors").keys()
    other = get_peft_model(new(root), method.make())
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    same(ask(other, method, inputs(root)), answer)


# Copies and company


@matrix
def test_copies_are_independent(method, root, inputs, tuned):
    model, answer, _ = tuned(method, root)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(ask(twin, method, inputs(root)), answer)
        stir(twin, method, seed=2)
        changed = ask(twin, method, inputs(root))
        assert not torch.equal(changed, answer)
        assert torch.equal(ask(model, method, inputs(root)), answer)
        stir(model, method, seed=3)
        assert torch.equal(ask(twin, method, inputs(root)), changed)
        stir(model, method, seed=3, std=-0.3)  # and back
        answer = ask(model, method, inputs(root))


@raw
def test_beside_a_lora(method, root, new, inputs):
    model = new(root)
    given = inputs(root)
    plain = ask(model, method, given, texts=True)
    model.add_adapter(LoraConfig(target_modules=PLAIN, init_lora_weights=False), adapter_name="lora")
    lora = ask(model, method, given, texts=True)
    model.add_adapter(method.make(), adapter_name="own")
    model.set_adapter("own")
    ask(model, method, given)
    stir(model, method, "own")
    own = ask(model, method, given)
    model.set_adapter(["own", "lora"])
    both = ask(model, method, given)
    assert (both - own).abs().max() > 1e-4
    model.set_adapter("lora")
    assert torch.equal(ask(model, method, given, texts=True), lora) and not torch.equal(lora, plain)
    model.set_adapter("own")
    assert torch.equal(ask(model, method, given), own)


@matrix
def test_half_precision(method, root, new, inputs):
    model = new(root).to(torch.bfloat16)
    given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs(root).items()}
    model = get_peft_model(model, method.make())
    ask(model, method, given)
    stir(model, method)
    answer = ask(model, method, given)
    assert torch.isfinite(answer.float()).all()
    assert {p.dtype for name, p in model.named_parameters() if method.prefix in name} == {torch.float32}
    with model.disable_adapter():
        assert not torch.equal(ask(model, method, given), answer)


# Errors


@matrix
def test_a_name_that_is_part_of_the_prefix(method, root, new):
    for name in (method.prefix[:2], method.prefix + "x"):
        with pytest.raises(ValueError, match=f"the adapter name '{name}' clashes .* choose another one"):
            get_peft_model(new(root), method.make(), adapter_name=name)


@pytest.mark.parametrize("name", METHODS)
def test_one_tower_is_not_enough(name, new):
    with pytest.raises(ValueError, match="two-tower model"):
        get_peft_model(new("clip").vision_model, METHODS[name].make())
