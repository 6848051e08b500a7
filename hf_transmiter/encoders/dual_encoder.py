"""[`DualEncoder`]: pictures and texts to unit rows in one space, for every two-tower family of transformers.

With unit rows ``x`` (B, d) for images and ``a`` (K, d) for texts, the model's logits are ``z = s * x @ a.T + b``
(B, K). What differs between families is in `families.py`.
"""

import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    SiglipImageProcessorPil,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, has_file

from ..algebra import check_finite, check_unit
from ..hub.checks import as_list
from ..hub.repo import SANDBOX, cached_commit, check_hub_id, hub_errors, is_open_clip, model_location, split_revision
from ..settings import check_kind, check_number
from .families import (
    aligned,
    check_family,
    feature_rows,
    image_inputs,
    is_dual_encoder,
    logit_scale_and_bias,
    shared_width,
    text_positions,
    tokenize,
    unit_rows,
    unwrap,
)
from .identity import model_fingerprint, text_version, vocabulary_hash
from .open_clip import OpenClipModel
from .open_clip import load_processor as load_open_clip_processor
from .pictures import as_pictures, to_pixels


logger = logging.getLogger(__name__)

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_PICKLES = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


# Passes under way by model, and the modules that train again after the last one; several threads may share a model.
_PASSES: WeakKeyDictionary[nn.Module, list] = WeakKeyDictionary()
_LOCK = threading.RLock()


