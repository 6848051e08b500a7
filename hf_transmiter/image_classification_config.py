"""[`TransMiterImageClassificationConfig`]: what a [`TransMiterForImageClassification`] is built from."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .families import check_family
from .trust import check_json


MAX_COUNT = 1000  # of layers; no model has as many
# Of adapter_config.json: what the head is made of, and which model it was made for.
_ADAPTER_FIELDS = (
    *("peft_type", "class_names", "auxiliary_names", "templates", "anchors_fingerprint"),
    *("form", "width", "mlp_ratio", "embed_dim"),
    *("base_model_name_or_path", "revision", "base_fingerprint"),
)


class TransMiterImageClassificationConfig(PreTrainedConfig):
    """Configuration of a [`TransMiterForImageClassification`].

    Args:
        base_config (`PreTrainedConfig` or `dict`): of the two-tower model whose image tower is used.
        adapter (`dict`): what the adapter's ``adapter_config.json`` says of its head, names and model.
        id2label (`dict[int, str]`, *optional*): defaults to the adapter's class names.

    Raises:
        ValueError: not a supported model, not a TransMiter adapter, other labels than its classes, or absurd sizes.
    """

    model_type = "transmiter"
    sub_configs_defaults = {"base_config": SubConfigSpec(config_class=AutoConfig, model_type="clip")}

    base_config: dict | PreTrainedConfig | None = None
    adapter: dict | None = None

    def __post_init__(self, **kwargs):
        # Entries that make transformers read other files, or the same ones otherwise.
        foreign = {"auto_map", "fusion_config", "quantization_config", "transformers_weights"} & set(kwargs)
        if foreign:
            raise ValueError(f"config.json of a TransMiter classifier must not have {', '.join(sorted(foreign))}.")
        if self.adapter is not None:
            check_json(self.adapter, "adapter_config", "the adapter in config.json")
            if self.adapter["peft_type"] != "TRANSMITER" or not self.adapter.get("embed_dim"):
                raise ValueError("the adapter in config.json is not that of a TransMiter classifier.")
            names = self.adapter["class_names"]
            labels = dict(enumerate(names)) if self.id2label is None else self.id2label
            wanted = {str(number) for number in range(len(names))}
            if not all(isinstance(label, str) for label in labels.values()) or {str(key) for key in labels} != wanted:
                raise ValueError(f"id2label must name the {len(names)} classes 0 to {len(names) - 1} of the adapter.")
            self.id2label, self.label2id = labels, {label: int(key) for key, label in labels.items()}
        _check_counts(kwargs)
        if isinstance(self.base_config, dict):
            check_json(self.base_config, "model_config", "base_config in config.json")
            check_family(self.base_config.get("model_type"), "The model in config.json")
            check_of_transformers(self.base_config.get("model_type"))
            _check_counts(self.base_config)
        elif self.base_config is not None:
            check_of_transformers(self.base_config.model_type)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, base_config: PreTrainedConfig, adapter: dict) -> TransMiterImageClassificationConfig:
        """From a model's configuration, which is kept, and the whole content of an ``adapter_config.json``."""
        kept = {key: adapter[key] for key in _ADAPTER_FIELDS if key in adapter}
        kept["peft_type"] = "TRANSMITER"  # an enum member in a config that was not read from a file
        name = kept.get("base_model_name_or_path") or ""
        if os.path.isdir(name):  # a path of this machine says nothing elsewhere
            name = kept["base_model_name_or_path"] = Path(name).name
        base_config.name_or_path = name
        return cls(base_config=base_config, adapter=kept)


def check_of_transformers(model_type: str | None) -> None:
    """
    Raises:
        ValueError: a model of open_clip, which transformers does not read from a folder.
    """
    if model_type == "open_clip":
        raise ValueError(
            "models of open_clip cannot be made an image classifier of transformers: use the adapter as it is, "
            "AnchorClassifier.from_pretrained(adapter)."
        )


def _check_counts(config: dict) -> None:
    """What is made one by one, in Python, would take for ever and all memory in absurd numbers."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif any(word in str(key) for word in ("layers", "depth", "repeats", "blocks", "num_labels")):
            numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, (int, float))]
            if len(numbers) > MAX_COUNT or any(abs(n) > MAX_COUNT for n in numbers):
                raise ValueError(f"{key} in config.json is more than {MAX_COUNT}: not a model's configuration.")
