import copy

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation import drift
from hf_transmiter.evaluation.drift import LayerDrift, _text_states, drift_table, feature_drift, linear_cka


NAMES = ["cat", "dog", "car", "tree", "ship", "old red car", "big blue ship", "the good old dog", "drawing"]
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
    rows = feature_drift(*pair(family), NAMES)
    assert [row.name for row in rows] == STATES
    for row in rows:
        assert (row.absolute, row.relative) == (0.0, 0.0)
    # SigLIP pools at padding and BERT-likes at the start token: what goes in is the same for all texts.
    assert (rows[0].similarity is None) == (family not in ("clip", "metaclip_2"))
    assert all(row.similarity == pytest.approx(1) for row in rows[1:])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_hidden_states_are_those_the_tower_pools(family, monkeypatch):
    """What is seen in the last layer makes the class vector, by the model's own final steps."""
    monkeypatch.setattr(drift, "_BATCH_SIZE", 4)
    encoder, _ = pair(family)
    states = _text_states(encoder, NAMES)
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
    features = by_name(feature_drift(old, new, NAMES))
    assert features["embeddings"].absolute == features["layer 1"].absolute == features["layer 1"].relative == 0
    assert features["layer 1"].similarity == pytest.approx(1)
    assert min(features["layer 2"].relative, features["class vector"].relative) > 0.001
    assert features["class vector"].similarity < 1 - 1e-6


def test_feature_drift_by_hand():
    """Against the hidden states as transformers gives them."""
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
    row = by_name(feature_drift(old, new, NAMES))["layer 2"]
    assert row.absolute == pytest.approx(float(change.mean()), rel=1e-5)
    assert row.relative == pytest.approx(float((change / size).mean()), rel=1e-5)
    assert row.similarity == pytest.approx(linear_cka(*states), rel=1e-5)
    vectors = [encoder.embed_names(NAMES) for encoder in (old, new)]
    row = by_name(feature_drift(old, new, NAMES))["class vector"]
    assert row.absolute == pytest.approx(float((vectors[1] - vectors[0]).norm(dim=1).mean()), rel=1e-5)
    assert row.relative == pytest.approx(row.absolute, rel=1e-5)  # class vectors have length 1


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
    assert [row.name for row in rows] == ["embeddings", "class vector"]
    assert rows[0].absolute == 0 and rows[1].absolute > 0 and 0 < rows[1].similarity < 1


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


def test_table():
    rows = [LayerDrift("embeddings", 0.01234, 0.1, None), LayerDrift("layer 1", 2.0, None, 0.98765)]
    assert drift_table(rows).splitlines() == [
        "| part | change | relative | similarity |",
        "| :--- | ---: | ---: | ---: |",
        "| embeddings | 0.0123 | 10.0% | – |",
        "| layer 1 | 2 | – | 0.988 |",
    ]
