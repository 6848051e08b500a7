"""[`Evidence`]: what can be known of an upgrade without labels; [`recommend`], what to take; [`paired_gain`]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..method.refit import MIN_IMAGES
from .methods import FROM_TEXT, IMAGE_MAP, STRONG


NOTHING_LEARNT = 0.02  # share of changed predictions
AT_CHANCE = 0.15  # kappa with the zero-shot strong model
VISIBLE_GAIN = 0.02  # two points


def kappa(a: Tensor, b: Tensor, classes: int) -> float:
    """Cohen's κ (1960) of two sets of predictions (N,): ``(p - e) / (1 - e)``, p how often they agree and e how often
    independent ones with the same class frequencies would. 1 where they always do, 0 by chance."""
    first, second = (torch.bincount(one, minlength=classes) / len(one) for one in (a, b))
    chance = float(first @ second)
    agreed = float((a == b).double().mean())
    return 1.0 if chance == 1 else (agreed - chance) / (1 - chance)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What three models say of the same images, without their labels.

    Args:
        tuned, weak, strong (`Tensor`): logits (N, C) of the tuned weak model and of both zero-shot ones.
    """

    tuned: Tensor
    weak: Tensor
    strong: Tensor

    @cached_property
    def facts(self) -> dict[str, float]:
        """`changed`: percent of the weak model's predictions that the tuning changed; `kappa_weak`, `kappa_strong`: of
        the tuned model with either zero-shot model, see [`kappa`].

        Whether the tuning raised its agreement with the strong model is not among them, since that tells nothing: on
        the sandbox's neon it fell, and the refit gained 30 points.
        """
        tuned, weak, strong = (logits.argmax(1) for logits in (self.tuned, self.weak, self.strong))
        classes = self.tuned.shape[1]
        return {
            "changed": 100 * float((tuned != weak).double().mean()),
            "kappa_weak": kappa(tuned, weak, classes),
            "kappa_strong": kappa(tuned, strong, classes),
        }

    def of(self, upgraded: Tensor) -> dict[str, float]:
        """Of an upgrade's logits (N, C), in percent: how often it agrees with the tuned model, and how many of the
        zero-shot strong model's predictions it changes."""
        said = upgraded.argmax(1)
        agreed, changed = (said == self.tuned.argmax(1)), (said != self.strong.argmax(1))
        return {name: 100 * float(of.double().mean()) for name, of in (("agreement", agreed), ("changes", changed))}

    @property
    def doubt(self) -> str | None:
        """Why there is nothing to carry over, as far as predictions tell; `None` where there is.

        A tuned model is taken for one at chance where it hardly agrees with the zero-shot *strong* one: trained on
        shuffled labels it still agrees with the weak model that it was tuned from (kappa up to 0.28). Measured with
        the strong one on the sandbox and on photographs (`tests/studies/verdicts.py`): 0.22 to 0.52 after right
        labels, at most 0.13 after shuffled ones, where a refit lost up to 29 points. A prompt that could not learn
        inverted photographs has 0.07 and 0.12, too; there a refit gained 3 points all the same, mostly by
        self-training.
        """
        facts = self.facts
        if facts["changed"] < 100 * NOTHING_LEARNT:
            return (
                f"the tuning changed {facts['changed']:.1f} % of the weak model's predictions, so there is nothing to "
                "carry over."
            )
        if facts["kappa_strong"] < AT_CHANCE:
            return (
                "the tuned model may know nothing of these pictures: it agrees with the zero-shot strong model hardly "
                f"more than independent answers would (kappa {facts['kappa_strong']:.2f}; with the zero-shot weak one "
                f"{facts['kappa_weak']:.2f}). Check the labels it was tuned on and the order of its class names; if "
                "it is the strong model that knows nothing of them, only labelled pictures can tell."
            )
        return None


def recommend(
    evidence: Evidence | None,
    *,
    own_class_vectors: bool,
    unlabelled: int,
    general: bool,
    fewest: int = MIN_IMAGES,
    unseen: bool = False,
    bridge: bool = False,
    doubt: str | None = None,
) -> tuple[str, str]:
    """The way to upgrade to take, before labels are read, and why.

    Args:
        evidence: what predictions tell; `None` where labelled test images will tell more.
        own_class_vectors: whether prompts or class vectors were tuned, and not the image tower.
        unlabelled: how many unlabelled images of the task there are.
        general: whether there are other images.
        fewest: how many images a refit takes, see [`fewest_images`].
        unseen: whether the tuning saw only some of the classes.
        bridge: whether there is a finished bridge from images.
        doubt: what speaks against a bridge from text, see [`Bridge.doubt`].
    """
    if evidence is not None and evidence.doubt is not None:
        return STRONG, evidence.doubt
    if unlabelled >= fewest and unseen:
        return IMAGE_MAP, (
            "the tuning saw only some of the classes: the image map changes what pictures look like for all of them, "
            "while a text side for the seen ones would take accuracy from the others."
        )
    if unlabelled >= fewest:
        tuned = "prompts or class vectors were" if own_class_vectors else "the image tower was"
        return "refit", (
            f"{tuned} tuned and there are unlabelled task images: the refit joins the tuned model and the strong "
            "model's own knowledge, and costs nothing at run time."
        )
    if unlabelled:
        return "bridge from task images", (
            f"{unlabelled} task images are too few for a refit, which takes {fewest}: they build the bridge that "
            "carries the change."
        )
    if not own_class_vectors:
        return STRONG, "there is no task image to learn the change from: pass unlabelled task images."
    if bridge or general:
        method, source = ("given bridge", "images") if bridge else ("bridge from general images", "general images")
    elif doubt is not None and evidence is not None:
        return STRONG, doubt
    else:
        method, source = FROM_TEXT, "text"
    return method, (
        f"there is no task image: a bridge from {source} carries the class vectors; a few hundred unlabelled task "
        "images would allow the refit, which is mostly better."
    )


def paired_gain(better: Tensor, worse: Tensor, labels: Tensor) -> tuple[float, float]:
    """How much more accurate one set of logits (N, C) is than another, in points, and the standard error of that.

    ``g = (b - c) / N`` and ``se = √((b + c - N g²) / (N (N - 1)))``, b and c the images where only the one and only
    the other is right (the pairs of McNemar's test, 1947).
    """
    hits = (better.argmax(1) == labels).double() - (worse.argmax(1) == labels).double()
    error = float(hits.std(correction=min(1, len(hits) - 1))) / len(hits) ** 0.5
    return 100 * float(hits.mean()), 100 * error