@contextmanager
def _frozen_pass(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module gets its own mode back afterwards."""
    with _LOCK:
        passes = _PASSES.setdefault(model, [0, []])
        if not passes[0]:
            passes[1] = [module for module in model.modules() if module.training]
            model.eval()
        passes[0] += 1
    try:
        # Not inference_mode: its tensors could not be saved for a later backward.
        with torch.no_grad():
            yield
    finally:
        with _LOCK:
            passes[0] -= 1
            for module in passes[1] if not passes[0] else ():
                module.training = True


class DualEncoder:
    """A two-tower model with its tokenizer and image processor: images and texts to unit rows in one space.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A model of a supported family (`FAMILIES`). Adapters inside it (LoRA, prompts) stay active. The model is
            shared, not copied: its mode and `requires_grad` flags are left as they are.
        processor (`ProcessorMixin`, *optional*):
            Holds `tokenizer` and `image_processor`. Loaded from `name_or_path`, if there is one, when omitted.
        name_or_path (`str`, *optional*): defaults to the model's `config._name_or_path`.
        revision (`str`, *optional*): defaults to the commit the model was loaded from.

    Raises:
        ValueError: the model's type is not supported.

    Attributes:
        model (`PreTrainedModel`): the model without the PEFT wrapper, adapters active.
    """

    made_from = {nn.Module: "wrap it, DualEncoder(model)"}

    def __init__(self, model: nn.Module, processor=None, name_or_path: str | None = None, revision: str | None = None):
        if isinstance(model, (str, os.PathLike)):
            check_kind("model", model, DualEncoder)
        check_kind("model", model, nn.Module)
        self.model = unwrap(model)
        config = getattr(self.model, "config", None)
        check_family(getattr(config, "model_type", None), f"The model ({type(self.model).__name__})")
        if not is_dual_encoder(self.model):
            raise ValueError(f"{type(self.model).__name__} has only one tower; load the whole model with AutoModel.")
        self.name_or_path = name_or_path or config._name_or_path or None
        self.revision = getattr(config, "_commit_hash", None) or revision
        if processor is None and self.name_or_path:
            processor = load_processor(self.name_or_path, revision=self.revision)
        self.processor = processor
        self._named: list[tuple[tuple, Tensor]] = []  # what was embedded last, see embed_names

    def __repr__(self) -> str:
        adapters = "".join(f", {kind.peft_type} adapter" for kind in getattr(self.model, "peft_config", {}).values())
        kind = f"{type(self.model).__name__} of width {self.embed_dim}"
        return f"{type(self).__name__}({self.name_or_path!r}, {kind}{adapters}, on {self.device})"

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
        """A frozen model in eval mode with its processor, from a local folder or else from the Hub.

        Args:
            name_or_path (`str` or `os.PathLike`):
                Folder, Hub id, ``sandbox:weak``, or a model of the open_clip library, such as
                ``open_clip:RN50/openai`` (see [`OpenClipModel`]). Weights must be safetensors.
            revision (`str`, *optional*):
                Branch, tag or commit. When omitted: the main branch or, where that has only pickles, the safetensors
                that the Hub's own converter proposes in a pull request, which transformers looks for.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
                What a fine-tuning adds to logits is a small difference of large numbers, so the default is float32
                even for checkpoints stored in half precision; `"auto"` keeps the stored type.
            device, token, cache_dir, local_files_only (*optional*): as everywhere in transformers.

        Raises:
            ValueError: the model's type is not supported.
            FileNotFoundError: neither a folder nor a possible Hub id.
            OSError: the folder or repository, or safetensors weights in it, cannot be found.
        """
        name = os.fspath(name_or_path)
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        if not (name.startswith(SANDBOX) or is_open_clip(name) or Path(name).is_dir()):
            check_hub_id(name, "model")
        if is_open_clip(name):
            model = OpenClipModel.from_pretrained(name, revision=revision, dtype=dtype, **hub)
            commit = model.config._commit_hash
        else:
            model, commit = _load_model(name, revision, torch.float32 if dtype is None else dtype, **hub)
        model = aligned(model).eval().requires_grad_(False).to(device or "cpu")
        return cls(model, load_processor(name, revision=commit, **hub), name, commit)

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def embed_dim(self) -> int:
        """Width ``d`` of the shared space."""
        return shared_width(self.model)

    @cached_property
    def tower_dim(self) -> int:
        """Width ``2D`` of what [`embed_pixels`] gives of the vision tower beside ``x``; 0 for models that give no
        tokens."""
        blank = torch.ones(1, 3, self.image_size, self.image_size)
        return self.embed_pixels(blank, tower=True).shape[1] - self.embed_dim

    @property
    def logit_scale(self) -> Tensor:
        """The factor ``s`` of the logits (0-dimensional float32, detached)."""
        scale = logit_scale_and_bias(self.model)[0].detach().float()
        return check_finite(scale.reshape(1), f"{self}: values of the logit scale").reshape(())

    @property
    def logit_bias(self) -> float:
        """The bias ``b`` of the logits; 0.0 outside the SigLIP families."""
        bias = torch.as_tensor(logit_scale_and_bias(self.model)[1], dtype=torch.float32)
        return float(check_finite(bias.detach().reshape(1), f"{self}: values of the logit bias"))

    @property
    def context_length(self) -> int:
        """Most tokens a text may have, special tokens included."""
        limits = [text_positions(self.model)]
        if self.processor is not None:
            trained = getattr(self.processor, "text_kwargs", {}).get("max_length")
            limits += [self.processor.tokenizer.model_max_length, *([trained] if trained else [])]
        return min(limits)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square pictures that [`preprocess`] makes."""
        vision, processor = self.model.config.vision_config, getattr(self.processor, "image_processor", None)
        if self.family == "siglip2":
            return vision.patch_size * math.isqrt(getattr(processor, "max_num_patches", vision.num_patches))
        size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        size = size or getattr(processor, "size", None) or {}
        side = dict(size).get("height") or dict(size).get("shortest_edge") or vision.image_size
        return int(side if isinstance(side, int) else side[0])

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def fingerprint(self) -> str:
        """64 hex digits for what the embeddings depend on: weights, config, processor settings, adapters and which of
        them are active; not modules added to the root beside the two towers (a head on the logits)."""
        # Only what differs from transformers' defaults: a later version that adds an entry changes nothing.
        return model_fingerprint(self.model, [self.model.config.to_diff_dict(), self._processor_facts])

    @property
    def text_version(self) -> tuple:
        """Changes with every change of what texts are embedded with: weights, where they lie, adapters. Of this
        process only."""
        return text_version(self.model)

    @property
    def cache_key(self) -> str:
        """What computed embeddings depend on: the fingerprint, and the type they are computed in."""
        return f"{self.fingerprint} {self.dtype}"

    @property
    def pixel_processor(self) -> BaseImageProcessor:
        """What makes the pixels of [`preprocess`], see [`square_processor`]."""
        return square_processor(self._require("image_processor"), self.model.config)

    def preprocess(self, images) -> Tensor:
        """Pictures to pixels: (B, 3, S, S) normalised float32 on the CPU, S = `image_size`; see [`square_processor`].

        Args:
            images (`Iterable` of whatever [`read_picture`] reads, or one of these):
                Read and scaled a few at a time, photographs one by one.

        Raises:
            ValueError: a picture cannot be read; the message names it.
        """
        return to_pixels(self.pixel_processor, as_pictures(images))

    def embed_pixels(self, pixel_values: Tensor, tower: bool = False, first: int = 0) -> Tensor:
        """(B, 3, S, S) pixels of [`preprocess`] to (B, d) unit rows ``x``, float32, on the model's device; with
        `tower` to rows ``[x | h]`` (B, d + 2D) of what the vision tower saw, see [`feature_rows`].

        Raises:
            ValueError: numbers that are not finite come out; the message names the row, counted from `first`.
        """
        inputs = image_inputs(self.model, pixel_values.to(self.device, self.dtype, non_blocking=True))
        with _frozen_pass(self.model):
            rows = feature_rows(self.model.get_image_features(**inputs), tower)
        check_unit(rows[:, : self.embed_dim], "image", self, first)
        return check_finite(rows, f"{self}: tower features")

    def embed_images(self, images: Sequence, batch_size: int = 32) -> Tensor:
        """Pictures (as in [`preprocess`]) to (N, d) unit rows, float32."""
        images = as_pictures(images)
        images = images if hasattr(images, "__len__") else list(images)
        batch_size = check_number("batch_size", batch_size, least=1)
        blocks = [torch.empty(0, self.embed_dim, dtype=torch.float32, device=self.device)]
        for start in range(0, len(images), batch_size):
            blocks.append(self.embed_pixels(self.preprocess(images[start : start + batch_size])))
        return torch.cat(blocks)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts to (N, d) unit rows ``a``, float32, on the model's device.

        A text longer than `context_length` tokens is cut, its end-of-text token kept; one warning per call names the
        first such text.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of strings, not one string.")
        (embeds,) = self._embed_lists([texts], batch_size)
        return embeds

    def embed_names(
        self, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",), batch_size: int = 256
    ) -> Tensor:
        """K class names, underscores as spaces, to (K, d) unit rows: per name the mean over templates (each with one
        ``{}``) of unit text rows, made unit again. The last few answers are kept, as long as the text tower stays.

        Raises:
            ValueError: there are no templates, or one of them lacks ``{}``.
        """
        names, templates = as_list(names, "names"), as_list(templates, "templates")
        bad = [template for template in templates if "{}" not in template]
        if bad or not templates:
            raise ValueError(f"each template needs a {{}} where the name goes; got {bad or 'no template'}.")
        how = (batch_size, self.context_length, getattr(self.model.config, "_attn_implementation", None))
        asked = (names, templates, how, self.text_version)
        rows = next((rows for known, rows in self._named if known == asked), None)
        if rows is None:
            said = [name.replace("_", " ") for name in names]
            lists = ([template.replace("{}", name) for name in said] for template in templates)
            rows = normalize(sum(self._embed_lists(lists, batch_size)), dim=-1)
            self._named = [*self._named[-3:], (asked, rows)]  # in one step: threads may ask, too
        return rows.clone()

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts to the arguments of the text tower on the model's device: `input_ids` (B, L) and, outside the SigLIP
        families, `attention_mask`. Texts longer than `context_length` tokens are cut."""
        return self._tokenize(list(texts))[0]

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """``z = s * x @ a.T + b`` for rows ``x`` (B, d) and ``a`` (K, d): (B, K), scale included."""
        return self.logit_scale.to(image_embeds.device) * image_embeds @ text_embeds.T + self.logit_bias

    @cached_property
    def _processor_facts(self) -> dict | None:
        if self.processor is None:
            return None
        tokenizer, image_processor = self.processor.tokenizer, self.processor.image_processor
        return {
            "image": {"backend": getattr(image_processor, "backend", None), **image_processor.to_dict()},
            "vocabulary": vocabulary_hash(tokenizer),
            "special_tokens": dict(tokenizer.special_tokens_map),
            "text": [tokenizer.padding_side, self.context_length],
        }

    def _require(self, part: str):
        if getattr(self.processor, part, None) is None:
            raise ValueError(f"this DualEncoder has no {part}: pass processor= or the name_or_path to load it from.")
        return getattr(self.processor, part)

    def _embed_lists(self, lists: Iterable[Sequence[str]], batch_size: int) -> Iterator[Tensor]:
        """Unit rows of the texts of each list; at the end one warning about all that were cut."""
        cut, batch_size = [], check_number("batch_size", batch_size, least=1)
        for texts in lists:
            blocks = [torch.empty(0, self.embed_dim, dtype=torch.float32, device=self.device)]
            for start in range(0, len(texts), batch_size):
                inputs, too_long = self._tokenize(list(texts[start : start + batch_size]))
                cut += too_long
                with _frozen_pass(self.model):
                    rows = unit_rows(self.model.get_text_features(**inputs))
                blocks.append(check_unit(rows, "text", self, start))
            yield torch.cat(blocks)
        if cut:
            logger.warning(
                "%d text(s) are longer than the %d tokens %s reads and were cut; the first is %r.",
                len(cut), self.context_length, self.name_or_path or "the model", cut[0],
            )  # fmt: skip

    def _tokenize(self, texts: list[str]) -> tuple[dict[str, Tensor], list[str]]:
        tokenizer, limit = self._require("tokenizer"), self.context_length
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        cut = [text for text, length in zip(texts, lengths, strict=True) if length > limit]
        inputs = tokenize(tokenizer, texts, self.family, limit)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}, cut


def load_encoder(
    source: str,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> DualEncoder:
    """A frozen dual encoder: a Hub id (``id@revision`` too), a folder, ``sandbox:weak|strong|weak-upgraded``, or a
    model of open_clip (``open_clip:RN50/openai``).

    Raises:
        FileNotFoundError: neither a folder nor a possible Hub id.
        OSError: the Hub has no such model, or cannot be reached.
        ValueError: a family that is not supported, or an unknown sandbox model.
    """
    name, suffix = split_revision(os.fspath(source))
    revision = revision or suffix
    try:
        return DualEncoder.from_pretrained(name, revision=revision, device=device, dtype=dtype)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"cannot load the model {source!r}: {error}") from error


def load_base(adapter: str, base: str | None, revision: str | None = None, **options) -> DualEncoder:
    """The model that an adapter says it belongs to.

    Raises:
        ValueError: it does not say which.
        OSError: that cannot be loaded; the message says what to pass.
    """
    if not base:
        raise ValueError(f"{adapter!r} does not say which model it belongs to: name it with `base_model`.")
    name, suffix = split_revision(base)
    try:
        return DualEncoder.from_pretrained(name, revision=revision or suffix, **options)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(
            f"cannot load {base!r}, the model of the adapter {adapter!r}: {error}\nIf it was moved, load it from "
            "where it is and pass it as encoder (evaluate: --base-model)."
        ) from error


def _load_model(name: str, revision: str | None, dtype: torch.dtype | str, **hub) -> tuple[nn.Module, str | None]:
    """A model of transformers, and the commit it is from."""
    where = model_location(name)
    if Path(where, "adapter_config.json").is_file() and not Path(where, "config.json").is_file():
        raise ValueError(
            f"{name!r} holds a PEFT adapter, not a model: load its base model and wrap both, "
            "DualEncoder(PeftModel.from_pretrained(base, folder)); a TransMiter adapter is loaded by "
            "AnchorClassifier.from_pretrained."
        )
    options = {"revision": revision, **hub}
    config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    check_family(config.model_type, f"{name!r}")
    try:
        model = AutoModel.from_pretrained(where, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options)
    except OSError as error:
        with hub_errors(where):
            safe, pickled = (any(has_file(where, file, **options) for file in files) for files in (_WEIGHTS, _PICKLES))
        if safe or not pickled:
            raise
        raise OSError(
            f"{name!r} has no {SAFE_WEIGHTS_NAME}, and pickles such as {WEIGHTS_NAME} are not read because they "
            "run the code in them: take a revision that has one, such as that of a pull request which you trust "
            "(revision='refs/pr/N'), or ask the owner for it."
        ) from error
    model.name_or_path = model.config._name_or_path = name  # what PEFT notes with an adapter
    # The processor comes from the very commit of the weights, also when a branch moved in between. Weights that
    # transformers took from the pull request of the Hub's converter are in no commit of the branch.
    return model, cached_commit(where, _WEIGHTS, revision, hub["cache_dir"]) or revision


def load_processor(name: str, *, revision: str | None = None, **hub):
    if is_open_clip(name):
        return load_open_clip_processor(name, revision=revision, **hub)
    name = model_location(name)
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False, **hub)
    if getattr(processor, "tokenizer", None) is None or not hasattr(processor, "image_processor"):
        found = type(processor).__name__
        raise ValueError(f"{name!r} does not hold both a tokenizer and an image processor (found {found}).")
    processor.image_processor = load_image_processor(name, revision=revision, **hub)
    return processor


def load_image_processor(name: str, *, revision: str | None = None, **hub) -> BaseImageProcessor:
    """How a model's pictures become pixels; keywords as [`DualEncoder.from_pretrained`]."""
    if is_open_clip(name):
        return load_open_clip_processor(name, revision=revision, **hub).image_processor
    # Pillow on every machine: torchvision, where installed, resizes slightly differently.
    return AutoImageProcessor.from_pretrained(
        model_location(name), revision=revision, backend="pil", trust_remote_code=False, **hub
    )


def square_processor(processor: BaseImageProcessor, config: PreTrainedConfig) -> BaseImageProcessor:
    """Of SigLIP 2 NaFlex one that squeezes pictures to a square grid of patches and leaves them pixels, as the
    fixed-resolution SigLIP checkpoints do; that of any other model as it is."""
    if config.model_type != "siglip2":
        return processor
    side = config.vision_config.patch_size * math.isqrt(processor.max_num_patches)
    kept = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    kept = {name: getattr(processor, name) for name in kept}
    return SiglipImageProcessorPil(size={"height": side, "width": side}, do_resize=True, do_convert_rgb=True, **kept)
