"""The weak model is what the teacher was before its tuning, at the moment it is used."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, compare, extract, label_tune, transfer, tune
from hf_transmiter.settings import TuningConfig
from hf_transmiter.tuners import CoOpConfig, TransMiterConfig


NAMES = ("cat", "dog", "car")
TUNED, SAME = "has an adapter switched on", "one and the same model in memory"


def lora(**options):
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


def shared_lora(weak):
    return DualEncoder(get_peft_model(weak.model, lora()), weak.processor)


def shared_module(weak):
    return get_peft_model(weak.model, lora())


def shared_prompt(weak):
    return DualEncoder(get_peft_model(weak.model, CoOpConfig(n_ctx=2)), weak.processor)


def shared_image_side(weak):
    config = TransMiterConfig(class_names=list(NAMES), form="linear", image_side=16)
    model = get_peft_model(weak.model, config)
    return AnchorClassifier(DualEncoder(model, weak.processor), Anchors(NAMES))


def shared_and_merged(weak):
    model = get_peft_model(weak.model, lora())
    model.merge_adapter()
    return DualEncoder(model, weak.processor)


def shallow_copy(weak):
    return DualEncoder(get_peft_model(copy.copy(weak.model), lora()), weak.processor)


def a_lora_of_somebody(weak):
    get_peft_model(weak.model, lora())
    return torch.randn(12, 3)


def itself(weak):
    return weak


def wrapped_twice(weak):
    return DualEncoder(weak.model, weak.processor)


def merged_and_unloaded(weak):
    return DualEncoder(get_peft_model(weak.model, lora()).merge_and_unload(), weak.processor)


def switched_off(weak):
    model = get_peft_model(weak.model, lora())
    model.base_model.disable_adapter_layers()
    return [torch.randn(12, 3), model]


CASES = [
    *((make, TUNED) for make in (shared_lora, shared_module, shared_prompt, shared_image_side, shared_and_merged)),
    *((make, TUNED) for make in (shallow_copy, a_lora_of_somebody)),
    *((make, SAME) for make in (itself, wrapped_twice, merged_and_unloaded, switched_off)),
]
cases = pytest.mark.parametrize(("make", "said"), CASES, ids=[make.__name__ for make, _ in CASES])


@pytest.fixture
def strong(model_dir):
    return DualEncoder.from_pretrained(model_dir("clip", 1))


@cases
def test_a_weak_model_that_is_tuned(make, said, encoder, strong, make_dataset, tmp_path):
    images, options = make_dataset(), {"cache_dir": tmp_path, "progress": False, "class_names": NAMES}
    teacher = make(encoder)
    with pytest.raises(ValueError, match=said):
        extract(encoder, teacher, images, **options)
    with pytest.raises(ValueError, match=said):
        tune(strong, images, teacher=teacher, weak=encoder, config=TuningConfig(epochs=1), **options)
    with pytest.raises(ValueError, match=said):
        compare(encoder, strong, teacher, images, unlabelled=images, variants=["refit"], **options)
    if said is TUNED:
        with pytest.raises(ValueError, match=said):
            Bridge.build(encoder, strong, images, cache_dir=tmp_path, progress=False)


def test_copies_are_what_they_should_be(encoder, make_dataset, tmp_path, caplog):
    """The teacher's adapter on a copy: as from two loads."""
    images, options = make_dataset(), {"cache_dir": tmp_path, "progress": False, "class_names": NAMES}
    torch.manual_seed(0)
    teacher = DualEncoder(get_peft_model(copy.deepcopy(encoder.model), lora()), encoder.processor)
    assert extract(encoder, teacher, images, **options).adapter_config.image_side == encoder.embed_dim
    assert not caplog.text
    extract(encoder, DualEncoder(copy.deepcopy(encoder.model), encoder.processor), images, **options)
    assert "nothing was tuned" in caplog.text


def test_a_model_that_changes_after_the_extraction(encoder, strong, make_dataset, tmp_path):
    images, options = make_dataset(), {"cache_dir": tmp_path, "progress": False}
    adapter = extract(encoder, torch.randn(12, 3), images, class_names=NAMES, **options)
    label_tune(adapter, images, **options)
    peft = get_peft_model(encoder.model, lora())
    for call in (lambda: transfer(adapter, strong, images, **options), lambda: label_tune(adapter, images, **options)):
        with pytest.raises(ValueError, match="with other weights, or adapters switched on"):
            call()
    with peft.disable_adapter():
        pass
    peft.unload()
    label_tune(adapter, images, **options)


def test_texts_follow_the_text_tower(encoder):
    """What is kept of names is of the weights and adapters that made it."""
    classifier = AnchorClassifier(encoder, Anchors(NAMES))
    plain = classifier.text_embeds
    assert classifier.text_embeds is plain
    model = get_peft_model(encoder.model, lora())
    tuned = classifier.text_embeds
    assert (tuned - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(classifier.text_embeds, plain)
    assert torch.equal(classifier.text_embeds, tuned)
    with torch.no_grad():
        encoder.model.text_projection.weight.add_(torch.randn_like(encoder.model.text_projection.weight))
    assert (classifier.text_embeds - tuned).abs().max() > 1e-3
    given = AnchorClassifier(encoder, Anchors(NAMES), plain)
    assert given.text_embeds is plain and given.text_embeds_given and not classifier.text_embeds_given


def test_an_adapter_for_a_tuned_model_is_not_for_the_plain_one(encoder):
    """Also of one repository and revision."""
    encoder.name_or_path, encoder.revision = "alice/clip", "c" * 40
    plain = DualEncoder(copy.deepcopy(encoder.model), encoder.processor, "alice/clip", "c" * 40)
    get_peft_model(encoder.model, lora())
    config = TransMiterConfig(class_names=list(NAMES), form="linear")
    classifier = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(config)
    classifier.check_model()
    classifier.encoder = plain
    with pytest.raises(ValueError, match="was made for 'alice/clip'"):
        classifier.check_model()
