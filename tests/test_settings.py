"""Settings: every number of every stage is checked, whichever field is added next."""

import importlib
import logging
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from peft import PeftConfig

from hf_transmiter.settings import SEED, TuningConfig, check_number


PLACES = ("settings", "cli.options", "evaluation.methods", "tuners.prompts.config", "tuners.transmiter.config")
NUMBERS = ("int", "float", "tuple[float, ...]", "bool")
OTHERS = (
    "RunOptions",
    "OutputOptions",
    "HubOptions",
    "Method",
    "Result",
)  # none of a stage
NEEDED = {"TransMiterConfig": {"class_names": ["cat"]}}


def every_field():
    """Numeric fields and switches of all dataclasses of settings in the package."""
    found = []
    for place in PLACES:
        module = importlib.import_module(f"hf_transmiter.{place}")
        for kind in vars(module).values():
            if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__:
                own = [item for item in fields(kind) if item.name not in PeftConfig.__dataclass_fields__]
                hints = [(item, str(item.type).removesuffix(" | None")) for item in own]
                found += [
                    (kind, item, hint) for item, hint in hints if hint in NUMBERS and kind.__name__ not in OTHERS
                ]
    return found


FIELDS = every_field()
every = pytest.mark.parametrize(
    ("kind", "item", "hint"), FIELDS, ids=[f"{kind.__name__}.{item.name}" for kind, item, _ in FIELDS]
)


def made(kind, **values):
    return kind(**{**NEEDED.get(kind.__name__, {}), **values})


@every
def test_no_field_takes_what_it_cannot_be(kind, item, hint):
    wrong = ["1", "x", [], {}, object(), float("nan"), -float("inf"), 10**400]
    if hint == "bool":
        wrong = ["yes", 2, 0.5, [], float("nan")]
    elif hint == "int":
        wrong += [1.5, True, float("inf"), 2**70, *([] if kind.__name__ == "TransMiterConfig" else [-5])]
    else:
        wrong += [True, -1.0]
    if "tuple" in hint:
        wrong = [3.0, (), *([one] for one in wrong)]
    for value in wrong:
        with pytest.raises(ValueError, match=item.name) as caught:
            made(kind, **{item.name: value})
        assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_the_fields_are_found():
    found = {f"{kind.__name__}.{item.name}" for kind, item, _ in FIELDS}
    assert {"TuningConfig.epochs", "TransferConfig.beta", "ExtractionConfig.lambdas", "DataOptions.max_images"} < found
    assert {"RowSettings.num_anchors", "CoOpConfig.layer", "TransMiterConfig.width", "FitConfig.seed"} < found


def test_numbers_of_other_libraries_become_plain_ones():
    config = TuningConfig(epochs=np.int64(3), lr=np.float32(0.5), shots=np.uint8(4))
    assert [type(value) for value in (config.epochs, config.lr, config.shots)] == [int, float, int]
    assert TuningConfig(lr=1).lr == 1.0 and type(TuningConfig(lr=1).lr) is float


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (-1, {"least": 0}, "it must not be negative, got -1"),
        (0, {"least": 1}, "it must be at least 1, got 0"),
        (2**63, SEED, "it must be at most 9,223,372,036,854,775,807"),
        (True, {}, "it must be a whole number, got True"),
        (1.0, {}, "it must be a whole number, got 1.0"),
        ("9" * 1000, {}, r"it must be a whole number, got '9{59}\.\.\."),
        (10**5000, {}, "it must be at most 2,147,483,647, got a huge number"),
    ],
    ids=range(7),
)
def test_one_sentence_says_what_is_allowed(value, limits, message):
    with pytest.raises(ValueError, match=message):
        check_number("it", value, **limits)


def test_infinity_is_for_where_it_means_something():
    assert check_number("beta", float("inf"), float, least=0, infinite=True) == float("inf")
    for value in (float("inf"), float("nan"), 10**400):
        with pytest.raises(ValueError, match="beta must be a number"):
            check_number("beta", value, float)


def test_a_pull_without_weight_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        TuningConfig(pull="l2").of("coop")
        TuningConfig(pull="l2", keep_near=1.0).of("coop")
        TuningConfig(pull="kl").of("contcoop")
    assert [record.message for record in caplog.records] == [
        "the pull l2 has no weight, so it does nothing: give keep_near, such as 1.0."
    ]
