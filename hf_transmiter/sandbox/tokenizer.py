"""The sandbox's tokenizer and image processor: the real CLIP classes, with a vocabulary made for the world."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_transmiter.sandbox.words import all_words
from hf_transmiter.sandbox.world import IMAGE_SIZE


CONTEXT_LENGTH = 24
PIXEL_MEAN, PIXEL_STD = 0.5, 0.27

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` whose BPE was trained to completion on the world's words: one token per word.

    As in CLIP, all 256 bytes are in the alphabet, so a word it does not know is spelled out and nothing is ever
    unknown (the unknown token is the end-of-text token, which would cut the text short), and the end-of-text token
    has the highest id, because text is pooled there.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = letters + [letter + _WORD_END for letter in letters]
    bpe = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix=_WORD_END, show_progress=False
    )
    bpe.train_from_iterator([" ".join(all_words())], trainer)
    learned = json.loads(bpe.to_str())["model"]
    longer = [token for token in sorted(learned["vocab"], key=learned["vocab"].get) if token not in set(alphabet)]
    tokens = [_START, *alphabet, *longer, _END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learned["merges"]],
        model_max_length=CONTEXT_LENGTH,
    )


def build_processor() -> CLIPProcessor:
    """The tokenizer together with a Pillow image processor for 32 x 32 pictures."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    return CLIPProcessor(image_processor=images, tokenizer=build_tokenizer())
