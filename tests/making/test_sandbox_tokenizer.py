"""The tokenizer is a real CLIP one, knows the world's words and spells out all others."""

import pytest
from captions import all_words
from sandbox_tokenizer import CONTEXT_LENGTH, build_tokenizer
from transformers import AutoTokenizer, CLIPTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_word_of_the_world_is_one_token(tokenizer):
    assert all(len(tokenizer(word)["input_ids"]) == 3 for word in all_words())


def test_end_of_text_is_the_last_id_and_stands_once_at_the_end(tokenizer):
    end = tokenizer.eos_token_id
    assert end == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())
    for text in ["a photo of a striped red heart.", "a zebra-like café, 北京 (1984)!", "x_y^z~`|\\"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == end and ids.count(end) == 1


@pytest.mark.parametrize("text", ["a photo of a striped red heart", "paisley", "naïve 北 quux"])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_upper_case_does_not_matter(tokenizer):
    assert tokenizer("Faded TEAL bowtie")["input_ids"] == tokenizer("faded teal bowtie")["input_ids"]


def test_long_texts_are_cut_at_the_context_length(tokenizer):
    ids = tokenizer("a photo of a heart " * 20, truncation=True)["input_ids"]
    assert len(ids) == CONTEXT_LENGTH and ids[-1] == tokenizer.eos_token_id


def test_padding_does_not_hide_the_end(tokenizer):
    short, long = tokenizer(["heart", "a photo of a heart"], padding=True)["input_ids"]
    assert len(short) == len(long) and short.index(tokenizer.eos_token_id) == 2


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = "a photo of an unheard-of red heart."
    for cls in (CLIPTokenizer, AutoTokenizer):
        assert cls.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
