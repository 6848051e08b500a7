"""On which models a saved prompt learner goes, and which files it takes."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from prompting import NAMES, PHRASE, close, features, stir
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
)
from hf_transmiter.tuners.prompts.model import TOKEN_TABLES, base_facts


LEARNERS = {
    "coop": lambda: CoOpConfig(init_phrase=PHRASE),
    "coop_random": lambda: CoOpConfig(n_ctx=4),
    "coop_class_specific": lambda: CoOpConfig(n_ctx=2, class_specific=True, class_names=NAMES),
    "coop_layer": lambda: CoOpConfig(init_phrase=PHRASE, layer=1),
    "kgcoop": KgCoOpConfig,
    "cocoop": CoCoOpConfig,
    "contcoop": ContCoOpConfig,
    "ivlp": lambda: IVLPConfig(text_depth=2, vision_depth=2),
    "ivlp_text": lambda: IVLPConfig(text_depth=2, vision_depth=0),
    "maple": lambda: MaPLeConfig(depth=2),
    "promptsrc": lambda: PromptSRCConfig(text_depth=2, vision_depth=2),
}
learners = pytest.mark.parametrize("learner", LEARNERS)


@pytest.fixture(scope="module")
def saved(encoders, tmp_path_factory):
    """``saved(learner)``: folder of an adapter learnt on the tiny CLIP."""
    known = {}

    def get(learner):
        if learner not in known:
            model = get_peft_model(copy.deepcopy(encoders().model), LEARNERS[learner]())
            stir(model)
            known[learner] = tmp_path_factory.mktemp(learner)
            model.save_pretrained(str(known[learner]))
        return known[learner]

    return get


@pytest.fixture(scope="module")
def variant(model_dir):
    """``variant(text={}, vision={}, **other)``: the tiny CLIP with other sizes, its tokenizer beside it."""
    known = {}

    def make(text=None, vision=None, **other):
        key = str((text, vision, other))
        if key not in known:
            config = CLIPConfig.from_pretrained(model_dir("clip")).to_dict()
            config["text_config"].update(text or {})
            config["vision_config"].update(vision or {})
            known[key] = CLIPModel(CLIPConfig(**{**config, **other})).eval()
            known[key].config._name_or_path = model_dir("clip")
        return copy.deepcopy(known[key])

    return make


@pytest.fixture(scope="module")
def other_words(model_dir, tmp_path_factory):
    """A folder with a vocabulary of the same size, two of its tokens swapped."""
    tokenizer = CLIPTokenizer.from_pretrained(model_dir("clip"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = dict(state["vocab"])
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    folder = tmp_path_factory.mktemp("words")
    swapped = CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in state["merges"]])
    swapped.save_pretrained(folder)
    CLIPConfig.from_pretrained(model_dir("clip")).save_pretrained(folder)
    return str(folder)


def load(base, folder):
    return PeftModel.from_pretrained(base, str(folder))


# Which models


@learners
def test_what_it_remembers_of_its_model(encoders, saved, learner):
    base = json.loads((saved(learner) / "adapter_config.json").read_text())["base"]
    assert base == base_facts(encoders().model, encoders().processor.tokenizer)
    assert base["vocabulary"] and base["text_width"] == base["vision_width"] == base["embed_dim"] == 16


@learners
def test_the_same_model(encoders, saved, variant, fresh, learner):
    """Back on its own model it says the same; on another of the same sizes it goes without a word."""
    first = features(load(fresh().model, saved(learner)), encoders())
    again = features(load(fresh().model, saved(learner)), encoders())
    assert torch.equal(first, again)
    assert (features(load(variant(), saved(learner)), encoders()) - first).abs().max() > 1e-2


@learners
def test_another_width(saved, variant, learner):
    with pytest.raises(ValueError, match="the text tower is 32 wide, the one it was learnt on 16. Load the model"):
        load(variant(text={"hidden_size": 32}), saved(learner))


@learners
def test_another_vocabulary_size(saved, variant, learner):
    with pytest.raises(ValueError, match="the tokenizer has 130 tokens, the one it was learnt with 121"):
        load(variant(text={"vocab_size": 130}), saved(learner))


@learners
def test_another_vocabulary_of_the_same_size(saved, variant, other_words, learner):
    base = variant()
    base.config._name_or_path = other_words
    with pytest.raises(ValueError, match="the tokenizer has other tokens than the one it was learnt with"):
        load(base, saved(learner))


@learners
def test_a_model_without_a_tokenizer_is_believed(encoders, saved, variant, learner):
    base = variant()
    base.config._name_or_path = ""
    model = load(base, saved(learner))
    if learner == "coop_class_specific":
        model.base_model.set_classes(NAMES, encoders().processor.tokenizer)
    assert features(model, encoders()).shape == (3, 16)


@learners
def test_another_image_tower(encoders, saved, variant, learner):
    base = variant(vision={"hidden_size": 32})
    if learner in ("ivlp", "maple", "promptsrc"):
        with pytest.raises(ValueError, match="the image tower is 32 wide, the one it was learnt on 16"):
            load(base, saved(learner))
    else:
        assert features(load(base, saved(learner)), encoders()).shape == (3, 16)


@learners
def test_another_embedding_width(encoders, saved, variant, learner):
    base = variant(projection_dim=24)
    if learner == "cocoop":
        with pytest.raises(ValueError, match="embeddings have 24 dimensions, those it was learnt on 16"):
            load(base, saved(learner))
    else:
        assert features(load(base, saved(learner)), encoders()).shape == (3, 24)


@learners
def test_a_shallower_model(encoders, saved, variant, learner):
    base = variant(text={"num_hidden_layers": 1})
    message = {"coop_layer": "layer=1, but the text tower's last layer is 0"}
    message |= dict.fromkeys(("ivlp", "ivlp_text", "maple", "promptsrc"), "prompts in 2 layers of the text tower")
    if learner in message:
        with pytest.raises(ValueError, match=message[learner]):
            load(base, saved(learner))
    else:
        assert features(load(base, saved(learner)), encoders()).shape == (3, 16)


@learners
def test_a_shallower_image_tower(encoders, saved, variant, learner):
    base = variant(vision={"num_hidden_layers": 1})
    if learner in ("ivlp", "maple", "promptsrc"):
        with pytest.raises(ValueError, match="prompts in 2 layers of the image tower, which has 1"):
            load(base, saved(learner))
    else:
        load(base, saved(learner))


def test_a_half_filled_context_keeps_its_place(encoders, fresh, tmp_path):
    """A context longer than its phrase, and one the phrase decides on, survive the way to disk."""
    for number, config in enumerate((CoOpConfig(n_ctx=6, init_phrase=PHRASE), MaPLeConfig(n_ctx=3, depth=1))):
        model = get_peft_model(fresh().model, config)
        stir(model)
        model.save_pretrained(str(tmp_path / str(number)))
        loaded = load(fresh().model, tmp_path / str(number))
        close(features(loaded, encoders()), features(model, encoders()))


# Which files


@pytest.fixture
def broken(saved, tmp_path):
    """``broken(learner, tensors, **config)``: its folder after both were changed."""

    def make(learner, tensors=lambda state: state, **config):
        source = saved(learner)
        settings = json.loads((source / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **config}))
        save_file(tensors(load_file(source / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize("learner", [name for name in LEARNERS if not name.startswith(("coop", "kgcoop"))])
def test_half_an_adapter(saved, broken, variant, learner):
    prefix = learner.split("_")[0] + "_"
    for missing in load_file(saved(learner) / "adapter_model.safetensors"):
        folder = broken(learner, lambda state, gone=missing: {k: v for k, v in state.items() if k != gone})
        with pytest.raises(ValueError, match=f"lack '{missing.rpartition(prefix)[2]}', .* damaged"):
            load(variant(), folder)


@pytest.mark.parametrize(
    ("learner", "config"),
    [
        ("coop", {"peft_type": "KGCOOP"}),
        ("kgcoop", {"peft_type": "COOP"}),
        ("cocoop", {"peft_type": "COOP"}),
        ("coop", {"peft_type": "CONTCOOP"}),
        ("ivlp", {"peft_type": "PROMPTSRC"}),
        ("contcoop", {"peft_type": "IVLP"}),
        ("ivlp", {"peft_type": "MAPLE"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["peft_type"],
)
def test_another_methods_file(broken, variant, learner, config):
    if config["peft_type"] in ("IVLP", "MAPLE", "PROMPTSRC"):
        config = {**config, "text_depth": 1, "vision_depth": 1, "depth": 1}
    with warnings.catch_warnings(), pytest.raises(ValueError, match="hold 'base_model.*', .* another method"):
        warnings.simplefilter("ignore")  # PEFT names the settings it does not know
        load(variant(), broken(learner, **config))


@pytest.mark.parametrize(
    ("learner", "config", "part"),
    [
        ("ivlp", {"text_depth": 1}, "text"),
        ("ivlp", {"vision_depth": 0}, "vision"),
        ("maple", {"depth": 1}, "text"),
    ],
)
def test_a_file_with_more_than_the_configuration_says(broken, variant, learner, config, part):
    with pytest.raises(ValueError, match=rf"hold '.*{part}.*another configuration|{part}\S* must be"):
        load(variant(), broken(learner, **config))


def test_another_number_of_vectors(broken, variant):
    with pytest.raises(ValueError, match=r"ctx must be \(3, 16\), got \(4, 16\)"):
        load(variant(), broken("coop_random", n_ctx=3))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "before"}, "position must be one of end, middle, front, got 'before'"),
        ({"layer": -1, "init_phrase": PHRASE}, "layer must not be negative, got -1"),
        ({"layer": 1}, "overwrites words: pass init_phrase"),
        ({"layer": 1, "init_phrase": PHRASE, "position": "front"}, "stands before the name"),
        ({"layer": 1, "init_phrase": PHRASE, "class_specific": True, "class_names": NAMES}, "shared by all classes"),
        ({"layer": 1, "init_phrase": PHRASE, "n_ctx": 6}, "a context at a deeper layer"),
        ({"class_names": []}, "there is no class name"),
        ({"class_names": ["cat", "cat"]}, "class names must differ, but 'cat' occur twice"),
        ({"class_names": "cat"}, "must be a list of names, got one string"),
        ({"init_phrase": PHRASE, "n_ctx": 3}, "'a photo of a' has 4 tokens, but the context only n_ctx=3"),
        ({"init_token_ids": [1, 2, 3], "n_ctx": 2}, "init_token_ids has 3 tokens, but the context only n_ctx=2"),
        ({"init_phrase": "  "}, "has no token to start the context from"),
        ({"n_ctx": 0}, "at least 1 vector, got n_ctx=0"),
    ],
)
def test_bad_settings(prompted, settings, message):
    with pytest.raises(ValueError, match=message):
        prompted(CoOpConfig(**settings))


@pytest.mark.parametrize("config", [KgCoOpConfig, CoCoOpConfig, ContCoOpConfig])
def test_phrases_longer_than_the_context(prompted, config):
    with pytest.raises(ValueError, match="the phrase 'a photo of a' has 4 tokens, but the context only n_ctx=2"):
        prompted(config(n_ctx=2))


@learners
def test_words_need_a_tokenizer(variant, learner):
    base, config = variant(), LEARNERS[learner]()
    base.config._name_or_path = ""
    if config.init_phrase is None:
        assert get_peft_model(base, config).peft_config["default"].base["vocabulary"] is None
    else:
        with pytest.raises(ValueError, match="init_phrase needs a tokenizer and there is none .* give init_token_ids"):
            get_peft_model(base, config)


def test_a_learner_that_reads_names_needs_the_period(variant, encoders):
    base = variant()
    base.config._name_or_path = ""
    with pytest.raises(ValueError, match="reads names needs a tokenizer .* give period_id"):
        get_peft_model(base, CoOpConfig(n_ctx=2, position="front"))
    period = encoders().processor.tokenizer("a.", add_special_tokens=False)["input_ids"][-1]
    model = get_peft_model(base, CoOpConfig(n_ctx=2, position="front", period_id=period))
    assert features(model, encoders()).shape == (3, 16)


@pytest.mark.parametrize("second", [ContCoOpConfig, KgCoOpConfig, IVLPConfig])
def test_two_methods_on_one_token_table(fresh, second):
    model = fresh().model
    inject_adapter_in_model(CoOpConfig(init_phrase=PHRASE), model, "first")
    with pytest.raises(ValueError, match="has a coop adapter already"):
        inject_adapter_in_model(second(), model, "second")


def test_families_it_knows():
    assert set(TOKEN_TABLES) == {"clip", "siglip", "metaclip_2", "altclip", "chinese_clip", "open_clip"}
