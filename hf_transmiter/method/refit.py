"""[`refit`]: fits a linear adapter of the strong model to soft labels on unlabelled images, in closed form.

Two parts, on feature rows ``f = [x | h]`` of unit embeddings and, where they are there, tower features:

- image side: ``x' = normalise(x + A f + b)`` with the class texts as they are, by functional gradient steps, each a
  ridge regression of ``E = (q - softmax(s x' Tᵀ)) (T - T̄)``, its length by a line search on held-out images;
- text side: a linear discriminant of the labels on f, blended with the image side's logits.

Measured in `tests/studies/RESULTS.md`, "The refit"; no paper has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..algebra import (
    PairSums,
    check_finite,
    discriminant,
    divergence,
    fit_temperature,
    spread,
    total,
)
from ..data.table import FeatureTable
from .experts import SoftLabels


STEPS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
ROUNDS = 3
PENALTY = 1.0  # of the ridge, in mean variances; more where there are fewer images than features
SAMPLE = 8192  # so many images, evenly spaced, are kept in memory
HELD_OUT = 5  # every so many-th of those is held out
HEAD_IMAGES = 10  # images per class at which the discriminant counts as much as the image side
MIN_IMAGES = 100  # with 50, a refit lost up to 5 points on real embeddings
COVERED = 0.75  # images of fewer teach a text side that the others are rare


@dataclass
class ImageSide:
    """``x' = normalise(x + A f + b)``: `matrix` A (d, m) and `shift` b (d), of rows f (N, m) that begin with x."""

    matrix: Tensor
    shift: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        change = rows[:, : self.matrix.shape[1]] @ self.matrix.T.to(rows.dtype) + self.shift.to(rows.dtype)
        return normalize(rows[:, : len(self.shift)] + change, dim=-1)

    def widened(self, width: int) -> ImageSide:
        """The same for rows that are wider."""
        more = self.matrix.new_zeros(len(self.matrix), width - self.matrix.shape[1])
        return ImageSide(torch.cat([self.matrix, more], 1), self.shift)

    @classmethod
    def identity(cls, d: int) -> ImageSide:
        return cls(torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))


def fewest_images(classes: int) -> int:
    """So many images does a refit take; fewer do harm: [`MIN_IMAGES`], or one per class where that is more."""
    return max(MIN_IMAGES, classes)


