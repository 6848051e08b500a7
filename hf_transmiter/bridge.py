"""[`Bridge`]: the orthogonal map between two models, computed once per pair and reused by every adapter.

In logit space (published, arXiv 2508.08604 section 4) it maps the strong model's standardised logits over the anchors
to the weak model's; in embedding space (after arXiv 2602.17584) the weak model's centred embeddings to the strong
model's. Neither depends on an adapter or a task.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from .anchors import Anchors
from .backbone import DualEncoder
from .features import embed_dataset
from .files import read_metadata_json, read_tensors, replace_file
from .fingerprint import ModelId
from .settings import BETA
from .solvers import Sums, check_finite, polar, standardise


RANK_TOLERANCE = 1e-3  # directions with less evidence than this share of the best are dropped (embedding space)
SPAN_TOLERANCE = 0.05  # weaker text directions, in shares of the strongest, do not carry class vectors (logit space)
_FORMAT = "hf_transmiter.bridge"


@dataclass
class CrossMoment(Sums):
    """``X = Σ x_strongᵀ x_weak`` over paired rows, with the sums that centring and scaling need; all in float64.

    One sum over images: memory does not grow with N, and it adds up over processes ([`reduce`]). It depends on the
    pair of models (and the anchors, in logit space), not on an adapter.

    Args:
        n (`float`): pairs so far.
        strong (`Tensor`): Σ x_strong (m,).
        weak (`Tensor`): Σ x_weak (k,).
        cross (`Tensor`): X (m, k).
        weak_gram (`Tensor`): Σ x_weakᵀ x_weak (k, k).
        strong_square (`float`): Σ ‖x_strong‖².
    """

    n: float
    strong: Tensor
    weak: Tensor
    cross: Tensor
    weak_gram: Tensor
    strong_square: float

    @classmethod
    def zeros(cls, strong_width: int, weak_width: int) -> CrossMoment:
        m, k = strong_width, weak_width
        zeros = [torch.zeros(shape, dtype=torch.float64) for shape in ((m,), (k,), (m, k), (k, k))]
        return cls(0.0, *zeros, 0.0)

    def update(self, strong: Tensor, weak: Tensor) -> None:
        """Adds paired rows: strong (B, m) and weak (B, k).

        Raises:
            ValueError: different numbers of rows, or a value that is not finite.
        """
        if len(strong) != len(weak):
            raise ValueError(f"rows must come in pairs, got {len(strong)} of the strong and {len(weak)} of the weak.")
        strong, weak = check_finite(strong, "strong rows").double(), check_finite(weak, "weak rows").double()
        self.n += len(strong)
        self.strong += strong.sum(0)
        self.weak += weak.sum(0)
        self.cross += strong.T @ weak
        self.weak_gram += weak.T @ weak
        self.strong_square += float(strong.square().sum())

    def centred(self) -> CrossMoment:
        """The same moment of the rows minus their means."""
        if self.n < 2:
            raise ValueError(f"a bridge needs at least two pairs, got {int(self.n)}: pass more images or names.")
        strong, weak = self.strong / self.n, self.weak / self.n
        return CrossMoment(
            self.n,
            strong,
            weak,
            self.cross - self.n * torch.outer(strong, weak),
            self.weak_gram - self.n * torch.outer(weak, weak),
            float(self.strong_square - self.n * strong.square().sum()),
        )


@dataclass
class Bridge:
    """The transfer matrix of a pair of models.

    Args:
        space (`str`): `"embedding"` or `"logit"`.
        matrix (`Tensor`):
            Embedding space: Q (d_strong, d_weak), semi-orthogonal, ``x_strong - μ_s ≈ s · (x_weak - μ_w) Qᵀ``.
            Logit space: P (K, K), orthogonal, ``z_strong P ≈ z_weak``.
        scale (`float`): the Procrustes factor s (1 in logit space).
        mean_strong, mean_weak (`Tensor`): μ_s and μ_w (zero in logit space).
        strong, weak (`ModelId`): the pair.
        source (`str`): `"images"` or `"text"`, what the pairs were.
        num_pairs (`int`): N.
        alignment (`float`): correlation of mapped and actual rows, 1 for a perfect bridge.
        beta (`float`): β of the logit-space solution, absolute.
        anchors (`Anchors`, *optional*): the K names of a logit-space bridge.
    """

    space: Literal["embedding", "logit"]
    matrix: Tensor
    scale: float
    mean_strong: Tensor
    mean_weak: Tensor
    strong: ModelId
    weak: ModelId
    source: Literal["images", "text"]
    num_pairs: int
    alignment: float
    beta: float = 0.0
    anchors: Anchors | None = field(default=None)

    @classmethod
    def build(
        cls,
        weak: DualEncoder,
        strong: DualEncoder,
        dataset=None,
        *,
        space: Literal["embedding", "logit"] = "embedding",
        anchors: Anchors | None = None,
        beta: float = BETA,
        beta_per_image: float | None = None,
        accelerator=None,
        progress: bool = True,
        **embedding,
    ) -> Bridge:
        """A bridge from unlabelled images, or from text alone when there are none.

        Args:
            weak, strong (`DualEncoder`): any two models: families, widths, tokenizers and image sizes may differ.
            dataset (`datasets.Dataset`, *optional*): images; they need not be the task's.
            space (`str`, *optional*, defaults to `"embedding"`): `"embedding"` or `"logit"` (published).
            anchors (`Anchors`, *optional*):
                Logit space: the K names both models answer about. Without images: the names both models embed.
                Defaults to the universal vocabulary of 1,024 common nouns.
            beta (`float`, *optional*, defaults to 500.0): pull towards the identity in logit space, absolute.
            beta_per_image (`float`, *optional*): β = this times N instead, since X grows with N.
            **embedding: passed to `embed_dataset`.

        Raises:
            ValueError: an unknown space, or a logit-space bridge without images.
        """
        if space not in ("embedding", "logit"):
            raise ValueError(f"space must be 'embedding' or 'logit', got {space!r}.")
        if dataset is None and space == "logit":
            raise ValueError("a logit-space bridge needs images; without them build one in embedding space.")
        anchors = anchors or Anchors.universal()
        texts = [None, None]
        if space == "logit" or dataset is None:
            texts = [model.embed_names(anchors.names, anchors.templates).cpu() for model in (weak, strong)]
        if dataset is None:
            moment = CrossMoment.zeros(strong.embed_dim, weak.embed_dim)
            moment.update(texts[1], texts[0])
        else:
            options = {"accelerator": accelerator, "progress": progress, **embedding}
            tables = [embed_dataset(model, dataset, **options) for model in (weak, strong)]
            moment = image_moment(weak, strong, tables, texts if space == "logit" else None, accelerator)
        return cls.from_moment(
            moment,
            ModelId.of(weak),
            ModelId.of(strong),
            space=space,
            source="text" if dataset is None else "images",
            beta=beta if beta_per_image is None else beta_per_image * moment.n,
            anchors=anchors if space == "logit" or dataset is None else None,
        )

    @classmethod
    def from_moment(
        cls,
        moment: CrossMoment,
        weak: ModelId,
        strong: ModelId,
        *,
        space: Literal["embedding", "logit"],
        source: Literal["images", "text"] = "images",
        beta: float = BETA,
        anchors: Anchors | None = None,
    ) -> Bridge:
        """The bridge of a finished moment.

        Logit space: ``P = polar(X + βI)``, the orthogonal argmin of ``‖Z_strong P - Z_weak‖² + β‖P - I‖²``; β > 0 is
        needed where z has fewer directions than anchors. Embedding space: ``Q = polar(X)`` of centred rows, a
        partial isometry that drops directions without evidence, and ``s = tr(Qᵀ X) / ‖(x_weak - μ_w) Qᵀ‖²``.
        """
        if space == "logit":
            matrix, _ = polar(moment.cross + beta * torch.eye(len(moment.cross), dtype=torch.float64))
            scale, centre, fit = 1.0, [torch.zeros_like(moment.strong), torch.zeros_like(moment.weak)], moment
        else:
            fit = moment.centred()
            matrix, _ = polar(fit.cross, RANK_TOLERANCE)
            mapped = float((matrix @ fit.weak_gram * matrix).sum())
            scale, centre, beta = float((matrix * fit.cross).sum()) / max(mapped, 1e-12), [fit.strong, fit.weak], 0.0
        size = (fit.strong_square * float(fit.weak_gram.trace())) ** 0.5
        return cls(
            space,
            matrix.float(),
            scale,
            centre[0].float(),
            centre[1].float(),
            strong,
            weak,
            source,
            int(moment.n),
            float((matrix * fit.cross).sum()) / max(size, 1e-12),
            beta,
            anchors,
        )

    def carry_basis(self, basis: Tensor) -> Tensor:
        """The strong model's basis ``W Pᵀ`` (D, K) of a published adapter: ``z_strong (W Pᵀ)ᵀ = z_strong P Wᵀ``.

        Raises:
            ValueError: an embedding-space bridge, or another number of anchors.
        """
        if self.space != "logit":
            raise ValueError("the published adapter reads logits: build the bridge with space='logit'.")
        if basis.shape[1] != len(self.matrix):
            raise ValueError(f"the basis reads {basis.shape[1]} anchors, the bridge has {len(self.matrix)}.")
        return basis @ self.matrix.T

    def carry_class_vectors(
        self, tuned: Tensor, weak_text: Tensor, strong_text: Tensor, anchor_texts: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Class vectors of the tuned weak model, moved to the strong model.

        ``full = μ_s + s·Q (T - μ_w)`` and ``delta = A_strong + s·Q (T - A_weak)`` in embedding space. In logit space
        only ``delta``: the change is written over the anchors, ``T - A_weak = Bᵀ Ā_w``, and read as
        ``A_strong + (P B)ᵀ Ā_s`` with Ā the anchors minus their mean; what lies outside the span of the names, up to
        `SPAN_TOLERANCE`, stays behind.

        Args:
            tuned (`Tensor`): T (C, d_weak).
            weak_text, strong_text (`Tensor`): zero-shot vectors A (C, d_weak) and (C, d_strong).
            anchor_texts (`Sequence[Tensor]`, *optional*): weak and strong anchor embeddings, for logit space.

        Returns:
            `dict[str, Tensor]`: unit rows (C, d_strong) by name.
        """
        change = tuned - weak_text
        if self.space == "logit":
            if anchor_texts is None:
                raise ValueError("a logit-space bridge carries class vectors by its anchors: pass anchor_texts.")
            weak_anchors, strong_anchors = (a - a.mean(0) for a in anchor_texts)
            coefficients = torch.linalg.pinv(weak_anchors.T.double(), rtol=SPAN_TOLERANCE) @ change.T.double()
            carried = (self.matrix.double() @ coefficients).T @ strong_anchors.double()
            return {"delta": normalize(strong_text + carried.float(), dim=-1)}
        carry = self.scale * self.matrix
        full = self.mean_strong + (tuned - self.mean_weak) @ carry.T
        delta = strong_text + change @ carry.T
        return {"full": normalize(full, dim=-1), "delta": normalize(delta, dim=-1)}

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes one safetensors file, atomically.

        Raises:
            FileExistsError: `path` exists and `overwrite` is `False`.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another path or overwrite=True.")
        tensors = {"matrix": self.matrix, "mean_strong": self.mean_strong, "mean_weak": self.mean_weak}
        facts = {key: getattr(self, key) for key in ("space", "scale", "source", "num_pairs", "alignment", "beta")}
        facts.update(strong=asdict(self.strong), weak=asdict(self.weak))
        facts["anchors"] = None if self.anchors is None else self.anchors.to_dict()
        metadata = {"format": _FORMAT, "bridge": json.dumps(facts)}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Bridge:
        """Reads what [`save`] wrote, and checks it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a bridge, a damaged one, shapes that do not fit, values that are not finite, or a matrix
                that is not (semi-)orthogonal.
        """
        tensors, metadata = read_tensors(path, _FORMAT, "bridge", "Bridge.save")
        facts = read_metadata_json(path, metadata, "bridge", dict)
        known = {"space", "scale", "source", "num_pairs", "alignment", "beta", "strong", "weak", "anchors"}
        if set(facts) != known or set(tensors) != {"matrix", "mean_strong", "mean_weak"}:
            raise ValueError(f"{path} is damaged: it holds {sorted(facts)} and {sorted(tensors)}.")
        for key, tensor in tensors.items():
            check_finite(tensor.reshape(1, -1), f"{key} of {path}")
        matrix = tensors["matrix"].double()
        if matrix.shape != (len(tensors["mean_strong"]), len(tensors["mean_weak"])):
            raise ValueError(f"{path}: the matrix {tuple(matrix.shape)} does not fit its means.")
        gram = matrix @ matrix.T
        if not torch.allclose(gram @ gram, gram, atol=1e-3):  # a projection: Q is a partial isometry
            raise ValueError(f"{path}: the matrix is not orthogonal; the file was changed or damaged.")
        try:
            facts["anchors"] = None if facts["anchors"] is None else Anchors.from_dict(facts["anchors"])
            facts.update(strong=ModelId(**facts["strong"]), weak=ModelId(**facts["weak"]))
            facts.update({key: float(facts[key]) for key in ("scale", "alignment", "beta")})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        if facts["space"] not in ("embedding", "logit"):
            raise ValueError(f"{path} is damaged: there is no space {facts['space']!r}.")
        return cls(**tensors, **facts)


def image_moment(
    weak: DualEncoder, strong: DualEncoder, tables: Sequence, texts: Sequence[Tensor] | None, accelerator=None
) -> CrossMoment:
    """The cross moment of two feature tables of the same images: embeddings, or with `texts` standardised logits.

    Processes take every other block and add their sums up.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    widths = (strong.embed_dim, weak.embed_dim) if texts is None else (len(texts[1]), len(texts[0]))
    moment = CrossMoment.zeros(*widths)
    for number, (x_weak, x_strong) in enumerate(zip(*(table.batches(4096) for table in tables), strict=True)):
        if number % world != rank:
            continue
        if texts is not None:
            x_weak = standardise(weak.logit_scale.cpu() * x_weak @ texts[0].T)[0]
            x_strong = standardise(strong.logit_scale.cpu() * x_strong @ texts[1].T)[0]
        moment.update(x_strong, x_weak)
    return moment.reduce(accelerator)
