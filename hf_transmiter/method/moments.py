"""[`CrossMoment`]: sums over paired rows of two models, all that a bridge is solved and judged from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra import PairSums, check_finite, polar, standardise
from ..data.anchors import Anchors
from ..data.embeddings import embed_dataset
from ..encoders.dual_encoder import DualEncoder


RANK_TOLERANCE = 1e-3  # directions with less evidence than this share of the best are dropped (embedding space)
MIN_HELD_OUT = 10  # pairs; fewer do not tell what a bridge is worth
HELD_OUT = 10  # every so many-th pair tells what a bridge from the others is worth


@dataclass
class CrossMoment(PairSums):
    """``X = Σ x yᵀ`` (`xy`) over paired rows x of the strong model (m) and y of the weak (k), with the sums that
    centring and scaling need.

    It depends on the pair of models (and the anchors, in logit space), not on an adapter.
    """

    yy: Tensor

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds paired rows: strong (B, m) and weak (B, k).

        Raises:
            ValueError: different numbers of rows, or a value that is not finite.
        """
        if len(x) != len(y):
            raise ValueError(f"rows must come in pairs, got {len(x)} of the strong and {len(y)} of the weak.")
        y = check_finite(y, "weak rows").double()
        super().update(check_finite(x, "strong rows"), y)
        self.yy += y.T @ y

    def centred(self) -> CrossMoment:
        """The same moment of the rows minus their means; `x` and `y` become those means."""
        if self.n < 2:
            raise ValueError(f"a bridge needs at least two pairs, got {int(self.n)}: pass more images or names.")
        means = {"x": self.x / self.n, "y": self.y / self.n}
        products = {
            pair: getattr(self, pair) - self.n * torch.outer(means[pair[0]], means[pair[1]])
            for pair in ("xx", "xy", "yy")
        }
        return CrossMoment(self.n, **means, **products)

    def in_space(self, space: str) -> CrossMoment:
        """The moment that a map is judged by: in `"embedding"` space the [`centred`] one."""
        return self.centred() if space == "embedding" else self

    def solve(
        self, space: str, beta: float = 0.0, joined: Sequence[tuple[float, CrossMoment]] = ()
    ) -> tuple[Tensor, CrossMoment]:
        """The best orthogonal map, and the moment it is judged by.

        Args:
            space (`str`):
                `"logit"`: ``polar(X + βI)``, orthogonal, and this moment. `"embedding"`: ``polar(X)`` of the centred
                rows, zero on directions with less evidence than `RANK_TOLERANCE`, and the centred moment.
            beta (`float`, *optional*, defaults to 0.0): β; infinite is the limit, the identity.
            joined (*optional*):
                Weights w and moments Y of other pairs, of names, say, that join in embedding space:
                ``polar(X / ‖X‖ + Σ w Y / ‖Y‖)``. Where images are few, names know more.

        Raises:
            ValueError: β is negative or no number.
        """
        fit = self.in_space(space)
        if space == "embedding":
            moments = [(1.0, fit.xy), *((weight, other.centred().xy) for weight, other in joined)]
            moment = sum(weight * one / one.norm().clamp(min=1e-12) for weight, one in moments)
            return polar(moment, RANK_TOLERANCE), fit
        if not beta >= 0:
            raise ValueError(f"beta must be 0 or more, or infinite for no basis change; got {beta}.")
        identity = torch.eye(len(fit.xy), dtype=torch.float64)
        return (identity if math.isinf(beta) else polar(fit.xy + beta * identity)), fit

    def kept(self, held_out: CrossMoment, space: str, beta: float = 0.0) -> float | None:
        """The [`alignment`] that a map from the pairs without `held_out` has on those; `None` if they are too few."""
        if held_out.n < MIN_HELD_OUT:
            return None
        return held_out.in_space(space).alignment((self - held_out).solve(space, beta)[0])

    def alignment(self, matrix: Tensor) -> float:
        """``Σ ⟨x_strong, Q x_weak⟩ / √(Σ ‖x_strong‖² · Σ ‖x_weak‖²)``, the correlation of mapped and actual rows.

        1 where Q (m, k) maps every row to its partner (up to one factor), 0 for unrelated rows. A direction that Q
        drops counts as missed. It says the same of Q and of Qᵀ the other way round.
        """
        size = float(self.xx.trace() * self.yy.trace()) ** 0.5
        return float((matrix.double() * self.xy).sum()) / max(size, 1e-12)


