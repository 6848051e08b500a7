"""Name lists from which auxiliary anchors are drawn (arXiv 2508.08604 pads its logits with such names).

A vocabulary is a plain list of names. `"common-nouns"` is shipped with the library; any text file or Python list will
do as well.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from ..hub.checks import read_text
from ..settings import check_number


COMMON_NOUNS = "common-nouns"
STRATEGIES = ("random", "farthest-point", "highest-spread", "spread-then-farthest", "all")
NUM_ANCHORS = 1024
_SHIPPED = Path(__file__).parents[1] / "assets" / "vocabulary" / f"{COMMON_NOUNS}.txt"


def name_key(name: str) -> str:
    """Form under which two spellings of one name (``"Ice_Cream"``, ``"ice cream"``) are equal."""
    return re.sub(r"[\s_\-]+", "", name.casefold())


def load_vocabulary(source: str | os.PathLike | Sequence[str]) -> list[str]:
    """Names without surrounding white space, in order; later spellings of one (see [`name_key`]) are dropped.

    `source` is `"common-nouns"` (shipped), the path of a UTF-8 text file (one name per line; blank lines and lines
    starting with `#` are skipped), or the names themselves.

    Raises:
        FileNotFoundError: `source` is neither the shipped list nor a file.
        ValueError: no name is left.
        TypeError: a name is not a string.
    """
    if isinstance(source, (str, os.PathLike)):
        path = _SHIPPED if str(source) == COMMON_NOUNS else Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f'No vocabulary "{source}": it is neither "{COMMON_NOUNS}" nor a text file; pass that, the path of a '
                "file with one name per line, or a list of names."
            )
        lines = read_text(path).splitlines()
        names, where = [line for line in lines if not line.lstrip().startswith("#")], f"vocabulary file {path}"
    else:
        names, where = list(source), "vocabulary list"
    kept = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"Vocabulary names must be strings, got {name!r} ({type(name).__name__}).")
        if name.strip():
            kept.setdefault(name_key(name), name.strip())
    if not kept:
        raise ValueError(f"The {where} holds no name; give it at least one name (one per line in a file).")
    return list(kept.values())


def universal_vocabulary(size: int = NUM_ANCHORS) -> tuple[str, ...]:
    """`size` common nouns in an order that depends on nothing but the names themselves.

    A smaller universal vocabulary is the beginning of a larger one. The order is the same on every platform.

    Raises:
        ValueError: there are fewer than `size` common nouns.
    """
    candidates = load_vocabulary(COMMON_NOUNS)
    return tuple(candidates[i] for i in choose_auxiliary(candidates, size))


def choose_auxiliary(
    candidates: Sequence[str],
    count: int,
    strategy: str = "random",
    *,
    seed: int = 0,
    text_embeds: torch.Tensor | None = None,
    task_embeds: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> list[int]:
    """Indices of `count` candidates, in the order in which they were chosen.

    | strategy | rule | needs |
    |---|---|---|
    | `"random"` | the `count` smallest values of SHA-256(seed, name) | |
    | `"farthest-point"` | repeated `argmax_i min_{j chosen} 1 - cos(t_i, t_j)`, from the task on | `text_embeds` |
    | `"highest-spread"` | largest std over the images of the candidate's logit | `logits` |
    | `"spread-then-farthest"` | farthest-point among the `2 * count` of highest spread | both |
    | `"all"` | every candidate, in order; `count` is not used | |

    Ranking names by a hash makes the random choice the same on every platform, a smaller choice the beginning of a
    larger one, and the choices made for two tasks equal but for the names the tasks themselves hold.

    Args:
        candidates (`Sequence[str]`), count (`int`), strategy (`str`): n names, how many to choose, a row of the table.
        seed (`int`, *optional*, defaults to 0): names the random order.
        text_embeds (`Tensor`, *optional*): (n, d) text embeddings of the candidates; only their direction matters.
        task_embeds (`Tensor`, *optional*): (C, d) those of the task names. Without them farthest-point starts from the
            first candidate (of highest spread).
        logits (`Tensor`, *optional*): (N, n) logits of N >= 2 images over the candidates.

    Raises:
        ValueError: unknown strategy, too few candidates, or an input that is missing, misshapen or not finite.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if strategy == "all":
        return list(range(len(candidates)))
    count = check_number("the number of auxiliary names", count, least=0)
    if count > len(candidates):
        raise ValueError(
            f"{count} auxiliary names are wanted but the vocabulary offers only {len(candidates)}. Use a larger "
            "vocabulary (a file of your own), fewer anchors, or strategy='all'."
        )
    if strategy == "random":
        ranks = [hashlib.sha256(f"{seed}\n{name}".encode()).digest() for name in candidates]
        return sorted(range(len(candidates)), key=ranks.__getitem__)[:count]

    n = len(candidates)
    pool = torch.arange(n)
    if strategy != "farthest-point":
        logits = _matrix(logits, "logits", strategy, (None, n))
        if len(logits) < 2:
            raise ValueError(f"The spread of logits needs at least 2 images, got {len(logits)}.")
        # A stable sort keeps candidates of equal spread in vocabulary order.
        pool = logits.std(dim=0).sort(descending=True, stable=True).indices
    if strategy == "highest-spread":
        return pool[:count].tolist()
    if strategy == "spread-then-farthest":
        pool = pool[: 2 * count]
    text_embeds = normalize(_matrix(text_embeds, "text_embeds", strategy, (n, None)), dim=-1)
    if task_embeds is not None:
        task_embeds = normalize(_matrix(task_embeds, "task_embeds", strategy, (None, text_embeds.shape[1])), dim=-1)
    return pool[_farthest_points(text_embeds[pool], task_embeds, count)].tolist()


def _farthest_points(points: torch.Tensor, started: torch.Tensor | None, count: int) -> list[int]:
    """Greedy k-centre: (n, d) points, (C, d) points to start from -> `count` indices. Ties go to the first."""
    nearest = points.new_full((len(points),), torch.inf)
    if started is not None and len(started):
        nearest = (1 - points @ started.T).amin(dim=1)
    chosen = []
    for _ in range(count):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, 1 - points @ points[chosen[-1]])
        # Rounding may leave a point a little way from itself; a chosen one must never be taken again.
        nearest[chosen[-1]] = -torch.inf
    return chosen


def _matrix(
    values: torch.Tensor | None, name: str, strategy: str, shape: tuple[int | None, int | None]
) -> torch.Tensor:
    wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if values is None:
        raise ValueError(
            f"strategy={strategy!r} needs {name}, a tensor of shape {wanted} (see choose_auxiliary; to Anchors.build "
            f"pass {'logits' if name == 'logits' else 'embeds'}=...). Use strategy='random' if there is none."
        )
    values = torch.as_tensor(values).detach().float().cpu()
    if values.ndim != 2 or any(size not in (None, got) for size, got in zip(shape, values.shape, strict=True)):
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(values.shape)}.")
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values; look at the model or images they come from.")
    return values
