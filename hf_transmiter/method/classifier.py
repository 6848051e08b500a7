"""[`AnchorClassifier`]: a dual encoder and the names it answers about, with or without an adapter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.clip.modeling_clip import CLIPOutput

from ..algebra import check_finite
from ..data.anchors import Anchors
from ..encoders.dual_encoder import DualEncoder, load_base
from ..encoders.identity import ModelId
from ..encoders.pictures import as_pictures
from ..hub.adapter_files import CALIBRATION, TeacherFacts, read_adapter, write_adapter
from ..hub.card import write_card
from ..hub.checks import as_list
from ..hub.files import fill_folder
from ..hub.push import push
from ..hub.repo import fetch, split_revision
from ..settings import check_kind, check_number
from ..tuners import TransMiterConfig, TransMiterLayer
from ..tuners.injection import save_adapter
from ..tuners.prompts import image_conditioned, image_conditioned_logits
from ..tuners.transmiter.model import check_base
from .stored_logits import CalibrationPack


def seen_columns(class_names: Sequence[str], seen: Sequence[str] | None) -> list[int]:
    """Columns of the names that a tuning saw: of `seen` in that order, or all of them.

    Raises:
        ValueError: a name that is none of the class names.
    """
    unknown = sorted(set(as_list(seen or (), "seen_classes")) - set(class_names))
    if unknown:
        raise ValueError(f"seen_classes holds names the adapter does not know: {unknown[:5]}.")
    if seen is not None and not len(seen):
        raise ValueError("seen_classes is empty: leave it out where the tuning saw all classes.")
    return [class_names.index(name) for name in (class_names if seen is None else dict.fromkeys(seen))]


class AnchorClassifier(nn.Module):
    """Zero-shot classifier over anchors: ``logits = s · x aᵀ + b``; with an adapter, logits over its class names.

    The dual encoder is shared, not copied, and stays as it is: the adapter belongs to the classifier, so that one
    model can serve many classifiers. To switch between adapters, load them onto the model itself with PEFT.

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

    made_from = {(nn.Module, DualEncoder): "pass AnchorClassifier(encoder, anchors)"}

    def __init__(self, encoder: DualEncoder, anchors: Anchors, text_embeds: Tensor | None = None):
        super().__init__()
        self.encoder = check_kind("encoder", encoder, DualEncoder)
        self.anchors = check_kind("anchors", anchors, Anchors)
        self.model = encoder.model
        self._calibration: CalibrationPack | None = None
        self.facts: TeacherFacts | None = None  # of a model that was tuned: what it was made of
        self._saved: tuple[str, dict] | None = None  # the repository an adapter was loaded from
        # Other names than the adapter's, with their own anchors or, of its own names, their columns; see set_classes.
        self._asked: tuple[tuple[str, ...], Anchors | list[int]] | None = None
        self.register_module("transmiter", None)  # the adapter's layer
        if text_embeds is not None and tuple(text_embeds.shape) != (len(anchors), encoder.embed_dim):
            wanted, found = (len(anchors), encoder.embed_dim), tuple(text_embeds.shape)
            raise ValueError(f"text_embeds must be {wanted} for these anchors, got {found}.")
        self.register_buffer("_text_embeds", text_embeds, persistent=False)
        self._embedded: tuple[tuple, Tensor] | None = None  # what was embedded last, and its rows

    def __repr__(self) -> str:
        adapter = f", {self.adapter_config.form} adapter" if self.adapter_config else ""
        return f"{type(self).__name__}({self.encoder.name_or_path!r}, {len(self.class_names)} classes{adapter})"

    @property
    def text_embeds(self) -> Tensor:
        """(K, d) unit text embeddings of the anchors, made anew when the text tower or its adapters have changed."""
        return self._text_embeds if self.text_embeds_given else self._embed(self.anchors)

    @property
    def text_embeds_given(self) -> bool:
        """Whether the anchors' embeddings were passed, and are not those of the encoder."""
        return self._text_embeds is not None

    def _embed(self, anchors: Anchors) -> Tensor:
        """(K, d) of these anchors; those of the last call are kept. Several threads may call it."""
        wanted, known = (anchors, self.encoder.text_version), self._embedded
        if known is None or known[0] != wanted:
            known = self._embedded = (wanted, self.encoder.embed_names(anchors.names, anchors.templates))
        return known[1]

    @property
    def adapter_config(self) -> TransMiterConfig | None:
        """Configuration of the adapter, `None` without one."""
        return None if self.transmiter is None else self.transmiter.configs["default"]

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
        if self._asked is not None:
            return self._asked[0]
        return tuple(config.class_names) if config else self.anchors.task or self.anchors.names

    @property
    def reads_tower(self) -> bool:
        """Whether [`classify`] needs rows (N, d + 2D), embedded with ``tower=self.reads_tower``."""
        return self.transmiter is not None and self.transmiter.reads_tower

    @property
    def open_vocabulary(self) -> bool:
        """Whether it can be asked for any names: zero-shot, or by an adapter with an image side."""
        return self.transmiter is None or (self.transmiter.has_image_side and self.adapter_config.open_names)

    def set_classes(self, class_names: Sequence[str]) -> AnchorClassifier:
        """From now on the answers are about `class_names`; returns the classifier itself.

        Names that the adapter was saved with, or some of them, are answered by its text side. Where one is another
        name, an image side stays: ``logits = s · x' aᵀ + b`` with the names' own text embeddings. What is saved,
        carried over or tuned is the adapter with its own names.

        Raises:
            ValueError: one string, names that are empty or there twice, or that an adapter does not know which cannot
                be asked for others.
        """
        if isinstance(class_names, str):
            raise ValueError(f"class_names must be a list of names, not one string: [{class_names!r}].")
        names, config = Anchors(tuple(class_names)).task, self.adapter_config
        if config is None:
            known, given = self.anchors.names, None
            if self.text_embeds_given and set(names) <= set(known):
                given = self._text_embeds[[known.index(name) for name in names]]
            self.anchors, self._text_embeds = Anchors(names, (), self.anchors.templates), given
        elif set(names) <= set(config.class_names):
            columns = seen_columns(config.class_names, names)
            self._asked = None if list(names) == config.class_names else (names, columns)
        elif self.open_vocabulary:
            self._asked = names, Anchors(names, (), config.templates)
        else:
            new = [name for name in names if name not in config.class_names]
            raise ValueError(
                f"the adapter answers for its own {len(config.class_names)} class names only, and not "
                f"for {new[0]!r}: it changes what these words mean, not how pictures are seen. Ask the model without "
                "it, or extract from a teacher whose image tower was tuned, which gives an image side."
            )
        return self

    def forward(self, pixel_values: Tensor) -> CLIPOutput:
        """(B, 3, S, S) pixels to `logits_per_image`, (B, K) over all anchors or (B, C) over the task names once an
        adapter is attached, and `image_embeds` (B, d), unit rows, changed by an image side."""
        rows = self.encoder.embed_pixels(pixel_values, self.reads_tower)
        if self.transmiter is not None:
            # Unit rows once more, as the layer does on the model itself: the same logits to the bit.
            logits = self.classify(normalize(rows, dim=-1) if self.transmiter.is_head else rows)
            return CLIPOutput(logits_per_image=logits, image_embeds=self.transmiter.adapt(rows))
        logits = check_finite(self._anchor_logits(rows, len(self.anchors)), f"logits of {self}")
        return CLIPOutput(logits_per_image=logits, image_embeds=rows)

    def classify(self, rows: Tensor) -> Tensor:
        """Task logits (B, C) from unit image embeddings (B, d), or rows (B, d + 2D) of the tower for an adapter that
        [`reads_tower`]: the head alone, for cached features."""
        asked = None if self._asked is None else self._asked[1]
        if isinstance(asked, Anchors):
            logits = self.encoder.logits(self.transmiter.adapt(rows), self._embed(asked).to(rows.device))
        elif self.transmiter is not None:
            logits = self.transmiter(rows, self.encoder.logit_scale, self.encoder.logit_bias)
            logits = logits if asked is None else logits[:, asked]
        else:
            logits = self._anchor_logits(rows[:, : self.encoder.embed_dim], len(self.class_names))
        return check_finite(logits, f"logits of {self}")

    def _anchor_logits(self, image_embeds: Tensor, columns: int) -> Tensor:
        """(B, columns) over the first anchors; with class vectors of each image's own where it makes them (CoCoOp)."""
        layer = image_conditioned(self.model)
        if layer is None:
            return self.encoder.logits(image_embeds, self.text_embeds[:columns].to(image_embeds.device))
        if len(self.anchors.templates) > 1:
            raise ValueError("class vectors of each image's own (CoCoOp) are made from one template, '{}.'.")
        names = [name.replace("_", " ") for name in self.anchors.names[:columns]]
        inputs = self.encoder.tokenize([self.anchors.templates[0].replace("{}", name) for name in names])
        with torch.no_grad():
            return image_conditioned_logits(self.model, layer, image_embeds, inputs)

    @torch.no_grad()
    def predict(
        self, images: Sequence, top_k: int = 1, batch_size: int = 32, class_names: Sequence[str] | None = None
    ) -> list[list[dict]]:
        """The `top_k` best names per image, as the `image-classification` pipeline returns them:
        `{"label": name, "score": probability}`, best first.

        Args:
            images (`Sequence` of whatever [`read_picture`] reads, or one of these): the pictures.
            class_names (`Sequence[str]`, *optional*): asked this once, see [`set_classes`].
        """
        top_k, batch_size = check_number("top_k", top_k, least=1), check_number("batch_size", batch_size, least=1)
        if class_names is not None:
            given = self._text_embeds if self.text_embeds_given else None
            asked = AnchorClassifier(self.encoder, self.anchors, given)
            asked.transmiter = self.transmiter
            return asked.set_classes(class_names).predict(images, top_k, batch_size)
        images, names, results = list(as_pictures(images)), self.class_names, []
        for start in range(0, len(images), batch_size):
            pixels = self.encoder.preprocess(images[start : start + batch_size])
            probabilities = self(pixel_values=pixels).logits_per_image[:, : len(names)].float().softmax(-1)
            scores, columns = probabilities.topk(min(top_k, len(names)), dim=-1)
            for row_scores, row in zip(scores.tolist(), columns.tolist(), strict=True):
                pairs = zip(row_scores, row, strict=True)
                results.append([{"label": names[column], "score": score} for score, column in pairs])
        return results

    def add_adapter(self, config: TransMiterConfig, tensors: dict[str, Tensor] | None = None) -> AnchorClassifier:
        """Attaches an adapter, in the place of one that is there; returns the classifier itself.

        Args:
            config (`TransMiterConfig`): its `class_names` and `auxiliary_names` need not be this classifier's anchors.
            tensors (`dict[str, Tensor]`, *optional*): its weights, as `TransMiterLayer.tensors` gives them; starts as
                the identity when omitted.
        """
        encoder = self.encoder
        made_for = ModelId.of(encoder)
        config.base_model_name_or_path, config.revision = made_for.name, made_for.revision
        config.base_fingerprint = made_for.fingerprint
        self.check_model(config)
        config.embed_dim = encoder.embed_dim
        self.calibration = self._asked = None  # of the adapter before
        self.transmiter = TransMiterLayer.holding(config, tensors, encoder.device)
        if tensors is None:
            known = config.anchors == self.anchors
            embeds = self.text_embeds if known else encoder.embed_names(config.anchors.names, config.templates)
            self.transmiter.set_anchors("default", embeds)
        return self.requires_grad_(False)

    def check_model(self, config: TransMiterConfig | None = None) -> None:
        """Whether the model is still the one that the adapter was made for.

        Raises:
            ValueError: it is another, or was changed in place, by PEFT, say.
        """
        check_base(config or self.adapter_config, self.encoder.model, self.encoder)

    def adapter_tensors(self) -> tuple[dict, dict[str, Tensor]]:
        """Configuration and weights of the adapter, as `read_adapter` reads them from files.

        Raises:
            ValueError: there is no adapter.
        """
        if self.adapter_config is None:
            raise ValueError("there is no adapter to save: attach one with add_adapter, or run extract or transfer.")
        base = type(self.model)
        auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config = {**self.adapter_config.to_dict(), "inference_mode": True, "auto_mapping": auto_mapping}
        tensors = self.transmiter.tensors("default")
        return config, {part: tensor.cpu().contiguous() for part, tensor in tensors.items()}

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the adapter in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`),
        `calibration.safetensors` when there is a calibration pack, and the card (`README.md`). A new folder is there
        in one step; in one that is there each file is replaced in one step, and others stay.

        Of a tuned model (what [`tune`] or [`attach`] made) the adapter inside it is written, and `teacher.json`
        ([`TeacherFacts`]) where `tune` made it.

        Raises:
            FileExistsError: the folder holds another adapter with scores of its own.
            ValueError: there is no adapter to save, or a file would be one that is refused on loading.
            OSError: it cannot be written.
        """
        fill_folder(save_directory, self._save, reads=True)

    def _save(self, target: Path) -> None:
        if self.transmiter is None and getattr(self.model, "peft_config", None):
            save_adapter(self.model, target)
            if self.facts is not None:
                self.facts.write(target)
            write_card(target)
            return
        write_adapter(target, *self.adapter_tensors())
        if self.calibration is not None:
            self.calibration.save(target / CALIBRATION)
        else:  # one that is there belongs to the adapter that was there
            (target / CALIBRATION).unlink(missing_ok=True)
        write_card(target)

    def push_to_hub(self, repo_id: str, **options) -> CommitInfo:
        """Uploads what [`save_pretrained`] writes, in one commit; the repository ``user/name`` is made if it is not
        there. Options are those of [`push`]: `private`, `commit_message`, `create_pr`, `token`, `base_model` (Hub id
        of the model, where it was loaded from a local folder), ..."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(folder, repo_id, **options)

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
            adapter (`str` or `os.PathLike`): folder or Hub id (``id@revision`` too).
            encoder (`DualEncoder`, *optional*):
                The model it was made for; loaded by the name in the adapter's config when omitted.
            revision, subfolder, token, cache_dir, local_files_only (*optional*): as everywhere in transformers.

        Raises:
            ValueError: not a TransMiter adapter, made for another model, or a tensor is missing, of the wrong shape,
                or not finite.
        """
        if encoder is not None:
            check_kind("encoder", encoder, DualEncoder)
        adapter, named = split_revision(os.fspath(adapter))
        shared = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub = {"revision": revision or named, "subfolder": subfolder, **shared}
        content, tensors = read_adapter(adapter, **hub)
        config = TransMiterConfig.from_peft_type(**content)
        if encoder is None:
            encoder = load_base(adapter, config.base_model_name_or_path, config.revision, **shared)
        check_base(config, encoder.model, encoder)
        config.embed_dim = encoder.embed_dim
        classifier = cls(encoder, config.anchors)
        classifier.transmiter = TransMiterLayer.holding(config, tensors, encoder.device)
        classifier._saved = (adapter, hub)
        if Path(adapter).is_dir():
            _ = classifier.calibration  # read at once: a folder may be gone later
        return classifier.requires_grad_(False).eval()
