"""Makes this package's methods known to PEFT: three dictionary entries per method."""

import enum
import re
import warnings
from collections.abc import Mapping

import peft
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..algebra import check_weights


# PEFT asks every model for a name that transformers 5 warns of; whoever loads an adapter can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

TESTED = "peft 0.21.2 with transformers 5.23.0 and 5.24.0, peft 0.21.0 with transformers 5.22.0"
"""Pairs that the whole test suite has passed with."""

_INTERNALS = (
    (mapping, ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")),
    (
        BaseTuner,
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
        BaseTunerLayer,
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


class AdapterLayer(nn.Module, BaseTunerLayer):
    """What the layers of this package have in common: any number of adapters, and `hooks` on the model.

    Each of `parts` (parameters) and `modules_of` (leaf modules) is an attribute `prefix + part`, a flat container by
    adapter name: PEFT saves nested modules under the adapter's name and then loses them silently on loading.
    """

    prefix = ""
    parts: tuple[str, ...] = ()
    modules_of: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = tuple(cls.prefix + part for part in (*cls.parts, *cls.modules_of))

    def __init__(self):
        super().__init__()
        self.configs: dict[str, PeftConfig] = {}
        self.merged_adapters = []
        self.hooks = []
        for part in self.parts:
            setattr(self, self.prefix + part, nn.ParameterDict())
        for part in self.modules_of:
            setattr(self, self.prefix + part, nn.ModuleDict())

    @property
    def active_name(self) -> str | None:
        """The adapter that answers: the first active one held here."""
        return next((name for name in self.active_adapters if name in self.configs), None)

    def part(self, part: str, name: str):
        """The parameter or module `part` of the adapter `name`."""
        return getattr(self, self.prefix + part)[name]

    def fill(self, name: str, parts: Mapping[str, Tensor | nn.Module]) -> None:
        """Gives an adapter its parts, float32 whatever torch's default; tensors become parameters."""
        for part, value in parts.items():
            value = nn.Parameter(value.float()) if isinstance(value, Tensor) else value.float()
            getattr(self, self.prefix + part)[name] = value

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names) -> "AdapterLayer":
        """What PEFT asks where *another* tuner, a LoRA's, is unloaded or merged: this layer stays, without the other's
        around what it wraps."""
        inner = getattr(self, "base_layer", None)
        if isinstance(inner, BaseTunerLayer):
            if merge:
                inner.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.base_layer = inner.get_base_layer()
        return self

    def detach(self) -> None:
        """Takes the hooks off the model."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """All weights of one adapter, by part: `anchors`, `basis`, `up.weight`, ..."""
        found = {}
        for container in self.adapter_layer_names:
            part, entries = container.removeprefix(self.prefix), getattr(self, container)
            entry = entries[name] if name in entries else None
            if isinstance(entry, nn.Module):
                found.update({f"{part}.{key}": parameter for key, parameter in entry.named_parameters()})
            elif entry is not None:
                found[part] = entry
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The [`weights`] of one adapter, without their gradients."""
        return {part: parameter.detach() for part, parameter in self.weights(name).items()}

    def check_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Whether `tensors` can take the place of one adapter's.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape, or not finite.
        """
        own = self.tensors(name)
        odd = sorted(own.keys() ^ tensors.keys())
        if odd:
            said = "lack" if odd[0] in own else "hold"
            raise ValueError(
                f"the weights {said} {odd[0]!r}, unlike a {self.prefix[:-1]} adapter of this configuration: they are "
                "damaged, or belong to another method or another configuration."
            )
        for key, tensor in own.items():
            if tensor.shape != tensors[key].shape:
                raise ValueError(f"{key} must be {tuple(tensor.shape)}, got {tuple(tensors[key].shape)}.")
        check_weights(tensors, "the weights '{}'")


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

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT only warns of tensors that a file lacks, is silent on those it has beside, and takes NaN as it comes.
        layers = ((name, module) for name, module in model.named_modules() if isinstance(module, cls.tuner_layer_cls))
        place, layer = next(layers)
        parts = {re.sub(rf"^(.*\.)?{cls.prefix}", "", key): tensor for key, tensor in state_dict.items()}
        layer.check_tensors(adapter_name, parts)
        # Inside a PeftModel around a PeftModel the layer has a longer name than in the file.
        state_dict = {f"{place}.{cls.prefix}{part}": tensor for part, tensor in parts.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            raise NotImplementedError("this kind of adapter cannot be merged into the model's weights; use unload().")
        # PEFT's own would take the layers of every other tuner off, too.
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, self.tuner_layer_cls):
                layer.detach()
                parent, _, child = name.rpartition(".")
                if hasattr(layer, "base_layer"):
                    setattr(self.model.get_submodule(parent), child, layer.base_layer)
                for adapter in layer.configs:
                    self.peft_config.pop(adapter, None)
        if hasattr(self.model, "peft_config") and not self.peft_config:
            del self.model.peft_config
        return self.model


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
