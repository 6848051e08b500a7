"""[`Bridge`]: the orthogonal map between two models, computed once per pair and reused by every adapter.

In logit space (published, arXiv 2508.08604 section 4) it maps the strong model's standardised logits over the anchors
to the weak model's; in embedding space (after arXiv 2602.17584) the weak model's centred embeddings to the strong
model's, those of an index too ([`Bridge.translate`]). Neither depends on an adapter or a task, so a bridge is worth
sharing: it has a card of its own, turns round ([`Bridge.invert`]), and two make a third ([`Bridge.compose`]).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import Tensor
from torch.nn.functional import normalize

from ..algebra import check_finite
from ..data.anchors import Anchors
from ..encoders.dual_encoder import DualEncoder
from ..encoders.identity import ModelId, check_untuned, same_model
from ..hub.adapter_files import BRIDGE, BRIDGE_SHAPES, find_bridge, read_bridge, write_bridge
from ..hub.card import write_card
from ..hub.files import fill_folder
from ..hub.provenance import library_versions
from ..hub.push import push
from ..hub.repo import public_name
from ..settings import BETA, PULL, check_choice, check_kind, check_number
from .moments import CrossMoment, sum_dataset, widen


SPAN_TOLERANCE = 0.05  # weaker text directions, in shares of the strongest, do not carry class vectors (logit space)
LITTLE, FEW_NAMES = 0.5, 200  # a bridge from text is doubted below either, see Bridge.doubt
_BLOCK = 65_536  # rows that are translated at once

logger = logging.getLogger(__name__)


@dataclass
class Bridge:
    """The transfer matrix of a pair of models.

    Args:
        matrix (`Tensor`):
            Embedding space: Q (d_strong, d_weak), semi-orthogonal, ``x_strong - μ_s ≈ s · (x_weak - μ_w) Qᵀ``.
            Logit space: P (K, K), orthogonal, ``z_strong P ≈ z_weak``.
        scale (`float`): the Procrustes factor s (1 in logit space).
        mean_strong, mean_weak (`Tensor`): μ_s and μ_w (zero in logit space).
        source (`str`): what the `num_pairs` pairs were, `"images"` or `"text"`.
        alignment (`float`, *optional*):
            [`CrossMoment.alignment`] on the pairs of the fit, 1 for a perfect bridge; with few pairs it flatters.
            `None` for a composed bridge, which was fitted to no pairs.
        beta (`float`): β of the logit-space solution, absolute.
        anchors (`Anchors`, *optional*): the K names of a logit-space bridge.
        dataset (`str`, *optional*): what the images were, in words for people, such as ``"mteb/dtd (train)"``.
        held_out (`float`, *optional*):
            The number to trust: the alignment of a bridge from nine tenths of the pairs on the others (at least
            `MIN_HELD_OUT`); of a composed bridge, or one from text, what [`measure`] found.
        held_out_on (`str`, *optional*):
            What `held_out` is of, `"images"` or `"names"`. Only that of images says what will become of images.
        scale_back (`float`, *optional*): s of the bridge the other way round, see [`invert`].
        through (`tuple[str, ...]`): names of the models between the two, of a composed bridge.
        versions (`dict[str, str]`): of the libraries it was built with.
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
    alignment: float | None
    beta: float = 0.0
    anchors: Anchors | None = None
    dataset: str | None = None
    held_out: float | None = None
    held_out_on: Literal["images", "names"] | None = None
    scale_back: float | None = None
    through: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        how = f"{self.space} space, {self.num_pairs} pairs of {self.source}, held-out alignment {self.trust}"
        return f"{type(self).__name__}({self.weak.name!r} to {self.strong.name!r}, {how})"

    @property
    def trust(self) -> str:
        """The held-out alignment and what it is of, in words."""
        return "not measured" if self.held_out is None else f"{self.held_out:.3f} on {self.held_out_on or 'its pairs'}"

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
        names: Anchors | None = None,
        **embedding,
    ) -> Bridge:
        """A bridge from unlabelled images, or from text alone when there are none.

        From few names, or such that the models do not know alike, it is worth little; that is logged ([`doubt`]).

        Args:
            weak, strong (`DualEncoder`): any two models: families, widths, tokenizers and image sizes may differ.
            dataset (`datasets.Dataset`, *optional*): images; they need not be the task's.
            anchors (`Anchors`, *optional*):
                Logit space, or without images: the K names that both models are asked about, 1,024 common nouns when
                omitted. With images in embedding space: names that join them, for where images are few.
            beta (`float`, *optional*, defaults to 500.0):
                Pull towards the identity in logit space, absolute; infinite gives the identity.
            beta_per_image (`float`, *optional*): β = this times N instead, since X grows with N.
            names (`Anchors`, *optional*):
                Embedding space: names of the task that join the other pairs ([`CrossMoment.solve`]) with weight 0.3;
                beside few images d / N, as anchors do, times their held-out alignment a; beside anchors alone 1 / a.
            **embedding: passed to `embed_dataset` (`accelerator`, `progress`, `cache_dir`, ...).

        Raises:
            ValueError: an unknown space, a logit-space bridge without images, or a beta in embedding space.
            TypeError: no dual encoder, or a keyword that `embed_dataset` does not have.
        """
        check_kind("weak", weak, DualEncoder)
        check_kind("strong", strong, DualEncoder)
        check_number("beta", beta if beta_per_image is None else beta_per_image, float, **PULL)
        check_choice("space", space, ("embedding", "logit"))
        if dataset is None and space == "logit":
            raise ValueError("a logit-space bridge needs images; without them build one in embedding space.")
        if space == "embedding" and (beta != BETA or beta_per_image is not None):
            raise ValueError("a bridge in embedding space does not read beta: leave that out, or build one of logits.")
        if space == "logit" and names is not None:
            raise ValueError("a bridge of logits does not read names: pass them as anchors.")
        check_untuned(weak)
        few, anchors = None not in (dataset, anchors) and space == "embedding", anchors or Anchors.universal()
        moment, held_out, span = sum_dataset(weak, strong, dataset, space, anchors, **embedding)
        joined = []
        if names is not None and len(names) > 1:
            weight = weak.embed_dim / moment.n if few else 0.3
            if dataset is None:
                weight = 1 / max(moment.kept(held_out, space) or 0.0, 0.01)
            joined.append((weight, sum_dataset(weak, strong, None, space, names)[0]))
        if few:
            texts = sum_dataset(weak, strong, None, space, anchors)
            joined.append((max(texts[0].kept(texts[1], space) or 0.0, 0.0) * weak.embed_dim / moment.n, texts[0]))
        made = cls.from_moment(
            moment,
            ModelId.of(weak),
            ModelId.of(strong),
            space=space,
            source="text" if dataset is None else "images",
            beta=beta if beta_per_image is None else beta_per_image * moment.n,
            anchors=anchors if space == "logit" or dataset is None else None,
            held_out=held_out,
            joined=joined,
            span=span,
        )
        if (doubt := made.doubt()) is not None:
            logger.warning(doubt)
        return replace(made, versions=library_versions())

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
        held_out: CrossMoment | None = None,
        joined: Sequence[tuple[float, CrossMoment]] = (),
        span: Tensor | None = None,
    ) -> Bridge:
        """The bridge of a finished moment.

        Logit space: ``P = polar(X + βI)``, the orthogonal argmin of ``‖Z_strong P - Z_weak‖² + β‖P - I‖²``; β > 0 is
        needed where z has fewer directions than anchors. Embedding space: ``Q = polar(X)`` of centred rows, a
        partial isometry that drops directions without evidence, and ``s = tr(Qᵀ X) / ‖(x_weak - μ_w) Qᵀ‖²``.

        Args:
            held_out (`CrossMoment`, *optional*): of some of the same pairs, on which one from the others is measured.
            joined (*optional*): moments of other pairs with their weights, see [`CrossMoment.solve`].
            span (`Tensor`, *optional*): logit space: what the rows are coordinates of, see [`logit_span`].
        """
        kept = None if held_out is None else moment.kept(held_out, space, beta)
        matrix, fit = moment.solve(space, beta, joined)
        scale, scale_back, means = 1.0, 1.0, (torch.zeros_like(fit.x), torch.zeros_like(fit.y))
        if space == "embedding":
            overlap, means, beta = float((matrix * fit.xy).sum()), (fit.x, fit.y), 0.0
            scale = overlap / max(float((matrix @ fit.yy * matrix).sum()), 1e-12)
            scale_back = overlap / max(float((fit.xx @ matrix * matrix).sum()), 1e-12)
        alignment = fit.alignment(matrix)
        if span is not None:
            matrix, means = widen(matrix, span), (span.new_zeros(len(span)),) * 2
        beta = min(beta, 1e300)  # as far as files go, and for this β the map is the same
        return cls(
            space,
            matrix.float(),
            scale,
            *(mean.float() for mean in means),
            strong,
            weak,
            source,
            num_pairs=int(moment.n),
            alignment=alignment,
            beta=beta,
            anchors=anchors,
            held_out=kept,
            held_out_on=None if kept is None else "names" if source == "text" else "images",
            scale_back=scale_back,
        )

    @property
    def derived(self) -> str | None:
        """How a composed bridge came about, ``"composed of A -> B and B -> C"``, without paths; `None` for others."""
        names = [name and public_name(name) for name in (self.weak.name, *self.through, self.strong.name)]
        steps = [f"{weak} -> {strong}" for weak, strong in zip(names, names[1:], strict=False)]
        return f"composed of {' and '.join(steps)}" if self.through else None

    def compose(self, then: Bridge) -> Bridge:
        """From A to C, of this bridge from A to B and another from B to C: one after the other, exactly.

        Embedding space: ``x_C ≈ μ_C + s₂Q₂(μ_B - μ'_B) + s₂s₁ · Q₂Q₁ (x_A - μ_A)``, where μ_B and μ'_B are what the
        two took for B's mean. Q₂Q₁ shrinks what Q₁ writes outside of what Q₂ reads; its polar factor, which does not,
        is worth the same (`tests/studies/bridges.py`). Logit space: ``P = P₂P₁``, orthogonal. `held_out` is not known
        until [`measure`] finds it; `num_pairs` is the smaller of the two, `beta` the larger.

        Raises:
            ValueError: `then` begins at another model or is in another space, or the anchors differ (logit space).
        """
        if not same_model(self.strong.fingerprint, then.weak.fingerprint):
            raise ValueError(
                f"these bridges do not meet: one ends at {self.strong.name!r} (revision {self.strong.revision}), the "
                f"other begins at {then.weak.name!r} (revision {then.weak.revision})."
            )
        if self.space != then.space:
            raise ValueError(f"one bridge is in {self.space} space, the other in {then.space} space.")
        if self.space == "logit" and self.anchors is not None and then.anchors is not None:
            self.anchors.check_same(then.anchors)
        carry, backs = then.scale * then.matrix.double(), (self.scale_back, then.scale_back)
        shift = carry @ (self.mean_strong.double() - then.mean_weak.double())
        datasets = {bridge.dataset: None for bridge in (self, then) if bridge.dataset}
        return replace(
            self,
            matrix=(then.matrix.double() @ self.matrix.double()).float(),
            scale=self.scale * then.scale,
            mean_strong=(then.mean_strong.double() + shift).float(),
            strong=then.strong,
            source="images" if (self.source, then.source) == ("images", "images") else "text",
            num_pairs=min(self.num_pairs, then.num_pairs),
            alignment=None,
            beta=max(self.beta, then.beta),
            dataset=" and ".join(datasets) or None,
            held_out=None,
            held_out_on=None,
            scale_back=None if None in backs else backs[0] * backs[1],
            through=(*self.through, self.strong.name or self.strong.fingerprint[:12], *then.through),
            versions=self.versions if self.versions == then.versions else {},
        )

    def invert(self) -> Bridge:
        """From the strong model back to the weak: of a built bridge what building it from the same pairs would give;
        not quite of a composed one whose parts knew different means of the model between.

        ``polar(Xᵀ) = polar(X)ᵀ`` and ``polar(Xᵀ + βI) = polar(X + βI)ᵀ``: the matrix is transposed, the means change
        places, the alignment stays. The factor is the slope of the other regression,
        ``s' = tr(Qᵀ X) / ‖(x_strong - μ_s) Q‖²``, stored as `scale_back`; s·s' ≤ 1 with equality only without noise,
        so there and back is no identity but shrinks what was lost on the way.

        Raises:
            ValueError: a file that does not hold `scale_back`.
        """
        if self.scale_back is None and self.space == "embedding":
            raise ValueError("this bridge was saved without the factor of the way back: build it again.")
        return replace(
            self,
            matrix=self.matrix.T.contiguous(),
            scale=1.0 if self.scale_back is None else self.scale_back,
            scale_back=self.scale,
            mean_strong=self.mean_weak,
            mean_weak=self.mean_strong,
            strong=self.weak,
            weak=self.strong,
            through=self.through[::-1],
        )

    def measure(
        self, weak: DualEncoder, strong: DualEncoder, dataset=None, *, anchors: Anchors | None = None, **embedding
    ) -> float:
        """The alignment ([`CrossMoment.alignment`]) on any images, or names without images. A bridge that was not
        built from images keeps it as `held_out`, with what it is of; so does a composed one.

        Args:
            anchors (`Anchors`, *optional*): without images, the names; a vocabulary of common nouns when omitted.
            **embedding: passed to `embed_dataset`.

        Raises:
            ValueError: another pair of models, or no images for a logit-space bridge.
        """
        self.weak.check(weak, "weak")
        self.strong.check(strong, "strong")
        if dataset is None and self.space == "logit":
            raise ValueError("a logit-space bridge is measured on images: pass some.")
        anchors = (self.anchors if self.space == "logit" else anchors) or Anchors.universal()
        moment, _, span = sum_dataset(weak, strong, dataset, self.space, anchors, **embedding)
        matrix = self.matrix if span is None else span.T @ self.matrix.double() @ span
        found = moment.in_space(self.space).alignment(matrix)
        on = "names" if dataset is None else "images"
        if self.derived or (self.source == "text" and on == "images"):
            self.held_out, self.held_out_on = found, on
        return found

    def doubt(self) -> str | None:
        """Why what crosses this bridge from text may end below the zero-shot strong model, in a sentence;
        `None` where nothing speaks against it, and for a bridge from images.

        Known from `tests/studies/text_bridges.py`. The alignment **on images** decides: from 0.6 on all gained (+1 to
        +50 points); below 0.5 real pictures ended between -24 and +0.4, the sandbox's between -10 and +19. That on
        names can mislead (0.97 where it was 0.24 on images: the text towers were relatives); low, it warns well.
        """
        if self.source == "images":
            return None
        if self.held_out is not None and self.held_out < LITTLE:
            where = f"{self.held_out_on or 'names'} that it was not built from"
            reason = f"its alignment is only {self.held_out:.2f} of at most 1 on {where}"
        elif self.num_pairs < FEW_NAMES and self.held_out_on != "images":
            reason = f"it was built from {self.num_pairs} names, fewer than {FEW_NAMES}"
        else:
            return None
        return (
            f"the bridge from text may be worse than the zero-shot strong model: {reason}; pass unlabelled pictures "
            "(--dataset), or anchors (--anchors) with some hundred names that both models know."
        )

    def translate(self, rows: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Rows of the weak model to where the strong one would put them: ``normalise(μ_s + s·Q (x - μ_w))``.

        So an index of old embeddings serves queries of the new model, of pictures or text. Whether that is better
        than to stay with the old model depends on the bridge: [`evaluate_bridge`] measures it.

        Args:
            rows (`Tensor` or `np.ndarray`):
                x, (N, d_weak), of any length; what comes back is (N, d_strong), float32, of the same kind and device.

        Raises:
            ValueError: a bridge of logits, rows of another width, or values that are not finite.
        """
        carry = self.scale * self.matrix
        return self._translated(rows, self.weak, carry.T, self.mean_strong - carry @ self.mean_weak)

    def translate_queries(self, rows: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Queries of the strong model for an index of the weak one's rows, which stays as it is: ``normalise(Qᵀ y)``,
        (N, d_strong) to (N, d_weak). For the rest see [`translate`].

        ``⟨Q (x - μ_w) s + μ_s, y⟩`` of a row x and a query y is ``s·⟨x, Qᵀ y⟩`` and what does not depend on x: up to
        the length of translated rows, neighbours are those of [`translate`], for texts too.
        """
        return self._translated(rows, self.strong, self.matrix, torch.zeros(self.matrix.shape[1]))

    def _translated(self, rows, model: ModelId, matrix: Tensor, shift: Tensor):
        """``normalise(x A + b)`` of a model's unit rows x, block by block."""
        if self.space == "logit":
            raise ValueError("a bridge of logits translates no embeddings: build one with space='embedding'.")
        rows = rows if torch.is_tensor(rows) else np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != len(matrix):
            raise ValueError(f"rows of {model.name!r} are (N, {len(matrix)}), these are {tuple(rows.shape)}.")
        found = torch.empty(len(rows), len(shift), device=rows.device if torch.is_tensor(rows) else "cpu")
        matrix, shift = matrix.to(found.device), shift.to(found.device)
        for start in range(0, len(rows), _BLOCK):
            x = rows[start : start + _BLOCK]
            x = x.float() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float32)
            check_finite(x, f"rows to translate{f', counted from {start},' if start else ''}")
            found[start : start + len(x)] = normalize(normalize(x, dim=-1) @ matrix + shift, dim=-1)
        return found if torch.is_tensor(rows) else found.numpy()

    def carry_basis(self, basis: Tensor) -> Tensor:
        """The strong model's basis ``W Pᵀ`` (D, K) of a published adapter: ``z_strong (W Pᵀ)ᵀ = z_strong P Wᵀ``.

        Raises:
            ValueError: an embedding-space bridge, or another number of anchors.
        """
        if self.space != "logit":
            raise ValueError("the published adapter reads logits: build the bridge with space='logit'.")
        if basis.shape[1] != len(self.matrix):
            raise ValueError(f"the basis reads {basis.shape[1]} anchors, the bridge has {len(self.matrix)}.")
        return (basis.double() @ self.matrix.double().T).to(basis.dtype)  # the same to the bit wherever it is loaded

    def carry_class_vectors(
        self, tuned: Tensor, weak_text: Tensor, strong_text: Tensor, anchor_texts: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Class vectors of the tuned weak model, moved to the strong model: unit rows (C, d_strong) by name.

        ``full = μ_s + s·Q (T - μ_w)`` and ``delta = A_strong + s·Q (T - A_weak)`` in embedding space. In logit space
        only ``delta``: the change is written over the anchors, ``T - A_weak = Bᵀ Ā_w``, and read as
        ``A_strong + (P B)ᵀ Ā_s`` with Ā the anchors minus their mean; what no name spans (`SPAN_TOLERANCE`) is lost.

        Args:
            tuned, weak_text, strong_text (`Tensor`): T and the zero-shot vectors A, each (C, d_weak) or (C, d_strong).
            anchor_texts (`Sequence[Tensor]`, *optional*): weak and strong anchor embeddings, for logit space.
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

    def carry_image_side(self, image_map: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """An image side that reads embeddings, A (d_weak, d_weak) and b (d_weak), on the strong model: ``Q A Qᵀ`` and
        ``Q b``. The change is made where the weak embedding would be; no mean of images is needed, which text lacks.

        Raises:
            ValueError: a logit-space bridge, or an image side that reads the vision tower, too.
        """
        if self.space == "logit":
            raise ValueError("an image side lives in embedding space: build the bridge with space='embedding'.")
        if image_map.shape[1] != self.matrix.shape[1]:
            raise ValueError("the adapter reads the vision tower, which no bridge carries: pass unlabelled images.")
        q = self.matrix.double()
        return (q @ image_map.double() @ q.T).float(), (q @ shift.double()).float()

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes one safetensors file, atomically.

        Raises:
            ValueError: what [`load`] would refuse.
            FileExistsError: `path` exists and `overwrite` is `False`.
        """
        if Path(path).exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another path or overwrite=True.")
        facts = {one.name: getattr(self, one.name) for one in fields(self)}
        tensors = {key: facts.pop(key) for key in BRIDGE_SHAPES}
        facts.update(strong=asdict(self.strong), weak=asdict(self.weak))
        facts["anchors"] = None if self.anchors is None else self.anchors.to_dict()
        write_bridge(path, tensors, facts, type(self).load)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Bridge:
        """Reads what [`save`] wrote.

        Raises:
            FileNotFoundError, ValueError: what [`read_bridge`] refuses, or a matrix that does not fit the anchors.
        """
        tensors, facts = read_bridge(path)
        size = tuple(tensors["matrix"].shape)
        if facts["anchors"] is not None:
            facts["anchors"] = Anchors.from_dict(facts["anchors"], f"anchors in {path}")
        facts.update(strong=ModelId(**facts["strong"]), weak=ModelId(**facts["weak"]))
        if facts["space"] == "logit" and set(size) != {len(facts["anchors"] or tensors["matrix"])}:
            raise ValueError(f"{path}: the matrix {size} does not fit the anchors.")
        return cls(**tensors, **{**facts, "through": tuple(facts.get("through", ()))})

    def save_pretrained(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """A folder ready for the Hub: `bridge.safetensors` and its card, `README.md`.

        Raises:
            FileExistsError: there is a bridge already and `overwrite` is `False`.
        """
        fill_folder(folder, lambda made: (self.save(made / BRIDGE, overwrite=overwrite), write_card(made)), reads=True)

    @classmethod
    def from_pretrained(cls, repo_or_path: str | os.PathLike, **hub) -> Bridge:
        """A bridge from the Hub (``id@revision`` too), a folder or a ``.safetensors`` file.

        Args:
            **hub: `revision`, `token`, `cache_dir`, `subfolder` and `local_files_only` as in transformers; not used
                for a file.

        Raises:
            OSError, ValueError: no bridge there, the Hub cannot be reached, or what [`load`] raises.
        """
        return cls.load(find_bridge(repo_or_path, **hub))

    def push_to_hub(self, repo_id: str, **options) -> CommitInfo:
        """Uploads what [`save_pretrained`] writes, in one commit; options are those of [`push`]."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / BRIDGE)
            return push(folder, repo_id, **options)
