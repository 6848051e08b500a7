"""What each learner learns: how it starts, how large it is, where its vectors stand."""

import copy

import pytest
import slow_prompts as slow
import torch
from peft import get_peft_model
from prompting import NAMES, PHRASE, close, features, parameters
from transformers import CLIPConfig, CLIPModel

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
    set_classes,
)
from hf_transmiter.tuners.prompts.layer import as_base
from hf_transmiter.tuners.prompts.model import TOKEN_TABLES


STARTS = {
    "coop": lambda: CoOpConfig(init_phrase=PHRASE),
    "kgcoop": KgCoOpConfig,
    "cocoop": CoCoOpConfig,  # a text alone is not conditioned on an image
    "contcoop": ContCoOpConfig,
    "contcoop_mean": lambda: ContCoOpConfig(class_embed="mean_token", heads=2),
    "ivlp": lambda: IVLPConfig(text_depth=1, vision_depth=0),
    "maple": lambda: MaPLeConfig(depth=1),  # two vectors, two words
    "promptsrc": lambda: PromptSRCConfig(n_ctx=3, text_depth=1, vision_depth=1),
}


# Starts


@pytest.mark.parametrize("family", sorted(set(TOKEN_TABLES) - {"open_clip"}))  # that one in tests/open_clip
@pytest.mark.parametrize("learner", STARTS)
def test_the_phrase_is_what_it_starts_from(encoders, prompted, learner, family):
    encoder = encoders(family)
    model, _ = prompted(STARTS[learner](), family)
    for attention in ("eager", "sdpa"):
        encoder.model.set_attn_implementation(attention)
        model.get_base_model().set_attn_implementation(attention)
        written = encoder.embed_names(NAMES)
        assert (DualEncoder(model, encoder.processor).embed_names(NAMES, ("{}.",)) - written).abs().max() < 1e-5
        plain = encoder.embed_names(NAMES, ("{}.",))
        assert (plain - written).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(DualEncoder(model, encoder.processor).embed_names(NAMES, ("{}.",)), plain)


# Sizes


@pytest.fixture(scope="module")
def base_16():
    """The sizes of CLIP ViT-B/16 that prompts depend on, without memory."""
    tower = {"num_hidden_layers": 12, "intermediate_size": 64}
    text = {**tower, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1000, "max_position_embeddings": 77}
    vision = {**tower, "hidden_size": 768, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))


@pytest.mark.parametrize(
    ("config", "size", "count"),
    [
        (CoOpConfig, {"n_ctx": 4}, 2_048),
        (CoOpConfig, {}, 8_192),
        (CoOpConfig, {"init_token_ids": [1, 2, 3, 4]}, 2_048),
        (KgCoOpConfig, {"init_token_ids": [1, 2, 3, 4]}, 2_048),
        (CoCoOpConfig, {"init_token_ids": [1, 2, 3, 4]}, 35_360),
        # Published as 1,054,720: the bias of the keys is left out, softmax does not see it.
        (ContCoOpConfig, {"init_token_ids": [1, 2, 3, 4], "period_id": 5}, 1_054_720 - 512),
        (IVLPConfig, {"init_token_ids": [1, 2, 3, 4]}, 46_080),
        (IVLPConfig, {"n_ctx": 2, "n_vision": 2, "text_depth": 12, "vision_depth": 12, "init_token_ids": [1]}, 30_720),
        (IVLPConfig, {"vision_depth": 0, "text_depth": 12, "init_token_ids": [1]}, 24_576),
        (PromptSRCConfig, {"init_token_ids": [1, 2, 3, 4]}, 46_080),
        (MaPLeConfig, {"init_token_ids": [1, 2, 3, 4]}, 3_555_072),
        (MaPLeConfig, {"init_token_ids": [1, 2, 3, 4], "depth": 3}, 3 * (2 * 512 + 512 * 768 + 768)),
    ],
)
def test_number_of_parameters(base_16, config, size, count):
    model = get_peft_model(copy.deepcopy(base_16), config(**size))
    assert model.get_nb_trainable_parameters()[0] == count


# Where the vectors stand


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2"])
@pytest.mark.parametrize(("position", "before"), [("end", 3), ("middle", 1), ("front", 0)])
def test_positions(encoders, prompted, family, position, before):
    """Names of one, three and four tokens, against sequences of embeddings put together by hand."""
    encoder = encoders(family)
    model, layer = prompted(CoOpConfig(n_ctx=3, position=position), family)
    context = parameters(model)["ctx"]
    context.data.normal_(std=0.3)
    tokenizer = encoder.processor.tokenizer
    sequences = [slow.rows(encoder.model, tokenizer, name, context, before) for name in NAMES]
    expected = slow.text_features(encoder.model, sequences)
    close(features(model, encoder), expected)
    gradient = torch.autograd.grad(features(model, encoder)[:, :3].sum(), context)[0]
    close(gradient, torch.autograd.grad(expected[:, :3].sum(), context)[0], atol=1e-4)


def test_positions_differ(encoders, prompted):
    answers = []
    for position in ("end", "middle", "front"):
        model, _ = prompted(CoOpConfig(n_ctx=3, position=position, seed=2))
        parameters(model)["ctx"].data.mul_(20)
        answers.append(features(model, encoders()))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert (answers[left] - answers[right]).abs().max() > 0.1


# A context of its own for each class


