"""What the JSON files of a repository must hold, by kind: a [`Rule`] each, in `KINDS`. `checks` applies them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


SHORT = reprlib.Repr()
"""Quotes the values of strangers, however long they are."""
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlist = SHORT.maxdict = 3
SHORT.maxlevel = 2


MOST_CHARACTERS, MOST_NAMES, MOST_TEMPLATES = 1000, 100_000, 1000
"""Of a name or template, and how many of them there may be."""


class Misfit(Exception):
    """A value that does not fit its [`Rule`]: where it stands (``.class_names[1]``), and what is wrong with it."""

    def __init__(self, place: str, problem: str):
        super().__init__(place, problem)
        self.place, self.problem = place.removeprefix("."), problem


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Args:
        words (`str`): in words, after "must be".
        fits (`Callable`): whether a value is that, whatever is inside it.
        item (`Rule`, *optional*): of the items of a list, and of the values of an object that `keys` does not name.
        keys (`Mapping[str, Rule]`, *optional*): of the values of an object.
        name (`Rule`, *optional*): of its keys.
        required (`Collection[str]`, *optional*): keys that must be there.
        closed (`bool`, *optional*, defaults to `False`): whether there may be no others than `keys`.
    """

    words: str
    fits: Callable[[Any], bool]
    item: Rule | None = None
    keys: Mapping[str, Rule] = field(default_factory=dict)
    name: Rule | None = None
    required: Collection[str] = ()
    closed: bool = False

    def check(self, value, place: str = "") -> None:
        """
        Raises:
            Misfit: `value`, which stands at `place`, is not what it must be.
        """
        if not self.fits(value):
            raise Misfit(place, f"must be {self.words}, found {SHORT.repr(value)}")
        if isinstance(value, list) and self.item is not None:
            for number, item in enumerate(value):
                self.item.check(item, f"{place}[{number}]")
        if not isinstance(value, dict):
            return
        missing, unknown = sorted(set(self.required) - set(value)), sorted(set(value) - set(self.keys))
        if missing:
            raise Misfit(place, f"lacks {', '.join(missing)}")
        if self.closed and unknown:
            listed = SHORT.repr(unknown)[1:-1]
            raise Misfit(place, f"has the unknown key(s) {listed}; the keys are {', '.join(self.keys)}")
        for key, item in value.items():
            if self.name is not None:
                self.name.check(key, place)
            rule = self.keys.get(key, self.item)
            if rule is not None:
                rule.check(item, f"{place}.{key}")


def _or_null(rule: Rule) -> Rule:
    return replace(rule, words=f"{rule.words}, or null", fits=lambda value: value is None or rule.fits(value))


def _object(words: str = "an object", keys: Mapping[str, Rule] | None = None, **more) -> Rule:
    return Rule(words, lambda value: isinstance(value, dict), keys=keys or {}, **more)


def _record(words: str, keys: Mapping[str, Rule], optional: Collection[str] = ()) -> Rule:
    """An object with these keys and no others."""
    return _object(words, keys, required=[key for key in keys if key not in optional], closed=True)


def _list(words: str, item: Rule, most: int, least: int = 0) -> Rule:
    return Rule(words, lambda value: isinstance(value, list) and least <= len(value) <= most, item)


def _text(words: str, most: int = 1000, least: int = 0, pattern: str | None = None) -> Rule:
    """`pattern` must match the whole text."""

    def fits(value) -> bool:
        known = isinstance(value, str) and least <= len(value) <= most
        return known and (pattern is None or re.fullmatch(pattern, value) is not None)

    return Rule(words, fits)


def _whole(least: int, most: int, words: str | None = None) -> Rule:
    words = words or f"a whole number of {least:,} to {most:,}"
    return Rule(words, lambda value: type(value) is int and least <= value <= most)  # torch takes no 4.0 as a size


def _number(words: str, least: float, most: float = 1e300) -> Rule:
    """Not-a-number does not fit, nor does what is infinite."""

    def fits(value) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

    return Rule(words, fits)


def _one_of(*texts: str) -> Rule:
    return Rule(" or ".join(f'"{text}"' for text in texts), lambda value: value in texts)


def _one_or_some(one: Rule, most: int) -> Rule:
    some = _list("", one, most)

    def fits(value) -> bool:
        return value is None or one.fits(value) or some.fits(value) and all(map(one.fits, value))

    return Rule(f"{one.words}, or a list of at most {most} such, or null", fits)


_BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
_LABEL = _or_null(_text("a text of at most 1,000 characters"))
_FILLED = _text("a text that is not empty, of at most 1,000 characters", pattern=r"(?s:.*\S.*)")
_NAME = _text("a name of 1 to 1,000 characters", least=1)
_NAMES = _list("a list of at most 100,000 names", _NAME, MOST_NAMES)
_SOME_NAMES = _list("a list of 1 to 100,000 names", _NAME, MOST_NAMES, least=1)
_TEMPLATE = _text("a template of at most 1,000 characters with one {}", pattern=r"[^{}]*\{\}[^{}]*")
_TEMPLATES = _list("a list of 1 to 1,000 templates", _TEMPLATE, MOST_TEMPLATES, least=1)
_DIGEST = _text("a SHA-256 (64 hexadecimal digits)", pattern="[0-9a-f]{64}")
_REVISION = _text(
    "the name of a branch, tag or commit", most=255, pattern=r"(?![-/])(?!.*\.\.)[^\s~^:?*\[\\\x00-\x1f\x7f]+"
)
_NUMBER = _number("a finite number", least=-1e300)
_SIZE = _or_null(_whole(1, 1_000_000))
_FROM_ONE = _whole(1, 9 * 10**15, "a whole number of at least 1")
_SEED = _whole(-(2**63), 2**64 - 1, "a whole number of 64 bits")
_MODEL_ID = _record(
    "an object that names a model",
    {
        "name": _LABEL,
        "revision": _or_null(_REVISION),
        "fingerprint": _text("a text of at most 64 characters", most=64),
    },
)

_ADAPTER = _object(
    "the configuration of a PEFT adapter (an object)",
    {
        "peft_type": _text("the name of a PEFT method", pattern="[A-Z0-9_]{1,64}"),
        "base_model_name_or_path": _LABEL,
        "revision": _or_null(_REVISION),
        "rank_pattern": _or_null(_object()),
    },
    required=("peft_type",),
    name=_text("the name of a setting", pattern="(?!(self|cls)$)[A-Za-z_][A-Za-z0-9_]{0,99}"),
)
_TRANSMITER = _object(
    keys={
        "class_names": _SOME_NAMES,
        "auxiliary_names": _NAMES,
        "templates": _TEMPLATES,
        "form": _one_of("mlp", "linear"),
        **dict.fromkeys(("image_side", "text_side"), _or_null(_whole(0, 1_000_000))),
        "open_names": _BOOLEAN,
        "width": _SIZE,
        "mlp_ratio": _whole(1, 64),
        "train_basis": _BOOLEAN,
        "embed_dim": _or_null(_whole(1, 65_536)),
        "seed": _SEED,
        **dict.fromkeys(("anchors_fingerprint", "base_fingerprint"), _or_null(_DIGEST)),
        "provenance": _object(),
        **dict.fromkeys(("target_modules", "task_type"), _LABEL),
        "exclude_modules": Rule("null", lambda value: value is None),
        "inference_mode": _BOOLEAN,
    },
    required=("class_names", "templates", "form"),
)
_PROMPT = _object(
    keys={
        **dict.fromkeys(("n_ctx", "heads"), _or_null(_whole(1, 10_000))),
        "n_vision": _whole(1, 10_000),
        **dict.fromkeys(("text_depth", "vision_depth", "depth", "layer"), _whole(0, 10_000)),
        "init_phrase": _LABEL,
        "init_token_ids": _or_null(
            _list("a list of at most 10,000 token ids", _whole(0, 10**8, "a token id"), 10_000)
        ),
        "class_names": _or_null(_SOME_NAMES),
        "class_specific": _BOOLEAN,
        "seed": _SEED,
        **dict.fromkeys(("base", "provenance"), _or_null(_object())),
        "inference_mode": _BOOLEAN,
    },
)
METHODS = {
    "TRANSMITER": _TRANSMITER,
    **dict.fromkeys(("COOP", "KGCOOP", "COCOOP", "CONTCOOP", "IVLP", "MAPLE", "PROMPTSRC"), _PROMPT),
}
"""By `peft_type`: what ``adapter_config.json`` must hold besides what it must of every adapter."""