@dataclass
class _Problem:
    """Rows f, soft labels q, texts T and scale s, and what is kept of them in memory."""

    table: FeatureTable
    labels: SoftLabels | Tensor
    texts: Tensor
    scale: float
    start: ImageSide
    even: bool
    penalty: float
    accelerator: object

    def __post_init__(self):
        count = len(self.table)
        if count <= HELD_OUT:
            raise ValueError(f"a fit needs at least {HELD_OUT + 1} images, of which it holds some out, got {count}.")
        sample = torch.linspace(0, count - 1, min(count, SAMPLE)).round().long()
        self.rows, self.said = self.table.select(sample).embeds, self.labels[sample]
        held = torch.arange(len(sample)) % HELD_OUT == 0
        self.held_rows, self.held_said = self.rows[held], self.said[held]
        self.train = torch.ones(count, dtype=torch.bool).index_fill_(0, sample[held], False)
        self.width = self.rows.shape[1]
        blocks = (
            (check_finite(f, "the embeddings"), self.labels[rows]) for rows, f in self.table.share(self.accelerator)
        )
        self.sums = PairSums.of(blocks, self.width, len(self.texts), self.accelerator)
        held_sums = PairSums.of([(self.held_rows, self.held_said)], self.width, len(self.texts))
        self.train_sums = self.sums - held_sums

    def logits(self, side: ImageSide, rows: Tensor) -> Tensor:
        return self.scale * side(rows) @ self.texts.T

    def offset(self, side: ImageSide) -> Tensor | float:
        """What makes the predicted class frequencies those of the labels, where these are no even ones: it explains
        them in the place of the map, and is not kept."""
        if self.even:
            return 0.0
        z, wanted = self.logits(side, self.rows).double(), self.said.double().mean(0).clamp(min=1e-9)
        found = torch.zeros(len(wanted), dtype=torch.float64)
        for _ in range(30):
            found = found + (wanted.log() - (z + found).softmax(1).mean(0).log())
        return (found - found.mean()).float()

    def image_side(self, held_out: bool, steps: Sequence[float] = ()) -> tuple[ImageSide, list[float]]:
        """The map fitted to all images, or to those that are not held out with steps that suit the held-out ones."""
        sums = self.train_sums if held_out else self.sums
        scaled, mean, std = sums.standardised()
        penalty = max(self.penalty, self.width / sums.n) * torch.eye(self.width, dtype=torch.float64)
        factor = torch.linalg.cholesky(scaled.xx / sums.n + penalty)
        side, taken = self.start.widened(self.width), list(steps)
        side = ImageSide(side.matrix.double(), side.shift.double())
        directions = self.texts - self.texts.mean(0)
        for number in range(ROUNDS):
            offset = self.offset(side)
            moment = torch.zeros(self.width + 1, self.texts.shape[1], dtype=torch.float64)
            for rows, f in self.table.share(self.accelerator):
                used = self.train[rows] if held_out else slice(None)
                f, q = f[used], self.labels[rows][used]
                error = (q - (self.logits(side, f) + offset).softmax(1)) @ directions
                moment[:-1] += (((f - mean.float()) / std.float()).T @ error).double()
                moment[-1] += error.double().sum(0)
            moment = total(moment, self.accelerator) / sums.n
            matrix = (torch.cholesky_solve(moment[:-1], factor) / std[:, None]).T
            shift = moment[-1] - matrix @ mean

            def moved(step: float, side=side, matrix=matrix, shift=shift) -> ImageSide:
                return ImageSide(side.matrix + step * matrix, side.shift + step * shift)

            if len(taken) == number:
                losses = [
                    divergence(self.held_said, self.logits(moved(step), self.held_rows) + offset) for step in STEPS
                ]
                taken.append(STEPS[losses.index(min(losses))])
            side = moved(taken[number])
        return side, taken

    def head(self, held_out: bool) -> tuple[Tensor, Tensor]:
        """The discriminant of the labels: weight (C, m) and bias (C,) for rows as they are."""
        scaled, mean, std = (self.train_sums if held_out else self.sums).standardised()
        weight, bias = discriminant(scaled)
        weight = weight.double() / std
        return weight.float(), (bias.double() - weight @ mean).float()

    def joint(self, side: ImageSide | None, head: tuple[Tensor, Tensor] | None, share: float) -> tuple[Tensor, Tensor]:
        """Weight (C, d + m) of ``[x' | f]`` and bias (C,): `share` of the head and the rest of the image side, each in
        units of its spread."""
        texts, width = self.texts.double(), self.width
        known = torch.zeros(len(texts), texts.shape[1] + width, dtype=torch.float64)
        bias = torch.zeros(len(texts), dtype=torch.float64)
        if side is not None:
            known[:, : texts.shape[1]] = (1 - share) * self.scale * texts / spread(self.logits(side, self.rows))
        if head is not None:
            unit = spread(self.rows @ head[0].T + head[1])
            known[:, texts.shape[1] :], bias = share * head[0] / unit, share * head[1].double() / unit
        return known, bias


def fit_image_side(
    table: FeatureTable, labels: SoftLabels | Tensor, texts: Tensor, scale: float, penalty: float, accelerator=None
) -> ImageSide:
    """The image side alone, from the identity, to soft labels q (N, C) as they are; arguments as of [`refit`].

    Raises:
        ValueError: fewer than six images, or a value that is not finite.
    """
    problem = _Problem(table, labels, texts, scale, ImageSide.identity(texts.shape[1]), True, penalty, accelerator)
    _, steps = problem.image_side(held_out=True)
    side, _ = problem.image_side(held_out=False, steps=steps)
    return ImageSide(side.matrix.float(), side.shift.float())