@pytest.mark.parametrize("position", ["end", "front"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_class_specific(encoders, prompted, family, position):
    encoder = encoders(family)
    config = CoOpConfig(n_ctx=2, class_specific=True, class_names=NAMES, position=position)
    model, _ = prompted(config, family)
    context = parameters(model)["ctx"]
    assert context.shape == (3, 2, 16) and context.std(0).min() > 0  # each class has a draw of its own
    context.data.normal_(std=0.3)
    before = 2 if position == "end" else 0
    tokenizer = encoder.processor.tokenizer
    sequences = [slow.rows(encoder.model, tokenizer, *pair, before) for pair in zip(NAMES, context, strict=True)]
    expected = slow.text_features(encoder.model, sequences)
    close(features(model, encoder), expected)
    close(features(model, encoder, [NAMES[2], NAMES[0]]), expected[[2, 0]])  # by name, not by place
    with pytest.raises(ValueError, match="text 1 of the batch is none of the 3 classes"):
        features(model, encoder, [NAMES[0], "tree"])


def test_class_specific_from_a_phrase(encoders, prompted):
    model, _ = prompted(CoOpConfig(init_phrase=PHRASE, class_specific=True, class_names=NAMES))
    assert parameters(model)["ctx"].shape == (3, 4, 16)
    written = encoders().embed_names(NAMES)
    close(DualEncoder(model, encoders().processor).embed_names(NAMES, ("{}.",)), written)


def test_class_specific_knows_only_its_classes(encoders, prompted, make_images):
    model, layer = prompted(CoOpConfig(n_ctx=2, class_specific=True, class_names=NAMES))
    parameters(model)["ctx"].data.normal_()
    pixels = encoders().preprocess(make_images(2))
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits_per_image
        set_classes(model, [NAMES[2], NAMES[0]])
        close(model(pixel_values=pixels).logits_per_image, logits[:, [2, 0]])
    assert model.peft_config["default"].class_names == NAMES  # the rows keep their order
    with pytest.raises(ValueError, match="know only the 3 classes they were learnt for, not 'tree'"):
        set_classes(model, ["cat", "tree"])
    with pytest.raises(ValueError, match="belong to classes: pass class_names"):
        CoOpConfig(class_specific=True)


def test_class_specific_names_must_read_differently(prompted):
    with pytest.raises(ValueError, match="'old_car' and 'old car' are the same text"):
        prompted(CoOpConfig(n_ctx=2, class_specific=True, class_names=["old_car", "cat", "old car"]))


def test_class_specific_on_a_model_from_memory(encoders, make_images):
    encoder = encoders()
    model = copy.deepcopy(encoder.model)
    model.config._name_or_path = ""
    model = get_peft_model(model, CoOpConfig(n_ctx=2, class_specific=True, class_names=NAMES))
    with pytest.raises(ValueError, match=r"set_classes\(model, class_names, tokenizer=...\)"):
        features(model, encoder)
    set_classes(model, NAMES, encoder.processor.tokenizer)
    assert features(model, encoder).shape == (3, 16)


# A context at a deeper layer


@pytest.mark.parametrize("family", ["clip", "metaclip_2"])
def test_layer_starts_from_the_phrase(encoders, prompted, family):
    encoder = encoders(family)
    model, layer = prompted(CoOpConfig(init_phrase=PHRASE, layer=1), family)
    close(DualEncoder(model, encoder.processor).embed_names(NAMES, ("{}.",)), encoder.embed_names(NAMES))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == len(layer.hooks)


def test_every_layer_starts_from_the_phrase():
    """A tower of four layers."""
    encoder, ids = deeper(4), [5, 6, 7]
    expected = slow.text_features(encoder, [slow.table(encoder)[torch.tensor([118, *ids, 20, 119])]])
    for layer in range(4):
        model = get_peft_model(copy.deepcopy(encoder), CoOpConfig(init_token_ids=ids, layer=layer))
        text = model.get_text_features(input_ids=torch.tensor([[118, 20, 119]])).pooler_output
        close(text, expected)
        parameters(model)["ctx"].data.normal_()
        changed = model.get_text_features(input_ids=torch.tensor([[118, 20, 119]])).pooler_output
        assert (changed - expected).abs().max() > 0.1


def deeper(layers):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    ends = {"bos_token_id": 118, "eos_token_id": 119, "pad_token_id": 119}
    text = {**text, **ends, "vocab_size": 120, "max_position_embeddings": 16}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}))
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2"])
def test_layer_changes_its_positions_only(encoders, prompted, family):
    encoder = encoders(family)
    model, layer = prompted(CoOpConfig(init_phrase=PHRASE, layer=1), family)
    context = parameters(model)["ctx"]
    assert context.shape == (4, 16)
    context.data.normal_(std=0.3)
    table, ids = slow.table(encoder.model), model.peft_config["default"].init_token_ids
    tokenizer = encoder.processor.tokenizer
    words = [slow.rows(encoder.model, tokenizer, name, table[torch.tensor(ids)]) for name in NAMES]
    expected = slow.text_features(encoder.model, words, slow.overwrite(encoder.model, {1: context}))
    close(features(model, encoder), expected)
    seen = []
    attention = model.text_model.encoder.layers[1].self_attn
    attention.register_forward_pre_hook(lambda _, args, given: seen.append(given["hidden_states"]), with_kwargs=True)
    for name in NAMES:
        features(model, encoder, [name])
        with as_base():
            features(model, encoder, [f"{PHRASE} {name}"])
        changed = ((seen[-2] - seen[-1]).abs() > 1e-5).any(-1)[0]
        assert changed.nonzero()[:, 0].tolist() == list(range(layer.start, layer.start + 4))


def test_layers_there_are_not(prompted):
    for family in ("clip", "siglip"):
        with pytest.raises(ValueError, match="layer=2, but the text tower's last layer is 1"):
            prompted(CoOpConfig(init_phrase=PHRASE, layer=2), family)
