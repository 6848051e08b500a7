"""[`OpenClipModel`]: a model of the open_clip library as one more two-tower model of transformers.

open_clip carries checkpoints that transformers does not: CLIP with a ResNet (RN50), EVA-CLIP, MobileCLIP, ConvNeXt.
Their names begin with ``open_clip:``.

| name | model |
|---|---|
| ``open_clip:RN50/openai`` | architecture and tag of open_clip's own table |
| ``open_clip:hf-hub:user/repo`` | a repository of the Hub with ``open_clip_config.json`` |
| ``open_clip:FOLDER`` | a folder with ``open_clip_config.json``, as `save_pretrained` and open_clip write it |
| ``open_clip:RN50/path/to/weights.safetensors`` | architecture and weights |

Weights must be safetensors. A tag decides whether the model has QuickGELU, which open_clip leaves to the caller
(``RN50`` or ``RN50-quickgelu``). The package is an extra: ``pip install "hf-transmiter[open-clip]"``.

Source: Ilharco et al., OpenCLIP (https://github.com/mlfoundations/open_clip, 10.5281/zenodo.5143773); Sun et al.,
"EVA-CLIP: Improved Training Techniques for CLIP at Scale" (arXiv 2303.15389).
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from ..hub.checks import nearest, read_header
from ..hub.files import replace_file
from ..hub.repo import OPEN_CLIP, fetch, is_open_clip, read_json


CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
VOCABULARY = 49408  # of CLIP's byte-pair encoding, start and end of a text last
START, END = VOCABULARY - 2, VOCABULARY - 1
RESAMPLING = {"bicubic": 3, "bilinear": 2}
_HUB = "hf-hub:"
# Of a text tower that reads other tokens, the last or the first of them, or all at once.
_OTHER_TEXTS = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "embed_cls", "no_causal_mask")


class OpenClipConfig(PreTrainedConfig):
    """Configuration of an [`OpenClipModel`].

    Args:
        model_cfg (`dict`): what open_clip builds the towers from (`embed_dim`, `vision_cfg`, `text_cfg`, ...).
        preprocess_cfg (`dict`): how pictures become pixels (`mean`, `std`, `interpolation`, `resize_mode`).
    """

    model_type = "open_clip"

    model_cfg: dict | None = None
    preprocess_cfg: dict | None = None

    @property
    def projection_dim(self) -> int:
        return self.model_cfg["embed_dim"]

    @property
    def image_size(self) -> int:
        return self.model_cfg["vision_cfg"]["image_size"]

    @property
    def text_config(self) -> PreTrainedConfig:
        """Sizes and special tokens of the text tower, under the names that transformers has for them."""
        text = self.model_cfg["text_cfg"]
        sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": text["context_length"]}
        tokens = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
        return PreTrainedConfig(hidden_size=text["width"], num_hidden_layers=text["layers"], **sizes, **tokens)

    @property
    def vision_config(self) -> PreTrainedConfig:
        return PreTrainedConfig(image_size=self.image_size, hidden_size=None)


class OpenClipTextTower(nn.Module):
    """open_clip's causal text tower for texts of any length up to its own: hidden states, and the end token's. Takes
    over the modules of a `open_clip.transformer.TextTransformer`."""

    def __init__(self, text: nn.Module):
        super().__init__()
        # Where CLIPModel has it: prompts learnt on one of the two are found again on the other.
        self.embeddings = nn.ModuleDict({"token_embedding": text.token_embedding})
        self.positional_embedding = text.positional_embedding
        self.transformer, self.ln_final = text.transformer, text.ln_final
        self.text_projection = text.text_projection
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """Token ids (B, L), padded on the right, to states (B, L, width) and the end token's state (B, width).

        No token sees those behind it, so padding needs no mask.
        """
        length = input_ids.shape[1]
        states = [self.embeddings["token_embedding"](input_ids) + self.positional_embedding[:length]]
        for block in self.transformer.resblocks:
            states.append(block(states[-1], attn_mask=self.attn_mask[:length, :length]))
        hidden = self.ln_final(states[-1])
        # The end token has the largest id; of those in a row padded with it, the first one counts.
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), input_ids.argmax(1)]
        seen = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=seen)


class OpenClipModel(PreTrainedModel):
    """A model of open_clip with the methods and the output of a `CLIPModel`. It takes over the towers of `clip`, an
    `open_clip.CustomTextCLIP`; without one it is built with random weights.

    Raises:
        ValueError: open_clip cannot build this model.
    """

    config_class = OpenClipConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OpenClipConfig, clip: nn.Module | None = None):
        super().__init__(config)
        clip = _build(config) if clip is None else clip
        self.vision_model = clip.visual
        self.text_model = OpenClipTextTower(clip.text)
        self.logit_scale = clip.logit_scale
        if clip.logit_bias is not None:
            self.logit_bias = clip.logit_bias
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """open_clip has set them."""

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """(B, 3, S, S) pixels to projected features (B, d) in `pooler_output`."""
        return BaseModelOutputWithPooling(pooler_output=self.vision_model(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """(B, L) token ids to projected features (B, d) in `pooler_output`."""
        output, project = self.text_model(input_ids, attention_mask), self.text_model.text_projection
        if project is not None:
            pooled = output.pooler_output
            output.pooler_output = project(pooled) if callable(project) else pooled @ project
        return output

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CLIPOutput | tuple:
        """Images and texts to unit rows and ``z = s * x @ a.T + b``, as `CLIPModel`."""
        vision = self.get_image_features(pixel_values)
        image = normalize(vision.pooler_output, dim=-1)
        text = normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        if hasattr(self, "logit_bias"):
            logits = logits + self.logit_bias
        output = CLIPOutput(logits_per_image=logits, logits_per_text=logits.T, text_embeds=text, image_embeds=image)
        output["vision_model_output"] = vision
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def from_pretrained(
        cls, name: str, *, revision: str | None = None, dtype: torch.dtype | str | None = None, **hub
    ) -> OpenClipModel:
        """Reads a model with its weights.

        Args:
            name (`str`): ``open_clip:...``, see above.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): `"auto"` keeps the stored type.
            revision, **hub: of the repository with the weights, as in `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: open_clip is not installed or cannot build this model, the architecture or tag is unknown, or
                the weights are not those of the architecture.
            FileNotFoundError: no such folder or file.
            OSError: there are no safetensors, or the repository cannot be read.
        """
        source = _find(name, revision=revision, **hub)
        config = _config(source)
        clip = _build(config)  # before the download: what cannot be built need not be fetched
        path = _weights(name, source, revision=revision, **hub)
        try:
            _open_clip().load_checkpoint(clip, str(path))
        except (RuntimeError, AssertionError) as error:
            first = " ".join(str(error).split("\n")[:2])
            raise ValueError(f"{path.name} of {name!r} holds other weights than this model has: {first}") from error
        model = cls(config, clip)
        model.name_or_path = config._name_or_path = name
        on_hub = not Path(source.place).is_dir()
        config._commit_hash = path.parent.name if on_hub else None  # the folder of a commit in the cache
        return model.to(_dtype(path, dtype))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes a folder that ``open_clip:FOLDER`` names, and that open_clip reads (``local-dir:FOLDER``).

        Raises:
            ValueError: PEFT has put an adapter inside.
        """
        if getattr(self, "peft_config", None):
            raise ValueError("there is an adapter inside the model: save it by tuners.save_adapter, or merge it.")
        folder, tensors = Path(save_directory), {}
        for key, tensor in self.state_dict().items():
            key = re.sub(r"^text_model\.(embeddings\.)?", "text.", re.sub(r"^vision_model\.", "visual.", key))
            tensors[key] = tensor.detach().cpu().contiguous()
        model_cfg = {**self.config.model_cfg, "custom_text": True}
        content = {"model_cfg": model_cfg, "preprocess_cfg": self.config.preprocess_cfg}
        replace_file(folder / WEIGHTS[0], lambda path: save_file(tensors, path))
        text = json.dumps(content, indent=2) + "\n"
        replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def load_processor(name: str, *, revision: str | None = None, **hub) -> CLIPProcessor:
    """Tokenizer and image processor of an ``open_clip:`` model, see [`OpenClipModel.from_pretrained`]; its weights are
    not read."""
    config = _config(_find(name, revision=revision, **hub))
    how, side = config.preprocess_cfg, config.image_size
    square = {"height": side, "width": side}
    squashed = how["resize_mode"] == "squash"
    images = CLIPImageProcessorPil(
        size=square if squashed else {"shortest_edge": side},
        do_center_crop=not squashed,
        crop_size=square,
        resample=RESAMPLING[how["interpolation"]],
        image_mean=list(how["mean"]),
        image_std=list(how["std"]),
    )
    return CLIPProcessor(images, load_tokenizer(config.text_config.max_position_embeddings))


def load_tokenizer(context_length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer from the file in open_clip's package: the vocabulary and ids of OpenAI's checkpoints."""
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    own = _open_clip().SimpleTokenizer()
    named = {START: "<|startoftext|>", END: "<|endoftext|>"}  # as in transformers
    return {named.get(number, token): number for token, number in own.encoder.items()}, list(own.bpe_ranks)


class _Source(NamedTuple):
    """What a name stands for: configurations as open_clip has them, and where the weights are."""

    model_cfg: dict
    preprocess_cfg: dict
    place: str  # folder or Hub id
    files: tuple[str, ...]  # the first of them that is there


def _open_clip():
    try:
        import open_clip  # of the extra `open-clip`
    except ImportError as error:
        remedy = 'pip install "hf-transmiter[open-clip]"'
        raise ValueError(f"{OPEN_CLIP!r} models need the open_clip library ({error}): {remedy}.") from error
    return open_clip


def _find(name: str, **hub) -> _Source:
    if not is_open_clip(name):
        raise ValueError(f"{name!r} is no model of open_clip: such names begin with {OPEN_CLIP!r}.")
    open_clip, rest = _open_clip(), name.removeprefix(OPEN_CLIP)
    if rest.startswith(_HUB) or rest and Path(rest).is_dir():
        place = rest.removeprefix(_HUB)
        content = read_json(place, CONFIG, **hub)
        if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
            raise FileNotFoundError(f"{name!r} has no {CONFIG} that describes a model: not a model of open_clip.")
        return _Source(content["model_cfg"], content.get("preprocess_cfg") or {}, place, WEIGHTS)
    architecture, _, tag = rest.partition("/")
    if not architecture or not tag or architecture.startswith((".", "~")):
        forms = f"{OPEN_CLIP}ARCHITECTURE/TAG, nor {OPEN_CLIP}{_HUB}user/repo"
        raise FileNotFoundError(f"there is no model {name!r}: neither a folder, nor {forms}.")
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        close = nearest(architecture, open_clip.list_models())
        hint = f"; the nearest are {', '.join(close)}" if close else ""
        raise ValueError(f"open_clip has no architecture {architecture!r}{hint}.")
    if tag.endswith(".safetensors") or Path(tag).is_file():
        if not Path(tag).is_file():
            raise FileNotFoundError(f"there is no file {tag!r}.")
        return _Source(model_cfg, {}, str(Path(tag).parent), (Path(tag).name,))
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ValueError(f"open_clip has no weights {tag!r} for {architecture}; it has {', '.join(tags) or 'none'}.")
    # Each tag was trained with one kind of GELU; only the text tower of a ResNet or of a timm model has any.
    model_cfg["quick_gelu"] = model_cfg.get("quick_gelu", False) or known.get("quick_gelu", False)
    place, file = os.path.split(known.get("hf_hub") or "")
    return _Source(model_cfg, known, place, (str(Path(file).with_suffix(".safetensors")),) if file else WEIGHTS)


def _config(source: _Source) -> OpenClipConfig:
    """In one form, whichever way the same model was found: its fingerprint depends on it."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict  # of the extra `open-clip`

    _check_readable(source.model_cfg)
    vision, text = ({**source.model_cfg[tower]} for tower in ("vision_cfg", "text_cfg"))
    defaults = {"context_length": 77, "vocab_size": VOCABULARY, "width": 512, "heads": 8, "layers": 12}
    size = vision.get("image_size", 224)
    vision["image_size"] = size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else size
    vision.pop("timm_model_pretrained", None)
    model_cfg = {"embed_dim": source.model_cfg["embed_dim"], "quick_gelu": bool(source.model_cfg.get("quick_gelu"))}
    model_cfg |= {"vision_cfg": vision, "text_cfg": defaults | text}
    optional = ("init_logit_bias", "nonscalar_logit_scale")
    model_cfg |= {key: source.model_cfg[key] for key in optional if source.model_cfg.get(key) is not None}
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), source.preprocess_cfg)
    preprocess = {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    preprocess |= {key: list(preprocess[key]) for key in ("mean", "std")}
    if preprocess["interpolation"] not in RESAMPLING or preprocess["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(f"pictures that are resized as {preprocess} cannot be read.")
    if not isinstance(model_cfg["vision_cfg"]["image_size"], int):
        raise ValueError(f"pictures of {size} pixels are not square.")
    return OpenClipConfig(model_cfg=model_cfg, preprocess_cfg=preprocess)


def _check_readable(model_cfg: dict) -> None:
    lacking = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if not model_cfg.get(key)]
    if lacking:
        raise ValueError(f"the model's configuration has no {lacking[0]!r}: not one of open_clip.")
    text = model_cfg["text_cfg"]
    usual = {"pool_type": "argmax", "vocab_size": VOCABULARY}
    odd = [key for key in _OTHER_TEXTS if text.get(key)]
    odd += [key for key, value in usual.items() if text.get(key) not in (None, value)]
    odd = [f"{key}={text[key]!r}" for key in odd] + (["multimodal_cfg"] if model_cfg.get("multimodal_cfg") else [])
    if odd:
        raise ValueError(
            f"the model does not read texts as CLIP does ({', '.join(odd)}), and only those that do are supported: "
            "CLIP, EVA-CLIP, MetaCLIP, DFN, ConvNeXt, ViTamin, PE. SigLIP and MetaCLIP 2 are in transformers: load "
            "google/siglip-... or facebook/metaclip-2-... without open_clip."
        )
    timm = model_cfg["vision_cfg"].get("timm_model_name")
    if timm is not None and not re.fullmatch(r"[\w.-]+", timm):  # timm would fetch a configuration from elsewhere
        raise ValueError(f"the image tower {timm!r} is not one of timm's own.")


def _build(config: OpenClipConfig) -> nn.Module:
    open_clip = _open_clip()
    try:
        return open_clip.CustomTextCLIP(**config.model_cfg)
    except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise ValueError(f"open_clip {open_clip.__version__} cannot build this model: {error}") from error


def _weights(name: str, source: _Source, **hub) -> Path:
    for file in source.files:
        path = fetch(source.place, file, **hub) if source.place else None
        if path is not None and path.suffix == ".safetensors":
            return path
    where = f" in {source.place}" if source.place else ""
    raise OSError(
        f"{name!r} has no {WEIGHTS[0]}{where}, and weights that are pickled (.pt, .bin) are not read: they can "
        "run code. Where you trust them, load them with open_clip, save the model's state_dict() with "
        f"safetensors.torch.save_file, and pass {OPEN_CLIP}ARCHITECTURE/FILE.safetensors."
    )


def _dtype(path: Path, wanted: torch.dtype | str | None) -> torch.dtype:
    """`"auto"` is that of the first tensor of the file that holds fractions, as transformers has it."""
    if wanted != "auto":
        return getattr(torch, wanted) if isinstance(wanted, str) else wanted or torch.float32
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next(names[dtype] for dtype, _ in read_header(path)[1].values() if dtype in names)
