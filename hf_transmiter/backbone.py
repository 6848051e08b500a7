"""Two-tower image-text models: the one place that knows transformers' model families.

Every supported model answers with logits of one form. With unit rows ``x`` (B, d) for images and ``a`` (K, d) for
texts,

    z = s * x @ a.T + b        (B, K)

where ``s`` is a positive scale (CLIP: ``exp(logit_scale)``; ALIGN: ``1 / temperature``) and ``b`` a bias that only
the SigLIP families have (0 elsewhere). [`DualEncoder`] returns ``x`` and ``a``, whatever the family.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020);
Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, PreTrainedModel


logger = logging.getLogger(__name__)

FAMILIES = {
    "clip": "CLIP",
    "siglip": "SigLIP (also the fixed-resolution SigLIP 2 checkpoints)",
    "siglip2": "SigLIP 2 NaFlex",
    "metaclip_2": "MetaCLIP 2",
    "altclip": "AltCLIP",
    "chinese_clip": "Chinese-CLIP",
    "align": "ALIGN",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
}
"""`config.model_type` of each supported family, with the name people know it by."""

# SigLIP reads the last position of a text padded to its full length, and was trained without an attention mask.
_SIGLIP = ("siglip", "siglip2")
# The parts of a model that make embeddings and logits. Anything else hanging on the root is someone's head.
_TOWERS = ("vision_model", "text_model", "visual_projection", "text_projection")
_SCALARS = ("logit_scale", "logit_bias", "temperature")
# Config entries that say where or with what a model was saved, not what it computes.
_PROVENANCE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, adapters still active in its layers; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_dual_encoder(model: nn.Module) -> bool:
    """Whether `model` (a transformers model, or a `PeftModel` around one) is a two-tower model of a known family."""
    model = unwrap(model)
    known = getattr(getattr(model, "config", None), "model_type", None) in FAMILIES
    return known and hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _check_family(model_type: str | None, what: str) -> None:
    if model_type not in FAMILIES:
        supported = ", ".join(f"{name} ({model_type})" for model_type, name in FAMILIES.items())
        raise ValueError(
            f"{what} is of type {model_type!r}, which is not a supported two-tower model. Supported: {supported}."
        )


def logit_scale_and_bias(model: nn.Module) -> tuple[Tensor, Tensor | float]:
    """Scale ``s`` and bias ``b`` of ``z = s * x @ a.T + b`` for a raw transformers model.

    Args:
        model (`nn.Module`): a two-tower model of a supported family.

    Returns:
        `tuple`: ``s`` as a 0-dimensional tensor (multiplicative, attached to the model's parameter) and ``b`` as a
        0-dimensional tensor for the SigLIP families, else the float 0.0.
    """
    model = unwrap(model)
    if hasattr(model, "temperature"):
        return 1 / model.temperature, 0.0
    bias = model.logit_bias.reshape(()) if hasattr(model, "logit_bias") else 0.0
    return model.logit_scale.exp().reshape(()), bias


def dummy_text_inputs(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The smallest text that `model`'s root forward accepts, for calls that only want the image side.

    ``model(**image_inputs(model, pixel_values), **dummy_text_inputs(model))`` runs for every family; its
    ``image_embeds`` are unit rows equal to [`DualEncoder.embed_pixels`], its logits are meaningless.

    Returns:
        `dict`: ``input_ids`` and ``attention_mask``, both (1, 2) int64 on `device` (the model's when `None`).
    """
    model = unwrap(model)
    # The padding id would be masked (RoBERTa) or make BERT warn; any other token does.
    token = 1 if model.config.text_config.pad_token_id == 0 else 0
    ids = torch.full((1, 2), token, dtype=torch.long, device=model.device if device is None else device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(model: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    """The image arguments of `model`'s forward for a batch of square pictures.

    Every family but one takes ``pixel_values`` as it is. SigLIP 2 NaFlex takes flattened patches
    (B, patches, patch_size ** 2 * 3) with their mask and grid.

    Args:
        model (`nn.Module`): a two-tower model of a supported family.
        pixel_values (`Tensor`): (B, 3, H, W), normalised as by [`DualEncoder.preprocess`].
    """
    model = unwrap(model)
    if model.config.model_type != "siglip2":
        return {"pixel_values": pixel_values}
    patch = model.config.vision_config.patch_size
    count, channels, height, width = pixel_values.shape
    if height % patch or width % patch:
        raise ValueError(f"SigLIP 2 pixels of {height} x {width} are not a whole number of {patch}-pixel patches.")
    grid = (height // patch, width // patch)
    patches = pixel_values.reshape(count, channels, grid[0], patch, grid[1], patch)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(count, grid[0] * grid[1], -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device),
        "spatial_shapes": torch.tensor([grid] * count, dtype=torch.long, device=patches.device),
    }


@contextmanager
def _frozen_pass(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module gets its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: its tensors could not be saved for a later backward.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class DualEncoder:
    """A two-tower model with its tokenizer and image processor: images and texts to unit rows in one space.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A model of a supported family (`FAMILIES`). Adapters inside it (LoRA, prompts) stay active. The model is
            shared, not copied: its mode and `requires_grad` flags are left as they are.
        processor (`ProcessorMixin`, *optional*):
            Holds `tokenizer` and `image_processor`. Loaded from `name_or_path` when omitted.
        name_or_path (`str`, *optional*): defaults to the model's `config._name_or_path`.
        revision (`str`, *optional*): defaults to the commit the model was loaded from.

    Raises:
        ValueError: the model's type is not supported.

    Attributes:
        model (`PreTrainedModel`): the model without the PEFT wrapper, adapters active.
        processor (`ProcessorMixin` or `None`): `None` only when there was no name to load it from.
    """

    def __init__(self, model: nn.Module, processor=None, name_or_path: str | None = None, revision: str | None = None):
        self.model = unwrap(model)
        config = getattr(self.model, "config", None)
        _check_family(getattr(config, "model_type", None), f"The model ({type(self.model).__name__})")
        if not is_dual_encoder(self.model):
            raise ValueError(f"{type(self.model).__name__} has only one tower; load the whole model with AutoModel.")
        self.name_or_path = name_or_path or config._name_or_path or None
        self.revision = getattr(config, "_commit_hash", None) or revision
        if processor is None and self.name_or_path:
            processor = _load_processor(self.name_or_path, revision=self.revision)
        self.processor = processor
        # Keys are compared by identity and die with their tensors, so a new adapter never inherits an old digest.
        self._digests = WeakIdKeyDictionary()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "DualEncoder":
        """Load a frozen model in eval mode, with its processor, from a local folder or else from the Hub.

        Args:
            name_or_path (`str` or `os.PathLike`): folder or Hub id. Weights must be safetensors.
            revision (`str`, *optional*): branch, tag or commit.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
                What a fine-tuning adds to logits is a small difference of large numbers, so the default is float32
                even for checkpoints stored in half precision; `"auto"` keeps the stored type.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where to put the model.
            token (`str` or `bool`, *optional*): Hub token.
            cache_dir (`str` or `os.PathLike`, *optional*): download cache.
            local_files_only (`bool`, *optional*, defaults to `False`): never ask the Hub.

        Raises:
            ValueError: the model's type is not supported.
            OSError: the folder or repository, or safetensors weights in it, cannot be found.
        """
        name = os.fspath(name_or_path)
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **hub)
        _check_family(config.model_type, f"{name!r}")
        model = AutoModel.from_pretrained(
            name,
            revision=revision,
            dtype=torch.float32 if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **hub,
        )
        model = model.eval().requires_grad_(False)
        # The processor comes from the very commit of the weights, also when a branch moved in between.
        commit = getattr(model.config, "_commit_hash", None) or revision
        encoder = cls(model, _load_processor(name, revision=commit, **hub), name, commit)
        return encoder.to(device) if device is not None else encoder

    def to(self, device: torch.device | str) -> "DualEncoder":
        """Move the model; returns self."""
        self.model.to(device)
        return self

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def embed_dim(self) -> int:
        """Width ``d`` of the shared space."""
        config = self.model.config
        return config.vision_config.hidden_size if self.family in _SIGLIP else config.projection_dim

    @property
    def logit_scale(self) -> Tensor:
        """The factor ``s`` of the logits (0-dimensional float32, detached)."""
        return logit_scale_and_bias(self.model)[0].detach().float()

    @property
    def logit_bias(self) -> float:
        """The bias ``b`` of the logits; 0.0 outside the SigLIP families."""
        return float(logit_scale_and_bias(self.model)[1])

    @property
    def context_length(self) -> int:
        """Most tokens a text may have, special tokens included."""
        text = self.model.config.text_config
        room = text.max_position_embeddings
        if self.family == "altclip" or "roberta" in text.model_type:
            room -= text.pad_token_id + 1  # RoBERTa counts positions from the padding id on
        limits = [room]
        if self.processor is not None:
            trained = getattr(self.processor, "text_kwargs", {}).get("max_length")
            limits += [self.processor.tokenizer.model_max_length, *([trained] if trained else [])]
        return min(limits)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square pictures that [`preprocess`] makes."""
        vision = self.model.config.vision_config
        if self.family == "siglip2":
            return vision.patch_size * math.isqrt(self._max_patches)
        processor = getattr(self.processor, "image_processor", None)
        size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        size = size or getattr(processor, "size", None) or {}
        side = dict(size).get("height") or dict(size).get("shortest_edge") or vision.image_size
        return int(side if isinstance(side, int) else side[0])

    @property
    def _max_patches(self) -> int:
        processor = getattr(self.processor, "image_processor", None)
        return getattr(processor, "max_num_patches", self.model.config.vision_config.num_patches)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def fingerprint(self) -> str:
        """Hex digest of what the embeddings depend on: weights, config, processor settings, adapters and which of
        them are active. Equal across processes and machines; computed again only after a weight was written.

        Modules added to the root beside the two towers (a head on the logits) do not count.
        """
        settings = [_without_provenance(self.model.config.to_dict()), _processor_facts(self)]
        settings = json.dumps([*settings, *_adapter_state(self.model)], sort_keys=True)
        digest = hashlib.sha256(settings.encode())
        for name, tensor in _embedding_tensors(self.model):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {self._tensor_digest(tensor)}".encode())
        return digest.hexdigest()

    def preprocess(self, images) -> Tensor:
        """Pictures to normalised pixels.

        Args:
            images (`Sequence` of `PIL.Image.Image`, path or `np.ndarray`, or one of these):
                Any colour mode (converted to RGB); arrays are uint8, (H, W), (H, W, 3) or (H, W, 4). Pictures given
                by path are turned upright by their EXIF orientation, as `datasets` does.

        Returns:
            `Tensor`: (B, 3, S, S) float32 on the CPU, ``S = image_size``. SigLIP 2 NaFlex pictures are squeezed to a
            square grid of patches, as the fixed-resolution SigLIP checkpoints do.

        Raises:
            ValueError: a picture cannot be read; the message names it.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
            images = [images]
        pictures = [_read_rgb(image, index) for index, image in enumerate(images)]
        if not pictures:
            raise ValueError("no images were given.")
        image_processor = self._require("image_processor")
        if self.family != "siglip2":
            return image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        side, patch = self.image_size, self.model.config.vision_config.patch_size
        pictures = [picture.resize((side, side), image_processor.resample) for picture in pictures]
        patches = image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        grid = side // patch
        pixels = patches.reshape(len(pictures), grid, grid, patch, patch, 3)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(pictures), 3, side, side)

    def embed_pixels(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) pixels of [`preprocess`] to (B, d) unit rows ``x``, float32, on the model's device."""
        inputs = image_inputs(self.model, pixel_values.to(self.device, self.dtype))
        with _frozen_pass(self.model):
            return _unit(self.model.get_image_features(**inputs))

    def embed_images(self, images: Sequence, batch_size: int = 32) -> Tensor:
        """Pictures (as in [`preprocess`]) to (N, d) unit rows, float32."""
        blocks = [
            self.embed_pixels(self.preprocess(images[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        return torch.cat(blocks) if blocks else torch.empty(0, self.embed_dim, device=self.device)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts to (N, d) unit rows ``a``, float32, on the model's device.

        A text longer than `context_length` tokens is cut, its end-of-text token kept; one warning per call names the
        first such text.
        """
        embeds, cut = self._embed_texts(texts, batch_size)
        self._warn_cut(cut)
        return embeds

    def embed_names(
        self, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",), batch_size: int = 256
    ) -> Tensor:
        """Class names to (K, d) unit rows: per name the mean over templates of unit text rows, made unit again.

        Args:
            names (`Sequence[str]`): K names; underscores become spaces.
            templates (`Sequence[str]`, *optional*, defaults to `("a photo of a {}.",)`): each with one ``{}``.
            batch_size (`int`, *optional*, defaults to 256): texts per forward pass.

        Raises:
            ValueError: there are no templates, or one of them lacks ``{}``.
        """
        bad = [template for template in templates if "{}" not in template]
        if bad or not templates:
            raise ValueError(f"each template needs a {{}} where the name goes; got {bad or 'no template'}.")
        total, cut = torch.zeros(len(names), self.embed_dim, device=self.device), []
        for template in templates:
            texts = [template.replace("{}", name.replace("_", " ")) for name in names]
            embeds, too_long = self._embed_texts(texts, batch_size)
            total, cut = total + embeds, cut + too_long
        self._warn_cut(cut)
        return normalize(total, dim=-1)

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """``z = s * x @ a.T + b`` for rows ``x`` (B, d) and ``a`` (K, d): (B, K), scale included."""
        return self.logit_scale * image_embeds @ text_embeds.T + self.logit_bias

    def __repr__(self) -> str:
        return f"DualEncoder({self.name_or_path or type(self.model).__name__}, {self.family}, d={self.embed_dim})"

    def _tensor_digest(self, tensor: Tensor) -> str:
        """Digest of the values, read again only when the tensor is another one or was written in place."""
        version = (tensor.data_ptr(), tensor._version)
        known = self._digests.get(tensor)
        if known is None or known[0] != version:
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            known = (version, hashlib.sha256(values.data).hexdigest())
            self._digests[tensor] = known
        return known[1]

    def _require(self, part: str):
        if getattr(self.processor, part, None) is None:
            raise ValueError(f"this DualEncoder has no {part}: pass processor= or the name_or_path to load it from.")
        return getattr(self.processor, part)

    def _embed_texts(self, texts: Sequence[str], batch_size: int) -> tuple[Tensor, list[str]]:
        if isinstance(texts, str):
            raise ValueError("texts must be a list of strings, not one string.")
        blocks, cut = [torch.empty(0, self.embed_dim, device=self.device)], []
        for start in range(0, len(texts), batch_size):
            inputs, too_long = self._tokenize(list(texts[start : start + batch_size]))
            cut += too_long
            with _frozen_pass(self.model):
                blocks.append(_unit(self.model.get_text_features(**inputs)))
        return torch.cat(blocks), cut

    def _tokenize(self, texts: list[str]) -> tuple[dict[str, Tensor], list[str]]:
        tokenizer, limit = self._require("tokenizer"), self.context_length
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        cut = [text for text, length in zip(texts, lengths, strict=True) if length > limit]
        padding = "max_length" if self.family in _SIGLIP else "longest"
        inputs = tokenizer(texts, padding=padding, truncation=True, max_length=limit, return_tensors="pt")
        if self.family in _SIGLIP:
            inputs = {"input_ids": inputs["input_ids"]}
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}, cut

    def _warn_cut(self, cut: list[str]) -> None:
        if cut:
            logger.warning(
                "%d text(s) are longer than the %d tokens %s reads and were cut; the first is %r.",
                len(cut), self.context_length, self.name_or_path or "the model", cut[0],
            )  # fmt: skip


def _load_processor(name: str, *, revision: str | None = None, **hub):
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False, **hub)
    if getattr(processor, "tokenizer", None) is None or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{name!r} does not hold both a tokenizer and an image processor (found {type(processor).__name__})."
        )
    # Pillow on every machine: torchvision, where installed, resizes slightly differently.
    processor.image_processor = AutoImageProcessor.from_pretrained(
        name, revision=revision, backend="pil", trust_remote_code=False, **hub
    )
    return processor


def _unit(features) -> Tensor:
    # transformers 5 returns an output whose pooler_output is the projected feature.
    pooled = features if torch.is_tensor(features) else features.pooler_output
    return normalize(pooled.float(), dim=-1)


def _read_rgb(image, index: int) -> Image.Image:
    name = f"image {index}"
    try:
        if isinstance(image, (str, os.PathLike)):
            name = repr(os.fspath(image))
            with Image.open(image) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                raise ValueError(f"arrays must be uint8 with values 0 to 255, not {image.dtype}")
            return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
        if getattr(image, "filename", ""):
            name = repr(image.filename)
        return image.convert("RGB")
    except (OSError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise ValueError(f"cannot read {name}: {error}") from error


def _embedding_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of both towers and the scalars, in a fixed order."""
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if name.split(".", 1)[0] in (*_TOWERS, *_SCALARS) and torch.is_tensor(tensor):
            yield name, tensor


def _adapter_state(model: nn.Module) -> Iterator[tuple]:
    """Which adapters are switched on where, with their scale: the same weights answer differently."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and name.split(".", 1)[0] in _TOWERS:
            scaling = {key: float(value) for key, value in getattr(module, "scaling", {}).items()}
            active = [] if module.disable_adapters else list(module.active_adapters)
            yield name, active, list(module.merged_adapters), sorted(scaling.items())


def _without_provenance(value):
    if isinstance(value, dict):
        return {str(k): _without_provenance(v) for k, v in sorted(value.items()) if k not in _PROVENANCE}
    if isinstance(value, (list, tuple)):
        return [_without_provenance(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _processor_facts(encoder: DualEncoder) -> dict | None:
    if encoder.processor is None:
        return None
    tokenizer, image_processor = encoder.processor.tokenizer, encoder.processor.image_processor
    return {
        "image": {"class": type(image_processor).__name__, **_without_provenance(image_processor.to_dict())},
        "text": {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "special": _without_provenance(tokenizer.special_tokens_map),
            "padding_side": tokenizer.padding_side,
            "context_length": encoder.context_length,
        },
    }
