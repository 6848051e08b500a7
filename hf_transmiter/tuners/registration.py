"""Makes this package's methods known to PEFT: three dictionary entries per method."""

import enum

import peft
from peft import PeftConfig, mapping
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


TESTED = "peft 0.21.2 with transformers 5.23.0 and 5.24.0"
"""Pairs that the whole test suite has passed with."""

_INTERNALS = (
    (mapping, ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")),
    (
        tuners_utils.BaseTuner,
        (
            "_check_new_adapter_config",
            "_prepare_adapter_config",
            "_create_and_replace",
            "_replace_module",
            "_post_injection_hook",
            "_remap_adapter_state_dict_for_load",
            "_unload_and_optionally_merge",
        ),
    ),
    (
        tuners_utils.BaseTunerLayer,
        ("set_adapter", "active_adapters", "disable_adapters", "_move_adapter_to_device_of_base_layer"),
    ),
)
"""What a method from outside needs of PEFT beyond its documented functions."""


class PeftType(str, enum.Enum):  # noqa: UP042 - as in PEFT
    """The PEFT types of this package. PEFT's own enum stays as it is: it looks types up by value."""

    TRANSMITER = "TRANSMITER"
    COOP = "COOP"
    KGCOOP = "KGCOOP"
    COCOOP = "COCOOP"
    CONTCOOP = "CONTCOOP"
    IVLP = "IVLP"
    MAPLE = "MAPLE"
    PROMPTSRC = "PROMPTSRC"


class Tuner(BaseTuner):
    """What the tuners of this package have in common: the module they hang on follows from the model, not from
    `target_modules`, and nothing can be merged; `unload` takes their hooks off."""

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        name = next((name for name, known in self.peft_config.items() if known is config), "")
        if name and (name in self.prefix or self.prefix in name):
            raise ValueError(f"the adapter name {name!r} clashes with the prefix {self.prefix!r}: choose another one.")

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        config.target_modules = None

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            raise NotImplementedError("this kind of adapter cannot be merged into the model's weights; use unload().")
        for layer in self.model.modules():
            if isinstance(layer, self.tuner_layer_cls):
                layer.detach()
        return super()._unload_and_optionally_merge(merge=False, **kwargs)


def check_peft() -> None:
    """Whether the PEFT that is installed still has what registration from outside needs.

    Raises:
        ImportError: something is missing.
    """
    missing = [f"{owner.__name__}.{name}" for owner, names in _INTERNALS for name in names if not hasattr(owner, name)]
    if missing:
        raise ImportError(
            f"hf_transmiter cannot register its adapters with peft {peft.__version__}, which has no "
            f"{', '.join(missing)}: install a pair that was tested ({TESTED})."
        )


def register(peft_type: PeftType, config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Enters a method into PEFT's mappings; doing it twice is harmless.

    Raises:
        KeyError: another package has taken the name.
    """
    taken = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type, config_cls)
    if taken.__qualname__ != config_cls.__qualname__:
        raise KeyError(f"the PEFT type {peft_type.value} is already taken by {taken.__module__}.{taken.__qualname__}.")
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_cls
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_cls.prefix


check_peft()  # before any method is registered: one sentence now instead of an AttributeError in the middle of a call
