"""Where a text ends, where its name stands, and where the context goes."""

import json

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from hf_transmiter.tuners.prompts.texts import (
    arrange,
    class_inputs,
    end_token_id,
    final_token_ids,
    find_rows,
    name_lengths,
    phrase_token_ids,
    start_tokens,
    text_ends,
    without_padding,
)


END = 9


# Where the context goes


@st.composite
def layouts(draw):
    start, slots = draw(st.integers(0, 1)), draw(st.integers(1, 6))
    names = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    length = start + max(names) + draw(st.integers(0, 5))
    return length, start, slots, draw(st.integers(0, slots)), names


@given(layouts())
def test_arrange(layout):
    length, start, slots, before, names = layout
    text, context = list(range(length)), list(range(length, length + slots))
    expected = [
        text[:start] + context[:before] + text[start : start + name] + context[before:] + text[start + name :]
        for name in names
    ]
    assert arrange(length, start, slots, before, torch.tensor(names)).tolist() == expected


@given(layouts())
def test_arrange_loses_nothing_and_names_play_no_part_at_the_end(layout):
    length, start, slots, before, names = layout
    order = arrange(length, start, slots, before, torch.tensor(names))
    assert torch.equal(order.sort(1).values, torch.arange(length + slots).expand(len(names), -1))
    first, other = (arrange(length, start, slots, slots, torch.full((1,), name)) for name in (1, names[0]))
    assert torch.equal(first, other)


# Where a text ends

words = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1, max_size=4)


def padded(texts, pad):
    length = max(map(len, texts))
    ids = [text + [pad] * (length - len(text)) for text in texts]
    mask = [[1] * len(text) + [0] * (length - len(text)) for text in texts]
    return torch.tensor(ids), torch.tensor(mask)


@given(words, st.integers(0, 3))
def test_ends_by_mask_and_by_end_token(texts, extra):
    texts = [text + [END] for text in texts]
    expected = torch.tensor([len(text) - 1 for text in texts])
    for pad in (0, END):
        ids, mask = padded(texts, pad)
        ids = torch.cat([ids, torch.full((len(ids), extra), pad)], 1)
        mask = torch.cat([mask, torch.zeros(len(ids), extra, dtype=mask.dtype)], 1)
        assert torch.equal(text_ends(ids, mask, None), expected)
        assert torch.equal(text_ends(ids, mask, END), expected)
        assert torch.equal(text_ends(ids, None, END), expected)
        rows = without_padding(ids, expected)
        assert [[token for token in row if token >= 0] for row in rows.tolist()] == texts
        place, known = find_rows(torch.cat([rows, torch.full_like(rows[:1], END)]), rows)
        assert known.tolist() == [True] * len(texts) + [texts == [[END]]]
        assert [texts[i] for i in place[:-1]] == texts


@given(words)
def test_ends_by_what_a_row_ends_in(texts):
    """SigLIP checkpoints whose configuration names an end token that their tokenizer does not have."""
    texts = [text + [END] for text in texts]
    ids, _ = padded(texts, END)
    for unknown in (None, 49407):
        assert torch.equal(text_ends(ids, None, unknown), torch.tensor([len(text) - 1 for text in texts]))


def test_a_row_of_equal_tokens_ends_at_once():
    assert text_ends(torch.tensor([[END, END], [1, END]]), None, None).tolist() == [0, 1]


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2", "altclip"])
def test_the_end_token_of_a_family(family):
    model, processor = tiny_models.build(family)
    ids = processor.tokenizer("cat.")["input_ids"]
    assert end_token_id(model.config) == ids[-1]
    assert ids[start_tokens(model.config)] == processor.tokenizer("cat", add_special_tokens=False)["input_ids"][0]


def test_the_end_token_of_old_checkpoints():
    model, processor = tiny_models.build("clip", legacy_eos=True)
    assert model.config.text_config.eos_token_id == 2
    assert end_token_id(model.config) == processor.tokenizer.eos_token_id


def test_bert_texts_end_by_their_mask():
    assert end_token_id(tiny_models.build("chinese_clip")[0].config) is None


# Names


def merging_tokenizer():
    """CLIP's, but with ``'.`` as one token, as its ``).`` is."""
    model = json.loads(tiny_models.clip_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], "'.</w>": len(model["vocab"])}
    merges = [tuple(pair) for pair in model["merges"]] + [("'", ".</w>")]
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize("tokenizer", [tiny_models.clip_tokenizer(), tiny_models.siglip_tokenizer(),
                                       tiny_models.xlmr_tokenizer(), tiny_models.bert_tokenizer()],
                         ids=["clip", "siglip", "xlmr", "bert"])  # fmt: skip
def test_name_lengths(tokenizer):
    texts = ["cat.", "big red dog.", "cat", "big red dog", "old x3 cat."]
    names = [len(tokenizer(text.strip("."), add_special_tokens=False)["input_ids"]) for text in texts]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    first = int(tokenizer.bos_token is not None or tokenizer.cls_token is not None)
    ends = text_ends(ids, mask, None)
    assert name_lengths(ids, ends, first, final_token_ids(tokenizer)[0]).tolist() == names
    with_period = [length + text.endswith(".") for length, text in zip(names, texts, strict=True)]
    assert name_lengths(ids, ends, first, None).tolist() == with_period


def test_a_period_merged_into_the_name_belongs_to_it():
    tokenizer = merging_tokenizer()
    ids = tokenizer(["cat'."], return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 4)  # start, cat, '., end
    ends = torch.tensor([3])
    assert name_lengths(ids, ends, 1, final_token_ids(tokenizer)[0]).tolist() == [2]
    apart = tiny_models.clip_tokenizer()
    ids = apart(["cat'."], return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 5)
    assert name_lengths(ids, torch.tensor([4]), 1, final_token_ids(apart)[0]).tolist() == [2]


def test_a_text_without_words_still_has_a_name():
    assert name_lengths(torch.tensor([[8, END], [7, END]]), torch.tensor([1, 1]), 1, 7).tolist() == [1, 1]


# Words to ids


def test_phrases():
    tokenizer = tiny_models.clip_tokenizer()
    ids = phrase_token_ids(tokenizer, "a photo of a")
    assert tokenizer("a photo of a cat.")["input_ids"][1:5] == ids
    with pytest.raises(ValueError, match="the phrase ' ' has no token"):
        phrase_token_ids(tokenizer, " ")


def test_class_inputs():
    tokenizer = tiny_models.clip_tokenizer()
    inputs = class_inputs(["old_car", "cat"], tokenizer, "clip", 16, 4)
    assert torch.equal(
        inputs["input_ids"], tokenizer(["old car.", "cat."], padding=True, return_tensors="pt").input_ids
    )
    assert inputs["attention_mask"].sum(1).tolist() == [5, 4]
    full = class_inputs(["cat"], tiny_models.siglip_tokenizer(), "siglip", 16, 4)
    assert set(full) == {"input_ids"} and full["input_ids"].shape == (1, 16)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there is no class name"),
        (["cat", " "], "class names must be words, got ' '"),
        (["cat", "dog", "cat"], "class names must differ, but 'cat' occur twice"),
        (["cat", "big old red blue cat dog tree car ship good"], "'big old .* good.' has 13 tokens, .* room for 12"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message):
        class_inputs(names, tiny_models.clip_tokenizer(), "clip", 16, 4)


def test_the_longest_name_that_fits():
    names = ["big old red blue cat dog tree car ship"]
    assert class_inputs(names, tiny_models.clip_tokenizer(), "clip", 16, 4)["input_ids"].shape == (1, 12)
