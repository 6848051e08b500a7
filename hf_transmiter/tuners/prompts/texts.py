"""Token ids of prompts: where a text ends, how long its name is, where the context goes, which class it names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoTokenizer

from ...data.class_names import check_names
from ...encoders.families import SIGLIP, text_positions, tokenize
from ...encoders.open_clip import load_tokenizer as load_open_clip_tokenizer
from ...hub.repo import model_location


def phrase_token_ids(tokenizer, phrase: str) -> list[int]:
    """Token ids of a phrase without start and end tokens, as they would stand before a name.

    Raises:
        ValueError: the phrase has no token.
    """
    ids = tokenizer(phrase, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the phrase {phrase!r} has no token to start the context from.")
    return list(ids)


def final_token_ids(tokenizer) -> tuple[int, int]:
    """Token ids of a period that follows a word, and of the end of a text."""
    *_, period, end = tokenizer("a.")["input_ids"]
    return period, end


def load_tokenizer(model: nn.Module):
    """The tokenizer saved beside a transformers model, `None` where there is none."""
    config = model.config
    if config.model_type == "open_clip":
        return load_open_clip_tokenizer(text_positions(model))
    try:
        name, revision = model_location(config._name_or_path), getattr(config, "_commit_hash", None)
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def class_inputs(names: Sequence[str], tokenizer, family: str, positions: int, context: int) -> dict[str, Tensor]:
    """Token ids (C, L) and mask of the class prompts (`"{}."` filled with each name, underscores as spaces), cut at
    the longest one.

    The text tower reads at most `positions` tokens, of which the `context` takes so many.

    Raises:
        ValueError: no names, a name that is there twice, or one too long for the tower beside the context.
    """
    check_names(names, "the prompts")
    prompts = [f"{name.replace('_', ' ')}." for name in names]
    lengths = [len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]]
    longest = max(range(len(names)), key=lengths.__getitem__)
    if lengths[longest] > positions - context:
        raise ValueError(
            f"the prompt {prompts[longest]!r} has {lengths[longest]} tokens, but the context leaves room for "
            f"{positions - context}: shorten the name, or use a smaller n_ctx or a shorter init_phrase."
        )
    return tokenize(tokenizer, prompts, family, positions)


def text_ends(ids: Tensor, mask: Tensor | None, end_id: int | None) -> Tensor:
    """(B,): position of each text's last token before the padding.

    By the mask; without one by the first `end_id`; without that, the first of the equal tokens a row ends in.
    """
    if mask is not None:
        return mask.long().sum(1) - 1
    if end_id is not None and holds((ids == end_id).any(1).all(), "a text has no end token"):
        return (ids == end_id).int().argmax(1)
    differs = ids != ids[:, -1:]
    last = ids.shape[1] - differs.flip(1).int().argmax(1)
    return last.where(differs.any(1), torch.zeros_like(last))


def holds(condition: Tensor, otherwise: str) -> bool:
    """Whether a condition (a 0-dimensional tensor) holds. While a model is exported its value is not known: it becomes
    part of the program, which then fails with `otherwise`."""
    if not torch.compiler.is_exporting():
        return bool(condition)
    torch._assert_async(condition, otherwise)
    return True


def without_padding(ids: Tensor, ends: Tensor) -> Tensor:
    """(B, L): -1 behind each text's end, so that texts are compared by their tokens."""
    return ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) > ends[:, None], -1)


def find_rows(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(B,): where each row [`without_padding`] is in a table of them, and whether it is there at all."""
    width = max(rows.shape[1], table.shape[1])
    rows, table = (pad(each, (0, width - each.shape[1]), value=-1) for each in (rows, table.to(rows.device)))
    equal = (rows[:, None] == table).all(-1)
    return equal.int().argmax(1), equal.any(1)


def name_lengths(ids: Tensor, ends: Tensor, start: int, period_id: int | None) -> Tensor:
    """(B,): tokens of each name, which stands between the start token and its period, if it has one."""
    lengths = ends - start
    if period_id is not None:
        before_end = ids.gather(1, (ends - 1).clamp(min=0)[:, None])[:, 0]
        lengths = lengths - (before_end == period_id).long()
    return lengths.clamp(min=1)


def arrange(length: int, start: int, slots: int, before: int, names: Tensor) -> Tensor:
    """(B, L + M): index into ``[text | slots]`` that puts `before` slots ahead of the name and the others after it.

    Args:
        length, slots (`int`): L tokens of a text, M slots.
        start, before (`int`): tokens and slots ahead of the name.
        names (`Tensor`): (B,) tokens of each name; plays no part when all slots are ahead of it.
    """
    place = torch.arange(length + slots, device=names.device).expand(names.shape[0], -1)
    after = start + before + names[:, None]  # first place behind the name
    order = torch.where(place < start + before, length + place - start, place - before)
    order = torch.where(place >= after, length + place - start - names[:, None], order)
    order = torch.where(place >= after + slots - before, place - slots, order)
    return torch.where(place < start, place, order)


def end_token_id(config) -> int | None:
    """What marks the end of a text in this family, `None` where only a mask tells."""
    if config.model_type == "chinese_clip":
        return None
    return config.text_config.vocab_size - 1 if _legacy(config) else config.text_config.eos_token_id


def start_token_id(config) -> int:
    """The token before the first word of a CLIP or MetaCLIP 2 text."""
    return config.text_config.vocab_size - 2 if _legacy(config) else config.text_config.bos_token_id


def _legacy(config) -> bool:
    # CLIP checkpoints written before transformers 4.31 have wrong ids. In MetaCLIP 2's vocabulary 2 is right.
    return config.model_type == "clip" and config.text_config.eos_token_id == 2


def start_tokens(config) -> int:
    """Tokens before the first word: 1, or 0 in the SigLIP families."""
    return 0 if config.model_type in SIGLIP else 1
