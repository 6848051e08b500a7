"""[`TransMiterForImageClassification`]: an adapter and the image tower of its model, a classifier for transformers.

``logits = head(f)`` for the image rows ``f`` of [`feature_rows`], unit embeddings and what the adapter reads of the
tower: the same numbers as `AnchorClassifier.classify`, without tokenizer and text tower. What the head needs of the
names is in the adapter.

Importing this module registers both classes with transformers' Auto classes.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..algebra import check_finite, check_unit, check_weights
from ..encoders.dual_encoder import load_image_processor, square_processor
from ..encoders.families import (
    IMAGE_PARTS,
    aligned,
    check_family,
    feature_rows,
    image_inputs,
    image_model,
    logit_scale_and_bias,
    shared_width,
)
from ..hub.adapter_files import CONFIG
from ..hub.checks import check_json, read_header
from ..hub.files import fill_folder
from ..hub.repo import fetch, public_name, read_json, split_revision
from ..tuners import TransMiterConfig, TransMiterLayer
from .classifier import AnchorClassifier


WEIGHTS = "model.safetensors"
MAX_COUNT = 1000  # of layers; no model has as many
_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
# Of adapter_config.json: what the head is made of, and which model it was made for.
_ADAPTER_FIELDS = (
    *("class_names", "auxiliary_names", "templates", "anchors_fingerprint"),
    *("form", "image_side", "text_side", "width", "mlp_ratio", "embed_dim"),
    *("base_model_name_or_path", "revision", "base_fingerprint"),
)


class TransMiterImageClassificationConfig(PreTrainedConfig):
    """Configuration of a [`TransMiterForImageClassification`].

    Args:
        base_config: of the two-tower model whose image tower is used.
        adapter: what the adapter's ``adapter_config.json`` says of its head, names and model.

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
            check_json(self.base_config, "config", "base_config in config.json")
            check_family(self.base_config.get("model_type"), "The model in config.json")
            _check_counts(self.base_config)
        super().__post_init__(**kwargs)
        if self.base_config.model_type == "open_clip":
            raise ValueError(
                "models of open_clip cannot be made an image classifier of transformers: use the adapter as it is, "
                "AnchorClassifier.from_pretrained(adapter)."
            )

    @classmethod
    def of(cls, base_config: PreTrainedConfig, adapter: dict) -> TransMiterImageClassificationConfig:
        """From a model's configuration, which is kept, and the whole content of an ``adapter_config.json``."""
        kept = {key: adapter[key] for key in _ADAPTER_FIELDS if key in adapter}
        base_config.name_or_path = kept["base_model_name_or_path"] = public_name(adapter["base_model_name_or_path"])
        return cls(base_config=base_config, adapter={"peft_type": "TRANSMITER", **kept})


