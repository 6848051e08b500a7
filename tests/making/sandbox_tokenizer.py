"""The sandbox's tokenizer and image processor: the real CLIP classes, with a vocabulary made for the world."""

from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_transmiter.sandbox.world import IMAGE_SIZE


CONTEXT_LENGTH = 24
PIXEL_MEAN, PIXEL_STD = 0.5, 0.27

_MERGES = Path(__file__).with_name("merges.txt")
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` whose BPE was trained to completion on the world's words: one token per word.

    As in CLIP, all 256 bytes are in the alphabet, so a word it does not know is spelled out and nothing is ever
    unknown (the unknown token is the end-of-text token, which would cut the text short), and the end-of-text token
    has the highest id, because text is pooled there. The merges are stored, and not learnt again, because
    `tokenizers.trainers.BpeTrainer` breaks ties in another way in every process, which would renumber the tokens.
    """
    letters = sorted(ByteLevel.alphabet())
    merges = [tuple(line.split()) for line in _MERGES.read_text(encoding="utf-8").splitlines()[1:]]
    merged = dict.fromkeys("".join(pair) for pair in merges)
    tokens = [_START, *letters, *(letter + _WORD_END for letter in letters), *merged, _END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def build_processor() -> CLIPProcessor:
    """The tokenizer together with a Pillow image processor for 32 x 32 pictures."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    return CLIPProcessor(image_processor=images, tokenizer=build_tokenizer())
