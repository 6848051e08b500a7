"""What every PEFT method of this package owes its users about files and state dicts."""

import json

import pytest
import torch
from contract import ask, matrix, same, stir
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModel

from hf_transmiter.tuners import PeftType, inject, save_adapter


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


@matrix
def test_auto_peft_model(method, root, inputs, tuned, model_dir):
    _, answer, folder = tuned(method, root)
    assert PeftConfig.from_pretrained(folder).base_model_name_or_path == model_dir(root)
    same(ask(AutoPeftModel.from_pretrained(folder), method, inputs(root)), answer)


@matrix
def test_transformers_own_adapters(method, root, new, inputs, tuned, tmp_path, transformers_adapters):
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
def test_injected_and_saved_by_ourselves(method, root, new, inputs, tuned, tmp_path):
    _, answer, folder = tuned(method, root)
    model = new(root)
    inject(model, method.make())
    ask(model, method, inputs(root))
    stir(model, method)
    same(ask(model, method, inputs(root)), answer)
    save_adapter(model, tmp_path / "saved")
    tensors, expected = (load_file(f"{place}/adapter_model.safetensors") for place in (tmp_path / "saved", folder))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    same(ask(PeftModel.from_pretrained(new(root), str(tmp_path / "saved")), method, inputs(root)), answer)
    with pytest.raises(ValueError, match="has adapters already: merge or unload them"):
        inject(model, method.make())


def test_nothing_to_save(new, tmp_path):
    with pytest.raises(ValueError, match="no adapter to save: tune the model, or attach an adapter to it"):
        save_adapter(new("clip"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@matrix
def test_state_dicts(method, root, new, inputs, tuned):
    model, answer, folder = tuned(method, root)
    state = get_peft_model_state_dict(model)
    assert state.keys() == load_file(f"{folder}/adapter_model.safetensors").keys()
    other = get_peft_model(new(root), method.make())
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    same(ask(other, method, inputs(root)), answer)
