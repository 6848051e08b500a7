"""[`TransMiterConfig`]: everything an adapter needs besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ...data.anchors import DEFAULT_TEMPLATES, Anchors
from ...hub.adapter_files import read_config
from ...settings import check_fields
from ..registration import PeftType


FORMS = ("mlp", "linear")
_LIMITS = {
    **dict.fromkeys(("image_side", "text_side"), {"least": 0, "most": 1_000_000}),
    "width": {"least": 1, "most": 1_000_000},
    "mlp_ratio": {"least": 1, "most": 64},
    "embed_dim": {"least": 1, "most": 65_536},
    "seed": {"least": -(2**63), "most": 2**64 - 1},
}


@dataclass
class TransMiterConfig(PeftConfig):
    """Configuration of a TransMiter adapter.

    Two forms share names, files and loading:

    - ``"mlp"`` (published, arXiv 2508.08604 section 3): ``ẑ = z + MLP(LN(z Wᵀ)) W`` on the logits over the
      K = C + A anchors, standardised per image.
    - ``"linear"``: what every closed form ends in, with one of two parts or both. An image side (A, b) changes what
      pictures look like, ``x' = normalise(x + A f + b)``; a text side (W, bias) what words mean,
      ``logits = s · x' Wᵀ + bias``, or ``s · [x' | f] Wᵀ + bias``. ``f = [x | h]`` are the rows of
      [`DualEncoder.embed_pixels`], h what the vision tower saw (`tests/studies/RESULTS.md`; no paper has it).
      Without a text side any names can be asked: ``s · x' aᵀ``.

    Args:
        class_names (`list[str]`): the C task names, in label order.
        auxiliary_names (`list[str]`, *optional*): the A names that only widen the logits (form "mlp").
        templates (`list[str]`, *optional*, defaults to `["a photo of a {}."]`): prompts of the anchors.
        form (`str`, *optional*, defaults to `"mlp"`): `"mlp"` or `"linear"`.
        image_side (`int`, *optional*):
            m, columns of f that A (d, m) reads: d for embeddings alone, d + 2D with the tower. Omitted: no such side.
        text_side (`int`, *optional*):
            Width of the class vectors W (C, d), or d + m for those that read m columns of f, too. When omitted: d
            without an image side, else (as with 0) there is no text side.
        open_names (`bool`, *optional*, defaults to `True`):
            Whether an image side was made for the names' own texts, so that other names can be asked; not where it
            goes with class vectors that say what words mean.
        width (`int`, *optional*): D, rows of the basis; D ≥ K. Defaults to K.
        mlp_ratio (`int`, *optional*, defaults to 4): hidden width of the MLP in units of D.
        train_basis (`bool`, *optional*, defaults to `False`):
            Whether plain PEFT training moves W too. It is not kept orthonormal then; `extract` keeps it so.
        embed_dim (`int`, *optional*): d of the model the adapter fits; read from the model when omitted.
        seed (`int`, *optional*, defaults to 0): of the initial basis and MLP.
        anchors_fingerprint (`str`, *optional*): filled in; a config whose names were edited is refused.
        base_fingerprint (`str`, *optional*):
            Fingerprint of the model the adapter was made for, filled in by [`AnchorClassifier`], which refuses another
            one.
        provenance (`dict`, *optional*): how the adapter came about; written by `extract` and `transfer`.

    Raises:
        ValueError: an unknown form, no or duplicate names, K > D, sides that do not fit the form, or a fingerprint
            that does not fit the names.
    """

    class_names: list[str] = field(default_factory=list)
    auxiliary_names: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=lambda: list(DEFAULT_TEMPLATES))
    form: str = "mlp"
    image_side: int | None = None
    text_side: int | None = None
    open_names: bool = True
    width: int | None = None
    mlp_ratio: int = 4
    train_basis: bool = False
    embed_dim: int | None = None
    seed: int = 0
    anchors_fingerprint: str | None = None
    base_fingerprint: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    # PEFT reads both on every config; the layer hangs on the model's root, so there is nothing to choose.
    target_modules: str | None = None
    exclude_modules: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.TRANSMITER
        check_fields(self, _LIMITS)
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}.")
        if not self.class_names:
            raise ValueError("class_names is empty: pass the names of the task's classes in label order.")
        anchors = self.anchors
        self.class_names, self.auxiliary_names = list(anchors.task), list(anchors.auxiliary)
        self.templates = list(anchors.templates)
        if self.anchors_fingerprint not in (None, anchors.fingerprint):
            raise ValueError(
                "anchors_fingerprint does not fit class_names, auxiliary_names and templates: one of them was edited. "
                "Restore the original adapter_config.json."
            )
        self.anchors_fingerprint = anchors.fingerprint
        if self.width is not None and self.width < anchors.num_anchors:
            raise ValueError(
                f"K = {anchors.num_anchors} anchors do not fit a basis of width D = {self.width}: orthonormal columns "
                "need D >= K. Use fewer auxiliary names or a larger width."
            )
        if self.form == "mlp" and (self.image_side or self.text_side):
            raise ValueError('form "mlp" has neither image_side nor text_side: use form="linear".')
        if self.form == "linear" and self.text_side == 0 and not self.image_side:
            raise ValueError("a linear adapter needs an image_side, a text_side or both.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs):
        """As in PEFT, and the files are checked: the configuration, and the weights' names and shapes against it."""
        options = {key: kwargs.get(key) for key in ("revision", "token", "cache_dir", "local_files_only")}
        hub = {"subfolder": subfolder, **{key: value for key, value in options.items() if value is not None}}
        return cls.from_peft_type(**read_config(pretrained_model_name_or_path, **hub))

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of the image side's A and of the class vectors; 0 where there is none. `embed_dim` must be known.

        Raises:
            ValueError: narrower than the embeddings.
        """
        image, text, d = self.image_side or 0, self.text_side or 0, self.embed_dim
        if self.form == "linear" and self.text_side is None and not image:
            text = d
        if 0 < image < d or 0 < text < d or d < text < 2 * d:
            raise ValueError(
                f"image_side = {self.image_side} and text_side = {self.text_side} do not fit embeddings of width {d}: "
                "an image side reads d or d + 2D columns, class vectors have d, or d more than they read."
            )
        return image, text

    @property
    def reads(self) -> int:
        """Columns of f that the adapter needs: d, or d + 2D where it reads the vision tower, too."""
        image, text = self.widths
        return max(self.embed_dim, image, text - self.embed_dim)

    @property
    def own_class_vectors(self) -> bool:
        """Whether words were tuned (a prompt, a head) and not an image tower: what `provenance` says, back to
        the extraction."""
        facts = self.provenance
        while isinstance(facts, dict) and "own_class_vectors" not in facts:
            facts = facts.get("extracted") or facts.get("before")  # of an adapter that has come further
        return bool(facts and facts["own_class_vectors"])

    @property
    def anchors(self) -> Anchors:
        return Anchors(self.class_names, self.auxiliary_names, self.templates)

    @classmethod
    def for_anchors(cls, anchors: Anchors, **kwargs) -> TransMiterConfig:
        """A config with the names and templates of `anchors`."""
        names = {"class_names": list(anchors.task), "auxiliary_names": list(anchors.auxiliary)}
        return cls(**names, templates=list(anchors.templates), **kwargs)