_ANCHORS = _record(
    "anchors: a JSON object as Anchors.save writes it",
    {"task": _NAMES, "auxiliary": _NAMES, "templates": _TEMPLATES},
    optional=("auxiliary", "templates"),
)
_VERSIONS = Rule(
    "an object of at most 100 versions by library",
    lambda value: isinstance(value, dict) and len(value) <= 100,
    item=_text("a text of at most 100 characters", most=100),
)
_BRIDGE = _record(
    "the facts of a bridge (an object)",
    {
        "space": _one_of("embedding", "logit"),
        "source": _one_of("images", "text"),
        **dict.fromkeys(("scale", "beta"), _NUMBER),
        **dict.fromkeys(("scale_back", "alignment", "held_out"), _or_null(_NUMBER)),
        "held_out_on": _or_null(_one_of("images", "names")),
        "num_pairs": _whole(0, 9 * 10**15, "a whole number of at least 0"),
        **dict.fromkeys(("strong", "weak"), _MODEL_ID),
        "anchors": _or_null(_object("anchors (an object)")),
        "dataset": _LABEL,
        "through": _NAMES,
        "versions": _VERSIONS,
    },
    optional=("scale_back", "held_out", "held_out_on", "dataset", "through", "versions"),
)
_SCORE = _record(
    "an object",
    {
        **dict.fromkeys(("method", "split", "metric"), _FILLED),
        "value": _or_null(_NUMBER),
        **dict.fromkeys(("std", "seconds"), _or_null(_number("a finite number of at least 0", least=0))),
        "seeds": _FROM_ONE,
        "dataset": _or_null(_FILLED),
        "num_images": _or_null(_FROM_ONE),
    },
    optional=("dataset", "num_images"),
)
_TEACHER = _record(
    "the facts of a tuned model (an object), as save_teacher writes them",
    {
        "weak": _LABEL,
        "revision": _or_null(_REVISION),
        "fingerprint": _DIGEST,
        "class_names": _SOME_NAMES,
        **dict.fromkeys(("templates", "zero_shot_templates"), _TEMPLATES),
        "settings": _object(),
        **dict.fromkeys(("taught_by", "learnt"), _or_null(_object())),
    },
    optional=("taught_by", "learnt"),
)

_TOWER = _or_null(_object(keys={"hidden_size": _SIZE}))
_MODEL = _object(
    "the configuration of a model (an object)",
    {"model_type": _LABEL, "projection_dim": _SIZE, "vision_config": _TOWER, "text_config": _TOWER},
)
_WIDTH, _FEW = _or_null(_whole(1, 16_384)), _or_null(_whole(1, 1024))
_RATIO = _or_null(_number("a number above 0 and up to 64", least=1e-300, most=64))
_VISION_CFG = {
    "width": _WIDTH,
    **dict.fromkeys(("head_width", "patch_size"), _FEW),
    "mlp_ratio": _RATIO,
    "layers": _one_or_some(_whole(1, 1000), 16),
    "image_size": _one_or_some(_whole(1, 4096), 2),
}
_TEXT_CFG = {
    "width": _WIDTH,
    "heads": _FEW,
    "layers": _or_null(_whole(1, 1000)),
    "context_length": _or_null(_whole(1, 100_000)),
    "vocab_size": _SIZE,
    "mlp_ratio": _RATIO,
}
_MODEL_CFG = {"embed_dim": _WIDTH, "vision_cfg": _object(keys=_VISION_CFG), "text_cfg": _object(keys=_TEXT_CFG)}
_OPEN_CLIP = _object(
    "the configuration of an open_clip model (an object)",
    {"model_cfg": _object(keys=_MODEL_CFG), "preprocess_cfg": _or_null(_object())},
)

KINDS: dict[str, tuple[Rule, str]] = {
    "adapter_config": (_ADAPTER, "Restore the adapter_config.json that save_pretrained wrote."),
    "anchors": (_ANCHORS, "Write anchors with Anchors.save."),
    "bridge": (_BRIDGE, "Write a bridge with Bridge.save."),
    "calibration": (_SOME_NAMES, "Write a pack with CalibrationPack.save."),
    "config": (_MODEL, "Restore the config.json that was saved with the model."),
    "open_clip_config": (_OPEN_CLIP, "Restore the open_clip_config.json that open_clip wrote."),
    "scores": (
        _list("a list of scores, as write_scores makes it", _SCORE, 100_000),
        "Write scores with write_scores.",
    ),
    "teacher": (_TEACHER, "Restore the teacher.json that was saved with the tuned model."),
}
"""What a file of this name (without its ending) must hold, and how to mend one that does not."""