class TransMiterForImageClassification(PreTrainedModel):
    """A picture's class by a TransMiter adapter, with the image tower of its model and nothing else.

    Works wherever transformers expects an image classifier: ``pipeline("image-classification")``,
    `AutoModelForImageClassification`, `Trainer`, which trains what [`label_tune`] does; `torch.export`. Made of a
    configuration alone its weights are random, or zero. Pipelines open files by themselves, and clip pictures of 16
    bits to white: pass those through [`read_picture`].

    Attributes:
        encoder (`PreTrainedModel`): the two-tower model without its text side.
        transmiter (`TransMiterLayer`): the head, in float32 whatever the encoder's dtype.
        image_processor (`BaseImageProcessor` or `None`): makes the pixels; saved with the model.

    Example:

    ```python
    >>> model = TransMiterForImageClassification.from_pretrained("user/adapter")
    >>> model.save_pretrained("classifier")
    >>> pipeline("image-classification", model="classifier")("tabby.jpg", top_k=1)
    [{'label': 'cat', 'score': 0.99}]

    >>> def prepare(batch):
    ...     pixels = model.image_processor(batch["image"], return_tensors="pt")["pixel_values"]
    ...     return {"pixel_values": pixels, "labels": batch["label"]}
    >>> arguments = TrainingArguments("out", remove_unused_columns=False, learning_rate=1e-3)
    >>> trainer = Trainer(model, arguments, train_dataset=labelled.with_transform(prepare))
    >>> trainer.train()
    >>> trainer.save_model("classifier")
    ```
    """

    config_class = TransMiterImageClassificationConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # of Trainer: the loss is a mean over the batch, whatever else is passed
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # What a fine-tuning adds to logits is a small difference of large numbers.
    _keep_in_fp32_modules_strict = ["transmiter"]

    def __init__(self, config: TransMiterImageClassificationConfig):
        super().__init__(config)
        if config.adapter is None:
            raise ValueError("there is no adapter in this config: build it by from_pretrained or from_classifier.")
        self.encoder = image_model(config.base_config)
        width = shared_width(self.encoder)
        if config.adapter["embed_dim"] != width:
            wanted = config.adapter["embed_dim"]
            raise ValueError(f"the adapter was made for embeddings of width {wanted}, this model has {width}.")
        self.transmiter = TransMiterLayer.holding(TransMiterConfig.from_peft_type(**config.adapter))
        self.image_processor: BaseImageProcessor | None = None
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """Pixels (B, 3, S, S), as the image processor makes them, to `logits` (B, C), float32; with class numbers
        `labels` (B,) also their cross entropy, `loss`."""
        inputs = image_inputs(self.encoder, pixel_values.to(self.encoder.dtype))
        rows = feature_rows(self.encoder.get_image_features(**inputs), self.transmiter.reads_tower)
        checked = not (self.training or torch.compiler.is_exporting() or rows.is_meta)
        if checked:
            check_unit(rows[:, : shared_width(self.encoder)], "image", "the classifier")
        logits = self.transmiter(rows, *logit_scale_and_bias(self.encoder))
        if checked:
            check_finite(logits, "logits of the classifier")
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _freeze(self) -> TransMiterForImageClassification:
        """Leaves only the head's learnable weights to `Trainer`."""
        self.requires_grad_(False)
        for weight in self.transmiter.learnable("default").values():
            weight.requires_grad_()
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes a classifier that stands alone: `config.json`, `model.safetensors` (image tower and head) and the
        image processor's file. Keywords are those of transformers; for the Hub, call `push_to_hub`.

        Raises:
            ValueError: the folder holds an adapter, weights are not finite, or `push_to_hub` was given.
        """
        if (Path(save_directory) / CONFIG).is_file():
            raise ValueError(f"{save_directory} holds an adapter: save the classifier to a folder of its own.")
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes to a folder only: call push_to_hub(repo_id).")
        check_weights(self.state_dict(), "the classifier's weights '{}'")
        # One file whose names are the model's own: what from_pretrained compares before it loads.
        kwargs |= {"max_shard_size": "1000GB", "save_original_format": False}

        def save(folder: Path) -> None:
            super(TransMiterForImageClassification, self).save_pretrained(folder, **kwargs)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(folder)

        fill_folder(save_directory, save)

    @classmethod
    def from_classifier(cls, classifier: AnchorClassifier) -> TransMiterForImageClassification:
        """The adapter that answers in `classifier` and a copy of its model's image tower.

        Raises:
            ValueError: there is no adapter, or others (LoRA, prompts) are inside the model.
        """
        adapter, tensors = classifier.adapter_tensors()
        encoder = classifier.encoder
        if any(isinstance(module, BaseTunerLayer) for module in encoder.model.modules()):
            raise ValueError(
                f"{encoder.name_or_path or 'the model'} has adapters inside it, which cannot be saved with a "
                "classifier: merge them first (merge_and_unload)."
            )
        config = TransMiterImageClassificationConfig.of(copy.deepcopy(encoder.model.config), adapter)
        with torch.device("meta"):
            model = cls(config)
        for part in IMAGE_PARTS:
            if hasattr(encoder.model, part):
                setattr(model.encoder, part, copy.deepcopy(getattr(encoder.model, part)))
        head = TransMiterConfig.from_peft_type(**config.adapter)
        model.transmiter = TransMiterLayer.holding(head, tensors, encoder.device)
        processor = getattr(encoder.processor, "image_processor", None)
        model.image_processor = None if processor is None else square_processor(processor, config.base_config)
        return model.eval()._freeze()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> TransMiterForImageClassification:
        """Loads what [`save_pretrained`] wrote, or a TransMiter adapter: [`from_classifier`] of what
        `AnchorClassifier.from_pretrained` makes of it, with the model that it names.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id (``id@revision`` too).
            **kwargs: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`; for a classifier all others of
                transformers, too.

        Raises:
            FileNotFoundError: neither an adapter nor a classifier there.
            ValueError: another kind of adapter or model, a model the adapter does not fit, or damaged files.
            OSError: the Hub has no such repository, or cannot be reached.
        """
        source, revision = split_revision(os.fspath(pretrained_model_name_or_path))
        hub = {key: kwargs.pop(key, None) for key in _HUB}
        hub["revision"] = hub["revision"] or revision
        hub = {key: value for key, value in hub.items() if value not in (None, "")}
        if "config" not in kwargs and fetch(source, CONFIG, **hub) is not None:
            if kwargs:
                raise ValueError(f"{', '.join(sorted(kwargs))}: not for an adapter; save it as a classifier first.")
            return cls.from_classifier(AnchorClassifier.from_pretrained(source, **hub))
        try:
            config = kwargs.pop("config", None) or _read_config(source, **hub)
            with torch.device("meta"):
                described = cls(copy.deepcopy(config))
        except (ValueError, OSError):
            raise
        except Exception as error:  # whatever transformers runs into with a stranger's sizes
            raise ValueError(f"config.json of {source!r} describes no model: {error}") from error
        _check_weights(source, described, **hub)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"config": config, "use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(source, **kwargs, **hub)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"{source!r} lacks the weights {missing}: fetch it again.")
        check_weights(model.state_dict(), "the classifier's weights '{}'")
        if fetch(source, "preprocessor_config.json", **hub) is not None:
            model.image_processor = load_image_processor(source, **hub)
        model = aligned(model)._freeze()
        return (model, info) if wants_info else model


def _check_counts(config: dict) -> None:
    """What is made one by one, in Python, would take for ever and all memory in absurd numbers."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif any(word in str(key) for word in ("layers", "depth", "repeats", "blocks", "num_labels")):
            numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, (int, float))]
            if len(numbers) > MAX_COUNT or any(abs(n) > MAX_COUNT for n in numbers):
                raise ValueError(f"{key} in config.json is more than {MAX_COUNT}: not a model's configuration.")


def _read_config(source: str, **hub) -> TransMiterImageClassificationConfig:
    content = read_json(source, "config.json", **hub)
    if content is None:
        raise FileNotFoundError(f"{source!r} holds neither a TransMiter adapter nor a classifier made of one.")
    if content.get("model_type") != TransMiterImageClassificationConfig.model_type:
        said = f"{source!r} holds a model of type {content.get('model_type')!r}, not a TransMiter adapter"
        raise ValueError(f"{said}: pass the adapter, which names its model.")
    return TransMiterImageClassificationConfig.from_dict(content)


def _check_weights(source: str, model: PreTrainedModel, **hub) -> None:
    """Makes sure that the weights there are those of `model` (on the meta device)."""
    path = fetch(source, WEIGHTS, **hub)
    if path is None:
        raise FileNotFoundError(f"{source!r} has no {WEIGHTS}, the only kind of weights that is read.")
    found = {name: shape for name, (_, shape) in read_header(path)[1].items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Names in the tower may change with transformers, which renames as it loads; shapes do not.
    heads = [{n: s for n, s in shapes.items() if n.startswith("transmiter.")} for shapes in (found, expected)]
    if heads[0] != heads[1] or Counter(found.values()) != Counter(expected.values()):
        raise ValueError(f"the weights in {source!r} are not those of the model in its config.json: fetch it again.")


AutoConfig.register(TransMiterImageClassificationConfig.model_type, TransMiterImageClassificationConfig)
AutoModelForImageClassification.register(TransMiterImageClassificationConfig, TransMiterForImageClassification)
