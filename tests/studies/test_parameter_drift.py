import copy

import pytest
import tiny_models
import torch
from parameter_drift import parameter_drift
from peft import LoraConfig, get_peft_model

from hf_transmiter.encoders.dual_encoder import DualEncoder


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


def pair(family="clip"):
    model, processor = tiny_models.build(family)
    return DualEncoder(model, processor), DualEncoder(copy.deepcopy(model), processor)


def by_name(rows) -> dict:
    return {row.name: row for row in rows}


def text_layers(encoder):
    tower = encoder.model.text_model
    encoder_stack = getattr(tower, "roberta", tower).encoder
    return encoder_stack.layers if hasattr(encoder_stack, "layers") else encoder_stack.layer


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_equal_models_have_not_moved(family):
    rows = parameter_drift(*pair(family))
    assert [row.name for row in rows] == PARTS[family]
    assert all((row.absolute, row.relative, row.similarity) == (0.0, 0.0, None) for row in rows)


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


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2", "altclip", "chinese_clip"])
def test_a_changed_layer_shows_there(family):
    old, new = pair(family)
    with torch.no_grad():
        for tensor in text_layers(new)[1].parameters():
            tensor.mul_(1.1)
    rows = by_name(parameter_drift(old, new))
    assert rows["layer 2"].relative == pytest.approx(0.1, rel=1e-5)
    layer = torch.cat([tensor.flatten() for tensor in text_layers(old)[1].parameters()]).detach()
    assert rows["layer 2"].absolute == pytest.approx(float(0.1 * layer.square().mean().sqrt()), rel=1e-5)
    assert all(row.absolute == row.relative == 0 for name, row in rows.items() if name != "layer 2")


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