def image_pairs(
    weak: DualEncoder, strong: DualEncoder, tables: Sequence, texts: Sequence[Tensor] | None, accelerator=None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Paired rows (strong, weak) of two feature tables of the same images, in blocks.

    Embeddings, or with `texts` (weak and strong, (K, d)) standardised logits over them. Processes take every other
    block.
    """
    for (_, x_weak), (_, x_strong) in zip(*(table.share(accelerator) for table in tables), strict=True):
        if texts is not None:
            x_weak = standardise(weak.logit_scale.cpu() * x_weak @ texts[0].T)[0]
            x_strong = standardise(strong.logit_scale.cpu() * x_strong @ texts[1].T)[0]
        yield x_strong, x_weak


def logit_span(texts: Sequence[Tensor]) -> Tensor | None:
    """Orthonormal columns F (K, q) that span all standardised logits of both models over K anchors, ``z = z F Fᵀ``.

    ``z = s (x / std) Āᵀ`` with Ā (K, d) the anchors' embeddings minus their mean, so q = d_weak + d_strong suffice.
    In these coordinates a moment is (q, q), and on what F does not reach ``polar(X + βI)`` is the identity.

    Args:
        texts (`Sequence[Tensor]`): the anchors' embeddings (K, d) of each model.

    Returns:
        float64, or `None` where K is not larger than q: nothing would be gained.
    """
    centred = torch.cat([(text - text.mean(0)).double() for text in texts], dim=1)
    return torch.linalg.qr(centred).Q if len(centred) > centred.shape[1] else None


def widen(matrix: Tensor, span: Tensor) -> Tensor:
    """``P = I + F (p - I) Fᵀ`` (K, K) of a map p (q, q) in the coordinates F of [`logit_span`]."""
    found = span @ (matrix - torch.eye(len(matrix), dtype=matrix.dtype)) @ span.T
    found.diagonal().add_(1.0)
    return found


def sum_pairs(
    pairs: Iterable[tuple[Tensor, Tensor]], strong_width: int, weak_width: int, accelerator=None
) -> tuple[CrossMoment, CrossMoment]:
    """The cross moments of all pairs, and of every tenth of them (`HELD_OUT`), added up over processes. `pairs` are
    blocks of strong (B, m) and weak (B, k) rows; with an `accelerator`, those of this process."""
    total, part = (CrossMoment.zeros(strong_width, weak_width) for _ in range(2))
    for strong, weak in pairs:
        total.update(strong, weak)
        part.update(strong[::HELD_OUT], weak[::HELD_OUT])
    return total.reduce(accelerator), part.reduce(accelerator)


def sum_dataset(
    weak: DualEncoder, strong: DualEncoder, dataset, space: str, anchors: Anchors, *, accelerator=None, **embedding
) -> tuple[CrossMoment, CrossMoment, Tensor | None]:
    """[`sum_pairs`] of two models on images, or on the anchors' names where `dataset` is `None`: of embeddings, or in
    `"logit"` space of standardised logits over the anchors, there in the coordinates of [`logit_span`], the third
    thing returned, if that is not `None`. `embedding` is passed to `embed_dataset`.

    Raises:
        TypeError: a keyword that `embed_dataset` does not have, without images too.
    """
    inspect.signature(embed_dataset).bind(weak, dataset, accelerator=accelerator, **embedding)
    texts, span, widths = None, None, (strong.embed_dim, weak.embed_dim)
    if space == "logit" or dataset is None:
        texts = [model.embed_names(anchors.names, anchors.templates).cpu() for model in (weak, strong)]
    if dataset is None:
        return *sum_pairs([(texts[1], texts[0])], *widths), None
    options = {"accelerator": accelerator, **embedding, "labels": False}
    tables = [embed_dataset(model, dataset, **options) for model in (weak, strong)]
    pairs = image_pairs(weak, strong, tables, texts, accelerator)
    if space == "logit":
        span = logit_span(texts)
        widths = (len(anchors) if span is None else span.shape[1],) * 2
    if span is not None:
        pairs = ((x.double() @ span, y.double() @ span) for x, y in pairs)
    return *sum_pairs(pairs, *widths, accelerator), span
