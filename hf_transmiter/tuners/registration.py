"""Makes this package's methods known to PEFT: three dictionary entries per method."""

import enum

from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner


class PeftType(str, enum.Enum):
    """The PEFT types of this package. PEFT's own enum stays as it is: it looks types up by value."""

    TRANSMITER = "TRANSMITER"
    COOP = "COOP"
    KGCOOP = "KGCOOP"
    COCOOP = "COCOOP"
    CONTCOOP = "CONTCOOP"
    IVLP = "IVLP"
    MAPLE = "MAPLE"
    PROMPTSRC = "PROMPTSRC"


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