def refit(
    table: FeatureTable,
    label_logits: Tensor,
    texts: Tensor,
    scale: float,
    *,
    zero_shot: Tensor | None = None,
    start: ImageSide | None = None,
    image: bool = True,
    text: bool = True,
    even: bool | None = None,
    accelerator=None,
) -> tuple[ImageSide | None, tuple[Tensor, Tensor] | None, dict]:
    """The two parts that fit soft labels ``q = softmax(L)`` best, and what is known of them without labels.

    Args:
        table (`FeatureTable`): N rows f (m), which begin with the unit embeddings x (d).
        label_logits (`Tensor`): L (N, C), see [`expert_logits`].
        texts (`Tensor`): T (C, d) unit class vectors that the image side is fitted to, the carried ones or zero-shot.
        scale (`float`): s of the strong model.
        zero_shot (`Tensor`, *optional*): (C, d) the strong model's own class vectors, if those are others.
        start ([`ImageSide`], *optional*): where the image side starts, such as the carried one; the identity if omitted.
        image, text (`bool`, *optional*, default to `True`): which parts to fit.
        even (`bool`, *optional*):
            Whether the images hold the classes about equally often; by their [`coverage`] when omitted. If so, the
            labels are made even ([`class_pull`]). If not, the images' class frequencies are explained by an offset
            that is not kept, and there is no text side, which would not know the classes that are missing.
        accelerator: as in [`embed_dataset`]; all processes end with the same.

    Returns:
        The image side or `None`; class vectors and bias of the text side or `None`: (C, d + m) of ``[x' | f]`` beside
        an image side, (C, m) alone, both for logits of scale s and with the temperature that fits q on held-out
        images; and facts: `coverage`, `even`, `steps`, `held_out_kl` of q and the parts fitted to the other images,
        `held_out_kl_zero_shot` at the best temperature, `held_out_agreement` in percent.

    Raises:
        ValueError: fewer than [`fewest_images`], labels of other images, or a value that is not finite.
    """  # noqa: E501
    fewest = fewest_images(len(texts))
    if len(table) < fewest:
        raise ValueError(f"a refit needs at least {fewest} images, got {len(table)}: pass more, or leave it out.")
    if label_logits.shape != (len(table), len(texts)):
        raise ValueError(f"label logits must be {(len(table), len(texts))}, got {tuple(label_logits.shape)}.")
    check_finite(label_logits, "the label logits")
    labels = SoftLabels(label_logits, even)
    text = not image or (text and labels.even and (even is not None or labels.coverage >= COVERED))
    start = start or ImageSide.identity(texts.shape[1])
    problem = _Problem(table, labels, texts, scale, start, labels.even, PENALTY, accelerator)
    share = 0.0 if not text else 1.0 if not image else len(table) / (len(table) + HEAD_IMAGES * len(texts))

    def fitted(held_out: bool, steps: Sequence[float] = ()):
        side, steps = problem.image_side(held_out, steps) if image else (None, [])
        return side, problem.joint(side, problem.head(held_out) if text else None, share), steps

    def answer(side: ImageSide | None, joint: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        x = problem.start(rows) if side is None else side(rows)
        return torch.cat([x, rows], 1).double() @ joint[0].T + joint[1]

    trial, joint, steps = fitted(held_out=True)
    said = answer(trial, joint, problem.held_rows) if text else problem.logits(trial, problem.held_rows)
    factor = fit_temperature(said, problem.held_said) if text else 1.0
    own = scale * problem.held_rows[:, : texts.shape[1]] @ (texts if zero_shot is None else zero_shot).T
    facts = {
        "coverage": labels.coverage,
        "even": labels.even,
        "steps": steps,
        "held_out_kl": divergence(problem.held_said, factor * said),
        "held_out_kl_zero_shot": divergence(problem.held_said, fit_temperature(own, problem.held_said) * own),
        "held_out_agreement": 100 * float((said.argmax(1) == problem.held_said.argmax(1)).double().mean()),
    }
    side, joint, _ = fitted(held_out=False, steps=steps)
    side = None if side is None else ImageSide(side.matrix.float(), side.shift.float())
    if not text:
        return side, None, facts
    weight, bias = (factor * part for part in joint)
    weight = (weight if image else weight[:, texts.shape[1] :]) / scale
    return side, (weight.float(), bias.float()), facts
