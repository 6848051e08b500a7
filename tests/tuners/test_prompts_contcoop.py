"""ContCoOp: a context that reads the base model it is on."""

import pytest
import slow_prompts as slow
import torch
from peft import PeftModel, get_peft_model
from prompting import NAMES, PHRASE, close, features, parameters, stir
from torch.nn.functional import layer_norm, linear, softmax

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.tuners import ContCoOpConfig, CoOpConfig
from hf_transmiter.tuners.prompts import phrase_token_ids, prompt_layer


def name_rows(encoder, name):
    ids = encoder.processor.tokenizer(name, add_special_tokens=False)["input_ids"]
    return slow.table(encoder.model)[torch.tensor(ids)]


def written_context(encoder):
    return slow.table(encoder.model)[phrase_token_ids(encoder.processor.tokenizer, PHRASE)]


def attend(own, query, keys, heads):
    """Multi-head attention of (M, width) to (L, width), a head at a time."""
    query = layer_norm(query, (16,), own["norm_q.weight"], own["norm_q.bias"])
    keys = layer_norm(keys, (16,), own["norm_k.weight"], own["norm_k.bias"])
    q = linear(query, own["query.weight"], own["query.bias"])
    k = linear(keys, own["key.weight"])
    v = linear(keys, own["value.weight"], own["value.bias"])
    parts = [
        softmax(a @ b.T / a.shape[1] ** 0.5, -1) @ c
        for a, b, c in zip(*(rows.chunk(heads, 1) for rows in (q, k, v)), strict=True)
    ]
    return linear(torch.cat(parts, 1), own["out.weight"], own["out.bias"])


def contexts(model, layer, encoder, names=NAMES):
    """(C, M, width): what the slots hold for each name."""
    seen, context = [], layer.context
    layer.context = lambda *args: seen.append(context(*args)) or seen[-1]
    features(model, encoder, names)
    del layer.context
    return seen[-1].detach()


# What it computes


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2"])
@pytest.mark.parametrize(
    "settings", [{}, {"heads": 4}, {"class_embed": "mean_token"}], ids=lambda settings: "-".join(settings) or "default"
)
def test_attention_by_hand(encoders, prompted, settings, family):
    """Names of one, three and more tokens in one batch: their padding must not be read."""
    encoder = encoders(family)
    model, layer = prompted(ContCoOpConfig(**settings), family)
    stir(model)
    own = parameters(model)
    assert {part.partition(".")[0] for part in own} == {"ctx", "norm_q", "norm_k", "query", "key", "value", "out"}
    expected = []
    for name in NAMES:
        keys = name_rows(encoder, name)
        if "class_embed" in settings:
            keys = keys.mean(0, keepdim=True)
        expected.append(own["ctx"] + attend(own, own["ctx"], keys, settings.get("heads", 1)))
    close(contexts(model, layer, encoder), torch.stack(expected))
    tokenizer = encoder.processor.tokenizer
    sequences = [slow.rows(encoder.model, tokenizer, *pair) for pair in zip(NAMES, expected, strict=True)]
    close(features(model, encoder), slow.text_features(encoder.model, sequences), atol=2e-5)


@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("family", ["clip", "metaclip_2", "siglip", "altclip", "chinese_clip"])
def test_text_feature_is_the_pooled_state_of_the_written_prompt(encoders, prompted, family, count):
    """Also with more vectors than the phrase has words."""
    encoder = encoders(family)
    model, layer = prompted(ContCoOpConfig(class_embed="text_feature", n_ctx=count), family)
    stir(model)
    context = contexts(model, layer, encoder)
    inputs = encoder._tokenize([f"{PHRASE} {name}." for name in NAMES])[0]
    output = encoder.model.text_model(**inputs)
    pooled = output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output
    own = parameters(model)
    for rows, feature in zip(context, pooled, strict=True):
        close(rows, own["ctx"] + attend(own, own["ctx"], feature[None], 1))


def test_a_single_key_is_a_linear_map(encoders, prompted):
    """With one row per name, the query's weights play no part."""
    for class_embed, matters in (("mean_token", False), ("tokens", True)):
        model, layer = prompted(ContCoOpConfig(class_embed=class_embed))
        stir(model)
        before = contexts(model, layer, encoders())
        parameters(model)["query.weight"].data.normal_()
        change = (contexts(model, layer, encoders()) - before).abs().max()
        assert change > 1e-3 if matters else change < 1e-6
        if not matters:
            gradient = torch.autograd.grad(features(model, encoders()).sum(), parameters(model)["query.weight"])[0]
            assert gradient.abs().max() < 1e-5


