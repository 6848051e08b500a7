"""[`TransMiterForImageClassification`]: an adapter and the image tower of its model, a classifier for transformers.

``logits = head(x)`` for unit image rows ``x = normalize(image_model(pixels))``: the same numbers as
`AnchorClassifier.classify`, without tokenizer and text tower. What the head needs of the names is in the adapter.

What itself imports transformers' auto classes (PEFT, `backbone`, `classifier`, `tuners`) is imported where it is used,
not above: this module is loaded together with those classes, in the middle of such an import.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
)
from transformers.modeling_outputs import ImageClassifierOutput

from .families import (
    IMAGE_PARTS,
    TEXT_PARTS,
    aligned,
    check_family,
    image_inputs,
    image_model,
    logit_scale_and_bias,
    shared_width,
    unit_rows,
)
from .hub import SANDBOX, fetch, is_open_clip, model_location, read_json, split_revision
from .image_classification_config import TransMiterImageClassificationConfig, check_of_transformers
from .solvers import check_finite
from .transfers import CONFIG, read_adapter
from .trust import read_header


if TYPE_CHECKING:
    from .backbone import DualEncoder
    from .classifier import AnchorClassifier
    from .tuners import TransMiterLayer

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


class TransMiterForImageClassification(PreTrainedModel):
    """A picture's class by a TransMiter adapter, with the image tower of its model and nothing else.

    Works wherever transformers expects an image classifier: ``pipeline("image-classification")``,
    `AutoModelForImageClassification`, `Trainer`.

    Args:
        config (`TransMiterImageClassificationConfig`): of the model and the adapter; weights are random, or zero.

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
    ```
    """

    config_class = TransMiterImageClassificationConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # What a fine-tuning adds to logits is a small difference of large numbers.
    _keep_in_fp32_modules_strict = ["transmiter"]
    _keys_to_ignore_on_load_unexpected = [rf"^(encoder\.)?{part}\." for part in TEXT_PARTS]
    _keys_to_ignore_on_load_missing = [
        r"^transmiter\."
    ]  # no model's own weights have them; a classifier's are checked

    def __init__(self, config: TransMiterImageClassificationConfig):
        super().__init__(config)
        if config.adapter is None:
            raise ValueError("there is no adapter in this config: build it by from_pretrained or from_classifier.")
        self.encoder = image_model(config.base_config)
        width = shared_width(self.encoder)
        if config.adapter["embed_dim"] != width:
            raise ValueError(
                f"the adapter was made for embeddings of width {config.adapter['embed_dim']}, this model has {width}."
            )
        self.transmiter = _head(config.adapter)
        self.image_processor: BaseImageProcessor | None = None
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs
    ) -> ImageClassifierOutput | tuple:
        """
        Args:
            pixel_values (`Tensor`): (B, 3, S, S), as the image processor makes them.
            labels (`Tensor`, *optional*): (B,) class numbers; gives the cross entropy as `loss`.
            return_dict (`bool`, *optional*): `False` for a tuple.

        Returns:
            `ImageClassifierOutput`: `logits` (B, C), float32, and `loss`.
        """
        inputs = image_inputs(self.encoder, pixel_values.to(self.encoder.dtype))
        image_embeds = unit_rows(self.encoder.get_image_features(**inputs))
        logits = self.transmiter(image_embeds, *logit_scale_and_bias(self.encoder))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes a classifier that stands alone: `config.json`, `model.safetensors` (image tower and head) and the
        image processor's file. Each file is replaced in one step.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            **kwargs: of `PreTrainedModel.save_pretrained`; for the Hub, call `push_to_hub`.

        Raises:
            ValueError: the folder holds an adapter, or `push_to_hub` was given.
        """
        target = Path(save_directory)
        if (target / CONFIG).is_file():
            raise ValueError(f"{target} holds an adapter: save the classifier to a folder of its own.")
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes to a folder only: call push_to_hub(repo_id).")
        target.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            # One file whose names are the model's own: what from_pretrained compares before it loads.
            kwargs |= {"max_shard_size": "1000GB", "save_original_format": False}
            super().save_pretrained(temporary, **kwargs)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(temporary)
            for file in temporary.iterdir():
                os.replace(file, target / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def from_classifier(cls, classifier: AnchorClassifier) -> TransMiterForImageClassification:
        """The adapter that answers in `classifier` and a copy of its model's image tower.

        Raises:
            ValueError: there is no adapter, or others (LoRA, prompts) are inside the model.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

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
        model.transmiter = _head(config.adapter, tensors).to(encoder.device)
        model.image_processor = _square(getattr(encoder.processor, "image_processor", None), config.base_config)
        return model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        base_model: str | os.PathLike | PreTrainedModel | DualEncoder | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **kwargs,
    ) -> TransMiterForImageClassification:
        """Loads a TransMiter adapter with the image tower of its model, or what [`save_pretrained`] wrote.

        The text tower is not read where the name (and the revision, if one is named) is that of the adapter's own
        model at a commit of the Hub: that commit is loaded. Any other, such as a model in a folder, is compared with
        it by its weights and loaded whole for that.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id of an adapter or a classifier.
            base_model (`str`, `os.PathLike`, `PreTrainedModel` or `DualEncoder`, *optional*):
                The adapter's model, where it is not found under the name in the adapter's config; ``id@revision``
                too. A loaded model is copied.
            revision (`str`, *optional*): branch, tag or commit of the adapter or classifier.
            token (`str` or `bool`, *optional*): Hub token.
            cache_dir (`str` or `os.PathLike`, *optional*): download cache.
            subfolder (`str`, *optional*): folder inside the repository.
            local_files_only (`bool`, *optional*, defaults to `False`): never ask the Hub.
            dtype (`torch.dtype` or `str`, *optional*):
                Of the image tower; `torch.float32` for an adapter and as it was saved for a classifier when omitted.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where to put the model.
            **kwargs: of `PreTrainedModel.from_pretrained`, for a classifier.

        Raises:
            FileNotFoundError: neither an adapter nor a classifier there.
            ValueError: another kind of adapter or model, a model the adapter does not fit, or damaged files.
            OSError: the Hub has no such repository, or cannot be reached.
        """
        source, pinned = split_revision(os.fspath(pretrained_model_name_or_path))
        hub = {"revision": revision or pinned, "token": token, "cache_dir": cache_dir, "subfolder": subfolder or None}
        hub = {key: value for key, value in hub.items() if value is not None}
        hub |= {"local_files_only": True} if local_files_only else {}
        if isinstance(kwargs.get("config"), cls.config_class) or fetch(source, CONFIG, **hub) is None:
            if base_model is not None:
                raise ValueError(f"{source!r} holds no adapter: base_model is for adapters, leave it out.")
            found = cls._from_classifier_files(source, hub, dtype=dtype, **kwargs)
        elif kwargs:
            raise ValueError(f"{', '.join(sorted(kwargs))}: not for an adapter; save it as a classifier first.")
        else:
            found = cls._from_adapter(source, hub, base_model, dtype, device)
        return found.to(device) if device is not None and not isinstance(found, tuple) else found

    @classmethod
    def _from_adapter(cls, source: str, hub: dict, base_model, dtype, device) -> TransMiterForImageClassification:
        from .backbone import DualEncoder
        from .classifier import AnchorClassifier

        if not isinstance(base_model, (str, os.PathLike, type(None))):
            if dtype is not None or device is not None:
                raise ValueError("dtype and device are those of the loaded base_model: leave them out.")
            encoder = base_model if isinstance(base_model, DualEncoder) else DualEncoder(base_model)
            return cls.from_classifier(AnchorClassifier.from_pretrained(source, encoder, **hub))
        adapter, tensors = read_adapter(source, **hub)
        own = (adapter.get("base_model_name_or_path"), adapter.get("revision"))
        name, revision = own if base_model is None else split_revision(os.fspath(base_model))
        if name is None:
            raise ValueError(f"the adapter {source!r} does not say for which model it was made: pass base_model.")
        if is_open_clip(name):
            check_of_transformers("open_clip")
        shared = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if key in hub}
        if _pins(own, name, revision):
            return cls._from_image_tower(name, adapter, tensors, dtype, **shared)
        logger.info("%s is known by its weights only: the whole model is loaded to compare them.", name)
        encoder = DualEncoder.from_pretrained(name, revision=revision, dtype=dtype, device=device, **shared)
        return cls.from_classifier(AnchorClassifier.from_pretrained(source, encoder, **hub))

    @classmethod
    def _from_image_tower(cls, name: str, adapter: dict, tensors: dict[str, Tensor], dtype, **hub):
        """The image tower of the model `name`, of which no other tensor is read, under this head."""
        from .backbone import load_image_processor

        where, hub = model_location(name), {"revision": adapter.get("revision"), **hub}
        base_config = AutoConfig.from_pretrained(where, trust_remote_code=False, **hub)
        check_family(base_config.model_type, repr(name))
        config = TransMiterImageClassificationConfig.of(base_config, adapter)
        model, info = super().from_pretrained(
            where,
            config=config,
            dtype=torch.float32 if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **{key: value for key, value in hub.items() if value is not None},
        )
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"{name!r} lacks weights of its image tower ({missing}): not a whole two-tower model.")
        model.transmiter = _head(config.adapter, tensors)
        model.image_processor = _square(load_image_processor(name, **hub), base_config)
        return aligned(model).requires_grad_(False)

    @classmethod
    def _from_classifier_files(cls, source: str, hub: dict, **kwargs):
        """What [`save_pretrained`] wrote, its header compared with its config before anything is allocated."""
        from .backbone import load_image_processor

        if kwargs.get("variant") or kwargs.get("gguf_file"):
            raise ValueError(f"a classifier's weights are in {WEIGHTS}: leave variant and gguf_file out.")
        config = kwargs.pop("config", None)
        if not isinstance(config, cls.config_class):
            content = read_json(source, "config.json", **hub)
            if content is None:
                raise FileNotFoundError(f"{source!r} holds neither a TransMiter adapter nor a classifier made of one.")
            if content.get("model_type") != cls.config_class.model_type:
                raise ValueError(
                    f"{source!r} holds a model of type {content.get('model_type')!r}, not a TransMiter adapter: pass "
                    "the adapter, with this as its base_model."
                )
            config = _or_damaged(source, lambda: cls.config_class.from_dict(content))
        with torch.device("meta"):
            described = _or_damaged(source, lambda: cls(copy.deepcopy(config)))
        _check_weights(source, described, **hub)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = {key: value for key, value in kwargs.items() if key != "use_safetensors" and value is not None}
        options = {**kwargs, **hub, "config": config, "use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(source, **options)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"{source!r} lacks the weights {missing}: fetch it again.")
        for key, tensor in model.transmiter.tensors("default").items():
            check_finite(tensor.reshape(1, -1), f"the classifier's weights {key!r}")
        if fetch(source, "preprocessor_config.json", **hub) is not None:
            options = {key: value for key, value in hub.items() if key != "subfolder"}
            model.image_processor = load_image_processor(source, subfolder=hub.get("subfolder", ""), **options)
        model = aligned(model).requires_grad_(False)
        return (model, info) if wants_info else model


def _pins(known: tuple[str | None, str | None], name: str, revision: str | None) -> bool:
    """Whether `known` (name and revision) is the model `name` and says all about its weights: a commit of the Hub, or
    a model of this package. Folders and branches change under their names."""
    if known[0] != name or revision not in (None, known[1]):
        return False
    return name.startswith(SANDBOX) or (not Path(name).is_dir() and bool(REGEX_COMMIT_HASH.match(known[1] or "")))


def _head(adapter: dict, tensors: dict[str, Tensor] | None = None) -> TransMiterLayer:
    from .tuners import TransMiterConfig, TransMiterLayer

    config = TransMiterConfig(**{key: value for key, value in adapter.items() if key != "peft_type"})
    layer = TransMiterLayer()
    layer._active_adapter = ["default"]
    layer.update_layer("default", config, torch.empty(0))
    if tensors is not None:
        layer.set_tensors("default", tensors)
    return layer


def _square(processor: BaseImageProcessor | None, base_config: PreTrainedConfig) -> BaseImageProcessor | None:
    """SigLIP 2 NaFlex pictures as [`DualEncoder.preprocess`] makes them: square, and as pixels; others as they are."""
    if processor is None or base_config.model_type != "siglip2":
        return processor
    side = base_config.vision_config.patch_size * math.isqrt(processor.max_num_patches)
    kept = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    kept = {name: getattr(processor, name) for name in kept}
    return SiglipImageProcessorPil(size={"height": side, "width": side}, do_resize=True, do_convert_rgb=True, **kept)


def _or_damaged(source: str, make: Callable):
    """What `make` makes of a stranger's config; any error is one of the config."""
    try:
        return make()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"config.json of {source!r} describes no model: {error}") from error


def _check_weights(source: str, model: PreTrainedModel, **hub) -> None:
    """
    Raises:
        FileNotFoundError: there are none.
        ValueError: they are not those of `model` (on the meta device).
    """
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
