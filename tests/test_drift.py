import copy
import dataclasses

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from hf_transmiter.backbone import DualEncoder
from hf_transmiter.drift import LayerDrift, _text_states, drift_table, feature_drift, linear_cka, parameter_drift
from hf_transmiter.tuners.prompts import ContCoOpConfig, CoOpConfig


NAMES = ["cat", "dog", "car", "tree", "ship", "old red car", "big blue ship", "the good old dog", "drawing"]
TEMPLATES = ("a photo of a {}.", "{}")
ENDS = ["token table", "positions", "layer 1", "layer 2", "final norm", "projection"]
PARTS = {
    "clip": ENDS,
    "siglip": ENDS,
    "siglip2": ENDS,
    "metaclip_2": ENDS,
    "altclip": [*ENDS[:2], "embedding norm", *ENDS[2:]],
    "chinese_clip": [*ENDS[:2], "embedding norm", *ENDS[2:4], "projection"],
    "align": [*ENDS[:2], "embedding norm", *ENDS[2:4], "pooler", "projection"],
    "vision-text-dual-encoder": [*ENDS[:2], "embedding norm", *ENDS[2:4], "pooler", "projection"],
}
STATES = ["embeddings", "layer 1", "layer 2", "class vector"]


def pair(family="clip"):
    model, processor = tiny_models.build(family)
    return DualEncoder(model, processor), DualEncoder(copy.deepcopy(model), processor)


def by_name(rows) -> dict[str, LayerDrift]:
    return {row.name: row for row in rows}


