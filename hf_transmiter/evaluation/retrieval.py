"""[`evaluate_bridge`]: what a bridge is worth to an index of embeddings that nobody wants to make again.

A picture's neighbours are those that the new model would find if all pictures were embedded again. Recall@k is the
share of its k nearest that are among the k nearest of the index at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.embeddings import embed_dataset
from ..encoders.dual_encoder import DualEncoder
from ..hub.scores import Score
from ..method.bridge import Bridge


KS = (1, 10)
MAX_QUERIES = 1000
OLD, INDEX, QUERIES = "old queries, old index", "new queries, translated index", "translated queries, old index"


def nearest(queries: Tensor, index: Tensor, k: int, own: Tensor | None = None) -> Tensor:
    """The k rows of `index` (N, d) with the largest dot product with each query (Q, d), nearest first: (Q, k).

    Args:
        own (`Tensor`, *optional*): (Q,) the row of the index that each query itself is; it is left out.
    """
    found = []
    for start in range(0, len(queries), 256):
        scores = queries[start : start + 256] @ index.T
        if own is not None:
            scores[torch.arange(len(scores)), own[start : start + 256]] = -torch.inf
        found.append(scores.topk(k, dim=1).indices)
    return torch.cat(found)


def recall(found: Tensor, expected: Tensor) -> float:
    """Percent of the expected neighbours (Q, k) that are among the found ones (Q, k)."""
    return 100 * float((found[:, :, None] == expected[:, None, :]).any(1).double().mean())


def recalls(
    bridge: Bridge, weak: Tensor, strong: Tensor, queries: Tensor | Sequence[int]
) -> dict[str, dict[int, float]]:
    """Recall@1 and @10 of each way to go on with an index of the weak model's rows, by name.

    Args:
        weak, strong (`Tensor`): unit rows of the same pictures (N, d_weak) and (N, d_strong).
        queries (`Tensor` or `Sequence[int]`): the pictures that ask, as rows; each is left out of its own answer.

    Raises:
        ValueError: not more pictures than neighbours are looked for, or what [`Bridge.translate`] raises.
    """
    if len(weak) <= max(KS):
        raise ValueError(f"recall@{max(KS)} needs more than {max(KS)} pictures, there are {len(weak)}.")
    own = torch.as_tensor(queries)
    ways = {
        OLD: (weak[own], weak),
        INDEX: (strong[own], bridge.translate(weak)),
        QUERIES: (bridge.translate_queries(strong[own]), weak),
    }
    best = nearest(strong[own], strong, max(KS), own)
    found = {}
    for name, (asked, index) in ways.items():
        rows = nearest(asked, index, max(KS), own)
        found[name] = {k: recall(rows[:, :k], best[:, :k]) for k in KS}
    return found


def evaluate_bridge(
    bridge: Bridge,
    weak: DualEncoder,
    strong: DualEncoder,
    dataset,
    *,
    split: str = "test",
    dataset_name: str | None = None,
    **embedding,
) -> list[Score]:
    """[`recalls`] on pictures, which should not be those that the bridge was built from: with them it flatters. What
    they mean says [`index_verdict`].

    At most `MAX_QUERIES` of them ask, spread evenly; all are in the index.

    Args:
        dataset (`datasets.Dataset`): pictures; labels are not read.
        split, dataset_name (`str`, *optional*): noted in the scores.
        **embedding: passed to `embed_dataset`.

    Raises:
        ValueError: a bridge of other models, or what [`recalls`] raises.
    """
    bridge.weak.check(weak, "weak")
    bridge.strong.check(strong, "strong")
    rows = [embed_dataset(model, dataset, **{**embedding, "labels": False}).embeds for model in (weak, strong)]
    asked = torch.linspace(0, len(dataset) - 1, min(len(dataset), MAX_QUERIES)).round().long()
    about = {"dataset": dataset_name, "num_images": len(dataset)}
    return [
        Score(name, split, f"recall@{k}", value, **about)
        for name, of in recalls(bridge, *rows, asked).items()
        for k, value in of.items()
    ]


def index_verdict(scores: Sequence[Score]) -> str:
    """Whether to translate the index, from what [`evaluate_bridge`] found: only differences count that are larger
    than twice their standard error, as if each query were one draw for all k, and as if ways did not share them."""
    found = {(score.method, score.metric): score.value for score in scores}
    asked, signs, said = min(scores[0].num_images, MAX_QUERIES), set(), []
    for k in KS:
        old, new = (found[way, f"recall@{k}"] for way in (OLD, INDEX))
        spread = ((old * (100 - old) + new * (100 - new)) / asked) ** 0.5
        signs |= {1 if new > old else -1} if abs(new - old) > 2 * spread else set()
        said.append(f"recall@{k} {new:.1f} % against {old:.1f} %")
    do = "No clear difference" if not signs else "It depends" if len(signs) > 1 else "Translate the index"
    do = "Keep the old model and its index" if signs == {-1} else do
    return (
        f"{do}: new queries on the translated index have {' and '.join(said)} of old queries on the old index "
        f"({asked} pictures asked)."
    )
