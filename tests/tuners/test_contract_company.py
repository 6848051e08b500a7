"""An adapter of this package beside a LoRA, in every order that PEFT allows: the same answers."""

import pytest
import torch
from contract import METHODS, ask, same, stir
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.lora import LoraLayer


BESIDE = ("mlp", "text_side", "image_side", "image_side_tower", "coop", "ivlp", "maple")
beside = pytest.mark.parametrize("name", BESIDE)


def lora(targets=("q_proj", "v_proj", "visual_projection"), **options):
    return LoraConfig(target_modules=list(targets), init_lora_weights=False, **options)


@pytest.fixture
def both(new, inputs):
    """``both(name, targets)``: method, inputs, and what takes the weights of both adapters over to another model; with
    their answers together and alone."""

    def make(name, *targets):
        method, given = METHODS[name], inputs("clip")
        model = new("clip")
        torch.manual_seed(1)
        inject_adapter_in_model(lora(*targets), model, "lora")
        inject_adapter_in_model(method.make(), model, "own")
        set_adapter(model, ["own", "lora"])
        ask(model, method, given)
        stir(model, method, "own")
        together = ask(model, method, given)
        set_adapter(model, "own")
        alone = ask(model, method, given)
        assert (together - alone).abs().max() > 1e-3
        learnt = {
            name: p.detach().clone() for name, p in model.named_parameters() if ".own" in name or ".lora" in name
        }

        def plain(key):
            return key.replace("base_model.model.", "").replace(".base_layer", "")

        def take(other, active=("own", "lora")):
            learnable = {plain(key): value for key, value in learnt.items()}
            own = {plain(key): p for key, p in other.named_parameters() if ".own" in key or ".lora" in key}
            assert own.keys() <= learnable.keys() and own
            if any(".own" in key for key in own):
                ask(other, method, given)  # names that are not embedded yet would be, later
            for key, parameter in own.items():
                parameter.data.copy_(learnable[key])
            if active:
                set_adapter(getattr(other, "get_base_model", lambda: other)(), list(active))
            return other

        return method, given, take, together, alone

    return make


def first_lora(model, method):
    peft = get_peft_model(model, lora(), adapter_name="lora")
    inject_adapter_in_model(method.make(), peft.get_base_model(), "own")
    return peft


def first_own(model, method):
    peft = get_peft_model(model, method.make(), adapter_name="own")
    inject_adapter_in_model(lora(), peft.get_base_model(), "lora")
    return peft


def injected(model, method):
    inject_adapter_in_model(method.make(), model, "own")
    inject_adapter_in_model(lora(), model, "lora")
    return model


def one_in_the_other(model, method):
    return get_peft_model(get_peft_model(model, lora(), adapter_name="lora"), method.make(), adapter_name="own")


def the_other_in_the_one(model, method):
    return get_peft_model(get_peft_model(model, method.make(), adapter_name="own"), lora(), adapter_name="lora")


def two_around_one(model, method):
    peft = get_peft_model(model, method.make(), adapter_name="own")
    return get_peft_model(peft.get_base_model(), lora(), adapter_name="lora")


ORDERS = (first_lora, first_own, injected, one_in_the_other, the_other_in_the_one, two_around_one)


@pytest.mark.parametrize("order", ORDERS)
@beside
def test_every_order(name, order, both, new):
    method, given, take, together, alone = both(name)
    nested = order in (one_in_the_other, the_other_in_the_one)
    model = take(order(new("clip"), method), active=() if nested else ("own", "lora"))
    same(ask(model, method, given), together)
    if not nested:
        root = getattr(model, "get_base_model", lambda: model)()
        set_adapter(root, "own")
        same(ask(model, method, given), alone)
        set_adapter(root, ["lora", "own"])
        same(ask(model, method, given), together)
    if isinstance(model, PeftModel):
        plain = ask(new("clip"), method, given, texts=True)
        with model.disable_adapter():
            if not nested:
                same(ask(model, method, given, texts=True), plain)
        same(ask(model, method, given), together)


@beside
def test_both_from_files_in_either_order(name, both, new, tmp_path):
    method, given, take, together, _ = both(name)
    take(get_peft_model(new("clip"), lora(), adapter_name="lora"), ("lora",)).save_pretrained(tmp_path)
    take(get_peft_model(new("clip"), method.make(), adapter_name="own"), ("own",)).save_pretrained(tmp_path)
    for order in (("lora", "own"), ("own", "lora")):
        model = new("clip")
        for adapter in order:
            PeftModel.from_pretrained(model, str(tmp_path / adapter), adapter_name=adapter)
        set_adapter(model, ["own", "lora"])
        same(ask(model, method, given), together)
    inside = PeftModel.from_pretrained(new("clip"), str(tmp_path / "lora"), adapter_name="lora")
    nested = PeftModel.from_pretrained(inside, str(tmp_path / "own"), adapter_name="own")
    same(ask(nested, method, given), together)


@beside
def test_merging_and_unloading_one_leaves_the_other(name, both, new):
    method, given, take, together, alone = both(name)
    for order in (first_lora, two_around_one):
        merged = take(order(new("clip"), method)).merge_and_unload()
        same(ask(merged, method, given), together)
        assert not any(isinstance(module, LoraLayer) for module in merged.modules())
        back = take(order(new("clip"), method)).unload()
        same(ask(back, method, given), alone)
    model = new("clip")
    inject_adapter_in_model(lora(), model, "lora")
    plain = take(model, ("lora",))
    expected = ask(plain, METHODS["coop"], given)
    own = take(first_own(new("clip"), method))
    set_adapter(own.get_base_model(), "lora")
    root = own.unload()
    same(ask(root, METHODS["coop"], given), expected)
    assert any(isinstance(module, LoraLayer) for module in root.modules())
    assert list(root.peft_config) == ["lora"]


@pytest.mark.parametrize("name", ["image_side", "image_side_tower", "text_side"])
def test_a_saved_projection_comes_later(name, new, inputs):
    """PEFT copies the module, and what hangs on it."""
    method, given = METHODS[name], inputs("clip")
    model = get_peft_model(new("clip"), method.make(), adapter_name="own")
    ask(model, method, given)
    stir(model, method, "own")
    expected, root = ask(model, method, given), model.get_base_model()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["visual_projection"])
    other = get_peft_model(root, config, adapter_name="lora")
    set_adapter(root, ["own", "lora"])
    same(ask(model, method, given), expected)
    other.unload()
    same(ask(root, method, given), expected)


def test_what_peft_does_not_allow(new, inputs):
    method, given = METHODS["coop"], inputs("clip")
    for name in ("coop", "mlp"):
        model = get_peft_model(new("clip"), lora(), adapter_name="lora")
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("own", METHODS[name].make())
    model = new("clip")
    inject_adapter_in_model(method.make(), model, "own")
    inject_adapter_in_model(lora(["token_embedding"]), model, "lora")
    with pytest.raises(ValueError, match="put around the prompt learner's token table: put that adapter on first"):
        model(**given)
    model = new("clip")
    inject_adapter_in_model(lora(["token_embedding"]), model, "lora")
    inject_adapter_in_model(method.make(), model, "own")
    set_adapter(model, ["own", "lora"])
    assert torch.isfinite(ask(model, method, given)).all()