def text_layers(encoder):
    tower = encoder.model.text_model
    encoder_stack = getattr(tower, "roberta", tower).encoder
    return encoder_stack.layers if hasattr(encoder_stack, "layers") else encoder_stack.layer


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_equal_models_have_not_moved(family):
    old, new = pair(family)
    parameters, features = parameter_drift(old, new), feature_drift(old, new, NAMES, TEMPLATES)
    assert [row.name for row in parameters] == PARTS[family]
    assert [row.name for row in features] == STATES
    for row in parameters:
        assert (row.absolute, row.relative, row.similarity) == (0.0, 0.0, None)
    for row in features:
        assert (row.absolute, row.relative) == (0.0, 0.0)
    # SigLIP pools at padding and BERT-likes at the start token: what goes in is the same for all texts.
    assert (features[0].similarity is None) == (family not in ("clip", "metaclip_2"))
    assert all(row.similarity == pytest.approx(1) for row in features[1:])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_parameter_of_the_text_side_has_a_part(family):
    """All scaled alike: each part says so, and the parts hold all the parameters there are."""
    old, new = pair(family)
    named = dict(new.model.named_parameters())
    text = [named[name] for name in named if name.startswith("text_")]
    with torch.no_grad():
        for tensor in text:
            tensor.mul_(1.1)
    rows = parameter_drift(old, new)
    assert [row.relative for row in rows] == pytest.approx([0.1] * len(rows), rel=1e-4)
    norms = [row.absolute / row.relative for row in rows]  # root mean square of the old parameters, by part
    table = old.model.get_parameter(next(name for name in named if name.startswith("text_model")))
    assert norms[0] == pytest.approx(float(table.detach().square().mean().sqrt()), rel=1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_hidden_states_are_those_the_tower_pools(family):
    """What is seen in the last layer makes the class vector, by the model's own final steps."""
    encoder, _ = pair(family)
    states = _text_states(encoder, NAMES, ("a photo of a {}.",), batch_size=4)
    assert [len(state) for state in states] == [len(NAMES)] * 4
    model, last = encoder.model, states[-2].float()
    with torch.no_grad():
        if family == "altclip":
            last = model.text_model.transformation(model.text_model.pre_LN(last))
        elif family in ("siglip", "siglip2"):
            last = model.text_model.head(model.text_model.final_layer_norm(last))
        elif family in ("clip", "metaclip_2"):
            last = model.text_model.final_layer_norm(last)
        elif family == "vision-text-dual-encoder":
            last = model.text_model.pooler(last[:, None])
        last = model.text_projection(last) if hasattr(model, "text_projection") else last
    assert torch.allclose(torch.nn.functional.normalize(last, dim=1), states[-1].float(), atol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2", "altclip", "chinese_clip"])
def test_a_changed_layer_shows_there_and_behind_it(family):
    old, new = pair(family)
    with torch.no_grad():
        for tensor in text_layers(new)[1].parameters():
            tensor.mul_(1.1)
    parameters = by_name(parameter_drift(old, new))
    assert parameters["layer 2"].relative == pytest.approx(0.1, rel=1e-5)
    layer = torch.cat([tensor.flatten() for tensor in text_layers(old)[1].parameters()]).detach()
    assert parameters["layer 2"].absolute == pytest.approx(float(0.1 * layer.square().mean().sqrt()), rel=1e-5)
    assert all(row.absolute == row.relative == 0 for name, row in parameters.items() if name != "layer 2")
    features = by_name(feature_drift(old, new, NAMES, TEMPLATES))
    assert features["embeddings"].absolute == features["layer 1"].absolute == features["layer 1"].relative == 0
    assert features["layer 1"].similarity == pytest.approx(1)
    assert min(features["layer 2"].relative, features["class vector"].relative) > 0.001
    assert features["class vector"].similarity < 1 - 1e-6


def test_feature_drift_by_hand():
    """Against the hidden states as transformers gives them; names in batches, templates as samples."""
    old, _ = pair()
    new = DualEncoder(*tiny_models.build("clip", seed=1))
    inputs = old.processor.tokenizer([f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    end = inputs["attention_mask"].sum(1) - 1
    with torch.no_grad():
        states = [
            encoder.model.text_model(**inputs, output_hidden_states=True).hidden_states[2][range(len(NAMES)), end]
            for encoder in (old, new)
        ]
    change, size = (states[1] - states[0]).norm(dim=1), states[0].norm(dim=1)
    row = by_name(feature_drift(old, new, NAMES, batch_size=4))["layer 2"]
    assert row.absolute == pytest.approx(float(change.mean()), rel=1e-5)
    assert row.relative == pytest.approx(float((change / size).mean()), rel=1e-5)
    assert row.similarity == pytest.approx(linear_cka(*states), rel=1e-5)
    vectors = [encoder.embed_names(NAMES, TEMPLATES) for encoder in (old, new)]
    row = by_name(feature_drift(old, new, NAMES, TEMPLATES))["class vector"]
    assert row.absolute == pytest.approx(float((vectors[1] - vectors[0]).norm(dim=1).mean()), rel=1e-5)
    assert row.relative == pytest.approx(row.absolute, rel=1e-5)  # class vectors have length 1


def test_nothing_stays_in_the_model():
    old, new = pair()
    before = old.model.text_model
    hooks = len(before._forward_pre_hooks), len(before._forward_hooks)
    feature_drift(old, new, NAMES)
    with pytest.raises(ValueError, match="each template needs"):
        feature_drift(old, new, NAMES, ["a photo"])
    assert (len(before._forward_pre_hooks), len(before._forward_hooks)) == hooks


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip"])
def test_a_learnt_context_takes_part(family):
    """CoOp that starts from the words says what the words say, although the texts are longer than their tokens."""
    old, new = pair(family)
    tokens = new.processor.tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    prompted = DualEncoder(get_peft_model(new.model, CoOpConfig(init_token_ids=tokens)), new.processor)
    for row in feature_drift(prompted, old, NAMES, ("{}.",)):
        assert row.name == "embeddings" or row.relative > 0.01
    # Against the model that reads the words themselves.
    states = zip(
        _text_states(prompted, NAMES, ("{}.",), 64), _text_states(old, NAMES, ("a photo of a {}.",), 64), strict=True
    )
    assert all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in states)


def test_what_a_prompt_learner_asks_for_itself_does_not_count():
    """ContCoOp's text_feature runs the tower twice per text: once for the class embedding, once with the context."""
    old, new = pair()
    tokens = new.processor.tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    period = new.processor.tokenizer("a.", add_special_tokens=False)["input_ids"][-1]
    config = ContCoOpConfig(init_token_ids=tokens, period_id=period, class_embed="text_feature")
    prompted = DualEncoder(get_peft_model(new.model, config), new.processor)
    states = zip(
        _text_states(prompted, NAMES, ("{}.",), 64), _text_states(old, NAMES, ("a photo of a {}.",), 64), strict=True
    )
    assert all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in states)


def test_what_cannot_be_compared_part_by_part():
    old, new = pair()

    def refused(other) -> str:
        with pytest.raises(ValueError, match=r"feature_drift") as caught:
            parameter_drift(old, other)
        return str(caught.value)

    wide = DualEncoder(*tiny_models.build("clip", width=32))
    assert "'token table'" in refused(wide) and "(121, 16)" in refused(wide) and "(121, 32)" in refused(wide)
    deep = copy.deepcopy(new)
    deep.model.text_model.encoder.layers.append(copy.deepcopy(text_layers(new)[1]))
    assert "'layer 3'" in refused(deep) and "is missing in the old model" in refused(deep)
    renamed = copy.deepcopy(new)
    renamed.processor.tokenizer.add_tokens(["newword"])
    assert "tokenizers" in refused(renamed) and "121 tokens" in refused(renamed) and "122" in refused(renamed)
    tuned = DualEncoder(get_peft_model(new.model, LoraConfig(target_modules=["q_proj"])), new.processor)
    assert "'layer 1'" in refused(tuned) and "q_proj" in refused(tuned)


def test_similarity_across_widths_and_depths():
    old, new = pair()
    wide = DualEncoder(*tiny_models.build("clip", width=32))
    for row in feature_drift(old, wide, NAMES):
        assert row.absolute is None and row.relative is None and 0 < row.similarity < 1
    layers = new.model.text_model.encoder.layers
    for _ in range(2):
        layers.append(copy.deepcopy(layers[1]))
    new.model.config.text_config.num_hidden_layers = 4
    rows = feature_drift(old, new, NAMES)
    assert [row.name for row in rows] == ["embeddings", "layer 1 (new: 2)", "layer 2 (new: 4)", "class vector"]
    assert [row.absolute is None for row in rows] == [False, True, True, False]
    assert all(0 < row.similarity <= 1 for row in rows)
    back = feature_drift(new, old, NAMES)
    assert [row.name for row in back] == [
        *("embeddings", "layer 1", "layer 2 (new: 1)", "layer 3 (new: 2)", "layer 4 (new: 2)", "class vector")
    ]


def test_too_few_names():
    old, new = pair()
    with pytest.raises(ValueError, match="at least one name"):
        feature_drift(old, new, [])
    assert all(row.similarity is None and row.absolute == 0 for row in feature_drift(old, new, ["cat"]))


seeds, sizes = st.integers(0, 2**31), st.integers(1, 6)


def drawn(seed, count, *widths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator, dtype=torch.float64) for width in widths]


@given(seeds, st.integers(3, 12), sizes, sizes)
def test_cka_sees_neither_rotation_nor_scale_nor_order(seed, count, p, q):
    x, y, square = drawn(seed, count, p, q, q)
    value = linear_cka(x, y)
    assert 0 <= value <= 1
    assert linear_cka(y, x) == pytest.approx(value)
    rotation = torch.linalg.qr(drawn(seed + 1, q, q)[0]).Q
    assert linear_cka(x, -3 * y @ rotation + square[0]) == pytest.approx(value)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert linear_cka(x[order], y[order]) == pytest.approx(value)
    assert linear_cka(x, y.flip(1)) == pytest.approx(value)
    assert linear_cka(y, 0.5 * y @ rotation) == pytest.approx(1)


@given(seeds, st.integers(3, 12), sizes, sizes)
def test_cka_is_the_cosine_of_centred_gram_matrices(seed, count, p, q):
    x, y = drawn(seed, count, p, q)
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    k, m = (centre @ side @ side.T @ centre for side in (x, y))
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))


def test_cka_of_one_and_the_same_row_is_unknown():
    x = torch.full((5, 3), 0.1)
    assert linear_cka(x, torch.randn(5, 2)) is None and linear_cka(torch.randn(5, 2), x) is None


def test_table_has_the_columns_somebody_has():
    rows = [LayerDrift("embeddings", 0.01234, 0.1, None), LayerDrift("layer 1", 2.0, None, 0.98765)]
    assert drift_table(rows).splitlines() == [
        "| part | change | relative | similarity |",
        "| :--- | ---: | ---: | ---: |",
        "| embeddings | 0.0123 | 10.0% | – |",
        "| layer 1 | 2 | – | 0.988 |",
    ]
    narrow = drift_table([dataclasses.replace(row, absolute=None, relative=None) for row in rows])
    assert narrow.splitlines()[0] == "| part | similarity |"
