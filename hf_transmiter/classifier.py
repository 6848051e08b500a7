"""[`AnchorClassifier`]: a dual encoder and the names it answers about, with or without an adapter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import CommitInfo
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .anchors import Anchors
from .backbone import DualEncoder
from .calibration import CalibrationPack
from .cards import write_card
from .hub import fetch, split_revision
from .transfers import ANCHORS, TeacherFacts, write_adapter


if TYPE_CHECKING:
    from .tuners import TransMiterConfig

CALIBRATION = "calibration.safetensors"


@dataclass
class AnchorClassifierOutput(ModelOutput):
    """
    Args:
        logits_per_image (`Tensor`): (B, K) over all anchors; (B, C) over the task names once an adapter is attached.
        image_embeds (`Tensor`): (B, d) unit rows.
    """

    logits_per_image: Tensor | None = None
    image_embeds: Tensor | None = None


class AnchorClassifier(nn.Module):
    """Zero-shot classifier over anchors: ``logits = s · x aᵀ + b``; adapters attach to it as to any PEFT base model.

    The dual encoder is shared, not copied, and stays as it is: adapters hang on the classifier, so that one model can
    serve many classifiers.

    Args:
        encoder (`DualEncoder`): weak, tuned or strong.
        anchors (`Anchors`): the K names.
        text_embeds (`Tensor`, *optional*): (K, d) unit embeddings of the anchors; computed when first needed.

    Example:

    ```python
    >>> classifier = AnchorClassifier(DualEncoder.from_pretrained("openai/clip-vit-base-patch32"), Anchors(("cat", "dog")))
    >>> classifier.predict(["tabby.jpg"])
    [[{'label': 'cat', 'score': 0.99}]]
    ```
    """  # noqa: E501

    def __init__(self, encoder: DualEncoder, anchors: Anchors, text_embeds: Tensor | None = None):
        super().__init__()
        self.encoder, self.anchors = encoder, anchors
        self.model = encoder.model
        self.name_or_path = encoder.name_or_path  # PEFT notes it as base_model_name_or_path
        self._calibration: CalibrationPack | None = None
        self.facts: TeacherFacts | None = None  # of a model that was tuned: what it was made of
        self._saved: tuple[str, dict] | None = None  # the repository an adapter was loaded from
        self._peft: list[PeftModel] = []  # a list hides it from nn.Module: the PeftModel contains this module
        if text_embeds is not None and tuple(text_embeds.shape) != (len(anchors), encoder.embed_dim):
            raise ValueError(
                f"text_embeds must be {(len(anchors), encoder.embed_dim)} for these anchors, "
                f"got {tuple(text_embeds.shape)}."
            )
        self.register_buffer("_text_embeds", text_embeds, persistent=False)

    @property
    def text_embeds(self) -> Tensor:
        """(K, d) unit text embeddings of the anchors."""
        if self._text_embeds is None:
            self._text_embeds = self.encoder.embed_names(self.anchors.names, self.anchors.templates)
        return self._text_embeds

    @property
    def adapter(self) -> PeftModel | None:
        """The PEFT model around this classifier, for switching, disabling, adding and deleting adapters."""
        return self._peft[0] if self._peft and hasattr(self, "transmiter") else None

    @property
    def adapter_config(self) -> TransMiterConfig | None:
        """Configuration of the adapter that answers, `None` without one."""
        layer = getattr(self, "transmiter", None)
        return None if layer is None or layer.active_name is None else layer.configs[layer.active_name]

    @property
    def calibration(self) -> CalibrationPack | None:
        """The teacher's logits an adapter was fitted to; read from the adapter's repository when first asked for."""
        if self._calibration is None and self._saved is not None:
            source, hub = self._saved
            path = fetch(source, CALIBRATION, **hub)
            self.calibration = None if path is None else CalibrationPack.load(path)
        return self._calibration

    @calibration.setter
    def calibration(self, pack: CalibrationPack | None) -> None:
        self._calibration, self._saved = pack, None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the columns of [`classify`]."""
        config = self.adapter_config
        return tuple(config.class_names) if config else self.anchors.task or self.anchors.names

    def forward(self, pixel_values: Tensor) -> AnchorClassifierOutput:
        """(B, 3, S, S) pixels to logits."""
        image_embeds = self.encoder.embed_pixels(pixel_values)
        if self.adapter_config is not None:  # the adapter's hook writes the logits
            return AnchorClassifierOutput(image_embeds=image_embeds)
        logits = self._anchor_logits(image_embeds, len(self.anchors))
        return AnchorClassifierOutput(logits_per_image=logits, image_embeds=image_embeds)

    def classify(self, image_embeds: Tensor) -> Tensor:
        """Task logits (B, C) from unit image embeddings (B, d): the head alone, for cached features."""
        if self.adapter_config is not None:
            return self.transmiter(image_embeds, self.encoder.logit_scale, self.encoder.logit_bias)
        return self._anchor_logits(image_embeds, len(self.class_names))

    def _anchor_logits(self, image_embeds: Tensor, columns: int) -> Tensor:
        """(B, columns) over the first anchors; with class vectors of each image's own where it makes them (CoCoOp)."""
        from .tuners.prompts import image_conditioned, image_conditioned_logits  # not at the top: tuners come later

        layer = image_conditioned(self.model)
        if layer is None:
            return self.encoder.logits(image_embeds, self.text_embeds[:columns])
        if len(self.anchors.templates) > 1:
            raise ValueError("class vectors of each image's own (CoCoOp) are made from one template, '{}.'.")
        names = [name.replace("_", " ") for name in self.anchors.names[:columns]]
        inputs = self.encoder.tokenize([self.anchors.templates[0].replace("{}", name) for name in names])
        with torch.no_grad():
            return image_conditioned_logits(self.model, layer, image_embeds, inputs)

    @torch.no_grad()
    def predict(self, images: Sequence, top_k: int = 1, batch_size: int = 32) -> list[list[dict]]:
        """The best names per image, as the `image-classification` pipeline returns them.

        Args:
            images (`Sequence` of `PIL.Image.Image`, path or array, or one of these): the pictures.
            top_k (`int`, *optional*, defaults to 1): names per image.
            batch_size (`int`, *optional*, defaults to 32): images per forward pass.

        Returns:
            `list[list[dict]]`: per image `{"label": name, "score": probability}`, best first.
        """
        images = [images] if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)) else list(images)
        names, results = self.class_names, []
        for start in range(0, len(images), batch_size):
            pixels = self.encoder.preprocess(images[start : start + batch_size])
            probabilities = self(pixel_values=pixels).logits_per_image[:, : len(names)].float().softmax(-1)
            scores, columns = probabilities.topk(min(top_k, len(names)), dim=-1)
            for row_scores, row in zip(scores.tolist(), columns.tolist(), strict=True):
                pairs = zip(row_scores, row, strict=True)
                results.append([{"label": names[column], "score": score} for score, column in pairs])
        return results

    def add_adapter(
        self, config: TransMiterConfig, tensors: dict[str, Tensor] | None = None, name: str = "default"
    ) -> AnchorClassifier:
        """Attaches an adapter and makes it the one that answers.

        Args:
            config (`TransMiterConfig`): its `class_names` and `auxiliary_names` need not be this classifier's anchors.
            tensors (`dict[str, Tensor]`, *optional*): its weights as `transmiter.tensors(name)` gives them; starts
                as the identity when omitted.
            name (`str`, *optional*, defaults to `"default"`): name of the adapter.

        Returns:
            `AnchorClassifier`: itself.
        """
        config.base_model_name_or_path, config.revision = self.encoder.name_or_path, self.encoder.revision
        config.base_fingerprint = self.encoder.fingerprint
        self.calibration = None  # of the adapter before
        if self.adapter is None:
            self._peft[:] = [get_peft_model(self, config, adapter_name=name)]
        else:
            self.adapter.add_adapter(name, config)
            self.adapter.set_adapter(name)
        if tensors is not None:
            self.transmiter.set_tensors(name, tensors)
        elif config.anchors == self.anchors:
            self.transmiter.set_anchors(name, self.text_embeds)
        else:
            self.transmiter.set_anchors(name, self.encoder.embed_names(config.anchors.names, config.templates))
        return self.requires_grad_(False)

    def adapter_tensors(self) -> tuple[dict, dict[str, Tensor]]:
        """Configuration and weights of the adapter that answers, as `transfers.read_adapter` reads them from files.

        Raises:
            ValueError: there is no adapter.
        """
        if self.adapter_config is None:
            raise ValueError("there is no adapter to save: attach one with add_adapter, or run extract or transfer.")
        tensors = self.transmiter.tensors(self.transmiter.active_name)
        base = type(self.model)
        auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config = {**self.adapter_config.to_dict(), "inference_mode": True, "auto_mapping": auto_mapping}
        config["target_modules"] = None  # PEFT's bookkeeping
        return config, {part: tensor.cpu().contiguous() for part, tensor in tensors.items()}

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, dtype: torch.dtype | None = None, measure_on=None
    ) -> None:
        """Writes the adapter in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), its names
        (`anchors.json`), `calibration.safetensors` when there is a calibration pack, and the card (`README.md`). Each
        file is replaced in one step; others in the folder stay.

        Of a tuned model (what [`tune`] or [`attach`] made) the adapter inside it is written, and `teacher.json`
        ([`TeacherFacts`]) where `tune` made it.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): `torch.float16` halves the weights.
            measure_on (`datasets.Dataset`, *optional*):
                Images to measure what the rounding changes, for the card (`evaluation.rounding`); otherwise it says
                "not measured".

        Raises:
            FileExistsError: the folder holds another adapter with scores or transfers of its own.
            ValueError: there is no adapter to save, or another `dtype`.
        """
        if self.adapter_config is None and getattr(self.model, "peft_config", None):
            from .tuners.injection import save_adapter  # not at the top: tuners come later

            save_adapter(self.model, save_directory)
            if self.facts is not None:
                self.facts.write(save_directory)
            write_card(save_directory)
            return
        config, tensors = self.adapter_tensors()
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}.")
        config["provenance"].pop("saved_as", None)  # of an earlier file
        if dtype is not None:
            from .evaluation import rounding  # not at the top: it comes later in the order of the package

            facts = {} if measure_on is None else rounding(self, measure_on, dtype)
            config["provenance"] = {**config["provenance"], "saved_as": {"dtype": str(dtype).split(".")[-1], **facts}}
            tensors = {part: tensor.to(dtype) for part, tensor in tensors.items()}
        write_adapter(save_directory, config, tensors)
        target = Path(save_directory)
        self.adapter_config.anchors.save(target / ANCHORS, overwrite=True)
        if self.calibration is not None:
            self.calibration.save(target / CALIBRATION)
        else:  # one that is there belongs to the adapter that was there
            (target / CALIBRATION).unlink(missing_ok=True)
        write_card(target)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        base_model: str | None = None,
        dtype: torch.dtype | None = None,
        measure_on=None,
    ) -> CommitInfo:
        """Saves the adapter and uploads it in one commit, see [`save_pretrained`] and `sharing.push`.

        Args:
            repo_id (`str`): ``user/name``; made if it is not there.
            private, commit_message, create_pr, token (*optional*): as everywhere in huggingface_hub.
            base_model (`str`, *optional*): Hub id of the model, where it was loaded from a local folder.
            dtype, measure_on (*optional*): see [`save_pretrained`].
        """
        from .sharing import push

        options = {"private": private, "commit_message": commit_message, "create_pr": create_pr, "token": token}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype=dtype, measure_on=measure_on)
            return push(folder, repo_id, base_model=base_model, **options)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | os.PathLike,
        encoder: DualEncoder | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> AnchorClassifier:
        """Loads an adapter that [`save_pretrained`] wrote, from a folder or the Hub, onto its model.

        Args:
            adapter (`str` or `os.PathLike`): folder or Hub id.
            encoder (`DualEncoder`, *optional*): the model it was made for, loaded by the name in the adapter's config
                when omitted; or a model that the adapter's repository has a finished transfer for, which is taken.

        Raises:
            ValueError: not a TransMiter adapter, made for another model and there is no transfer to this one, or a
                tensor is missing, of the wrong shape, or not finite.
        """
        adapter, named = split_revision(os.fspath(adapter))
        hub = {"revision": revision or named, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        hub = {key: value for key, value in hub.items() if value is not None}
        hub |= {"local_files_only": True} if local_files_only else {}
        from .tuners import TransMiterConfig  # not at the top: tuners come later

        config = TransMiterConfig.from_pretrained(adapter, **hub)
        if encoder is None:
            shared = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if key in hub}
            encoder = DualEncoder.from_pretrained(config.base_model_name_or_path, revision=config.revision, **shared)
        classifier = cls(encoder, config.anchors)
        classifier._peft.append(PeftModel.from_pretrained(classifier, adapter, config=config, **hub))
        classifier._saved = (adapter, hub)
        if Path(adapter).is_dir():
            _ = classifier.calibration  # read at once: a folder may be gone later
        return classifier.requires_grad_(False)