# How it starts


def test_starts(encoders, prompted):
    zero, _ = prompted(ContCoOpConfig())
    own = parameters(zero)
    assert not own["out.weight"].any() and not own["out.bias"].any() and own["query.weight"].any()
    assert torch.equal(own["ctx"], written_context(encoders()))
    features(zero, encoders())[:, :5].sum().backward()
    moved = {part for part, value in own.items() if value.grad is not None and value.grad.abs().max() > 0}
    assert moved == {"ctx", "out.weight", "out.bias"}  # the others follow in the second step


def test_the_same_seed_is_the_same_start(prompted):
    first, again, other = (parameters(prompted(ContCoOpConfig(seed=seed))[0]) for seed in (1, 1, 2))
    assert all(torch.equal(first[part], again[part]) for part in first)
    assert not torch.equal(first["query.weight"], other["query.weight"])


# Another base model


@pytest.fixture
def upgraded(model_dir, encoders):
    """The same tokenizer, other weights."""
    other = DualEncoder.from_pretrained(model_dir("clip", 1))
    assert not torch.equal(slow.table(other.model), slow.table(encoders().model))
    return other


@pytest.mark.parametrize(
    ("config", "follows"),
    [
        (lambda: CoOpConfig(init_phrase=PHRASE), False),
        (ContCoOpConfig, True),
        (lambda: ContCoOpConfig(class_embed="text_feature"), True),
    ],
    ids=["coop", "contcoop", "text_feature"],
)
def test_prompts_follow_the_token_table(encoders, prompted, upgraded, tmp_path, config, follows):
    model, layer = prompted(config())
    stir(model)
    before = contexts(model, layer, encoders())
    model.save_pretrained(str(tmp_path))
    moved = PeftModel.from_pretrained(upgraded.model, str(tmp_path))
    after = contexts(moved, prompt_layer(moved), upgraded)
    assert ((after - before).abs().max() > 0.1) if follows else torch.equal(after, before)
    same, there = parameters(model), parameters(moved)
    assert all(torch.equal(same[part], there[part]) for part in same)  # nothing learnt has changed


def test_only_the_names_rows_are_read(encoders, prompted):
    model, layer = prompted(ContCoOpConfig())
    stir(model)
    before = contexts(model, layer, encoders())
    tokenizer = encoders().processor.tokenizer
    table = layer.base_layer.weight.data
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a.")["input_ids"][-2]]
    table[special] = torch.randn(3, 16)
    assert torch.equal(contexts(model, layer, encoders()), before)  # start, end, period: not the name
    table[phrase_token_ids(tokenizer, "cat")] = torch.randn(1, 16)
    changed = (contexts(model, layer, encoders()) != before).any(-1).any(-1)
    assert changed.tolist() == [name == "cat" for name in NAMES]


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_embed": "words"}, "class_embed must be one of tokens, mean_token, text_feature, got 'words'"),
        ({"heads": 3}, "3 heads do not divide the text tower's width of 16"),
        ({"heads": -1}, "heads must be at least 1, got -1"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
    ],
)
def test_bad_settings(prompted, settings, message):
    with pytest.raises(ValueError, match=message):
        prompted(ContCoOpConfig(**settings))


def test_padding_other_than_the_end_token(fresh, monkeypatch):
    """As Gemma's tokenizer pads for SigLIP 2, under a model configuration that does not say what ends a text."""
    period, end, padding, name = 7, 3, 0, 12
    config = ContCoOpConfig(init_token_ids=[9], period_id=period, end_id=end)
    tuned = get_peft_model(fresh("siglip").model, config)
    ids = torch.full((2, 16), padding)
    ids[0, :3] = torch.tensor([name, period, end])
    ids[1, :4] = torch.tensor([name, name, period, end])
    layer, seen = prompt_layer(tuned), []
    context = layer.context
    monkeypatch.setattr(layer, "context", lambda *args: seen.append(args[1]) or context(*args))
    tuned.get_text_features(input_ids=ids)
    assert seen[0].named.sum(1).tolist() == [1, 2]
