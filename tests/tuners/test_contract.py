"""What every PEFT method of this package owes its users, over every kind of model it goes on: one matrix.

The methods are listed in `contract.METHODS`.
"""

import copy
import pickle

import pytest
import torch
from contract import MATRIX, METHODS, PLAIN, ask, call, hooks, matrix, same, stir
from peft import (
    LoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer


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
def test_gradient_checkpointing(method, root, new, inputs):
    """Activations computed twice give the same gradients."""
    model = get_peft_model(new(root), method.make()).train()
    given, gradients = call(method, inputs(root)), []
    with torch.no_grad():
        model(**given)  # some build themselves in their first call
    stir(model, method)
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.zero_grad()
        model(**given).logits_per_image.log_softmax(1)[:, 0].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(value.any() for value in gradients[0].values())
    for name, value in gradients[0].items():
        same(gradients[1][name], value)


@pytest.mark.parametrize(("method", "root"), [case for case in MATRIX if case.values[0].chosen])
def test_the_order_of_classes(method, root, inputs, tuned):
    """Classes in another order: columns in another order, nothing else."""
    model, answer, _ = tuned(method, root)
    turned = {key: value.flip(0) if key != "pixel_values" else value for key, value in inputs(root).items()}
    same(ask(model, method, turned), answer.flip(1))
    model.set_classes(["cat", "old dog"])
    asked = ask(model, method, inputs(root), texts=False)
    model.set_classes(["old dog", "cat"])
    same(ask(model, method, inputs(root), texts=False), asked.flip(1))
    assert (asked[:, 0] - asked[:, 1]).abs().max() > 1e-3


@matrix
def test_disable_adapter(method, root, new, inputs):
    model = new(root)
    before = ask(model, method, inputs(root), texts=True)
    model = get_peft_model(model, method.make())
    ask(model, method, inputs(root))
    stir(model, method)
    answer = ask(model, method, inputs(root))
    with model.disable_adapter():
        assert torch.equal(ask(model, method, inputs(root), texts=True), before)
        assert (ask(model, method, inputs(root)) - answer).abs().max() > 1e-3
    assert torch.equal(ask(model, method, inputs(root)), answer)


@matrix
def test_unload_leaves_the_model_as_it_was(method, root, new, inputs):
    base = new(root)
    keys, number, answer = list(base.state_dict()), hooks(base), ask(base, method, inputs(root), texts=True)
    model = get_peft_model(base, method.make())
    stir(model, method)
    adapted = ask(model, method, inputs(root))
    with pytest.raises(NotImplementedError, match=r"use unload\(\)"):
        model.merge_and_unload()
    assert torch.equal(ask(model, method, inputs(root)), adapted)  # refusing to merge changed nothing
    back = model.unload()
    assert back is base and list(back.state_dict()) == keys and hooks(back) == number
    assert not any(isinstance(module, BaseTunerLayer) for module in back.modules())
    assert torch.equal(ask(back, method, inputs(root), texts=True), answer)
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


# Copies and company


@matrix
def test_copies_are_independent(method, root, inputs, tuned):
    model, answer, _ = tuned(method, root)
    before = copy.deepcopy(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(ask(twin, method, inputs(root)), answer)
        stir(twin, method, seed=2)
        changed = ask(twin, method, inputs(root))
        assert not torch.equal(changed, answer)
        assert torch.equal(ask(model, method, inputs(root)), answer)
        stir(model, method, seed=3)
        assert torch.equal(ask(twin, method, inputs(root)), changed)
        model.load_state_dict(before)
        assert torch.equal(ask(model, method, inputs(root)), answer)


@matrix
def test_beside_a_lora(method, root, new, inputs):
    model = new(root)
    given = inputs(root)
    plain = ask(model, method, given, texts=True)
    inject_adapter_in_model(LoraConfig(target_modules=PLAIN, init_lora_weights=False), model, "lora")
    lora = ask(model, method, given, texts=True)
    inject_adapter_in_model(method.make(), model, "own")
    set_adapter(model, "own")
    ask(model, method, given)
    stir(model, method, "own")
    own = ask(model, method, given)
    set_adapter(model, ["own", "lora"])
    both = ask(model, method, given)
    assert (both - own).abs().max() > 1e-4
    set_adapter(model, "lora")
    assert torch.equal(ask(model, method, given, texts=True), lora) and not torch.equal(lora, plain)
    set_adapter(model, "own")
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
