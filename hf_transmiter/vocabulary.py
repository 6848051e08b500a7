"""Name lists from which auxiliary anchors are drawn (arXiv 2508.08604 pads its logits with such names).

A vocabulary is a plain list of names. `"common-nouns"` is shipped with the library, `"imagenet-21k"` is read from an
installed timm, and any text file or Python list will do as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize


VOCABULARY_DIR = Path(__file__).parent / "assets" / "vocabulary"
SHIPPED_VOCABULARIES = ("common-nouns",)
TIMM_VOCABULARY = "imagenet-21k"
STRATEGIES = ("random", "farthest-point", "highest-spread", "spread-then-farthest", "all", "none")
NUM_ANCHORS = 1024
_TIMM_LEMMAS = Path("data", "_info", "imagenet_synset_to_lemma.txt")


def name_key(name: str) -> str:
    """Form under which two spellings of one name are equal: case, spaces, underscores and hyphens are ignored.

    ```python
    >>> name_key("Ice_Cream") == name_key("ice cream")
    True
    ```
    """
    return re.sub(r"[\s_\-]+", "", name.casefold())


def load_vocabulary(source: str | os.PathLike | Sequence[str]) -> list[str]:
    """Reads a list of names; later spellings of a name already seen (see [`name_key`]) are dropped, order is kept.

    Args:
        source (`str`, `os.PathLike` or `Sequence[str]`):
            `"common-nouns"` (shipped), `"imagenet-21k"` (the first WordNet lemma of each synset, read from an
            installed timm without importing it), the path of a UTF-8 text file (one name per line; blank lines and
            lines starting with `#` are skipped), or the names themselves.

    Returns:
        `list[str]`: the names, stripped of surrounding white space.

    Raises:
        FileNotFoundError: `source` is neither a known name nor a file, or timm is not installed.
        ValueError: no name is left.
        TypeError: a name is not a string.
    """
    if isinstance(source, (str, os.PathLike)):
        path = _vocabulary_path(source)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        if str(source) == TIMM_VOCABULARY:
            lines = [_first_lemma(line) for line in lines]
        names, where = [line for line in lines if not line.lstrip().startswith("#")], f"vocabulary file {path}"
    else:
        names, where = list(source), "vocabulary list"
    names = _distinct(names)
    if not names:
        raise ValueError(f"The {where} holds no name; give it at least one name (one per line in a file).")
    return names


def _vocabulary_path(source: str | os.PathLike) -> Path:
    if str(source) in SHIPPED_VOCABULARIES:
        return VOCABULARY_DIR / f"{source}.txt"
    if str(source) == TIMM_VOCABULARY:
        return _timm_lemma_path()
    path = Path(source)
    if not path.is_file():
        known = ", ".join(f'"{name}"' for name in (*SHIPPED_VOCABULARIES, TIMM_VOCABULARY))
        raise FileNotFoundError(
            f'No vocabulary "{source}": it is neither a known name ({known}) nor a text file. '
            "Pass one of these, the path of a file with one name per line, or a list of names."
        )
    return path


def _timm_lemma_path() -> Path:
    # `find_spec` locates a top-level package without running it: timm imports torchvision, which is not needed here.
    spec = importlib.util.find_spec("timm")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / _TIMM_LEMMAS
        if path.is_file():
            return path
    raise FileNotFoundError(
        f'The vocabulary "{TIMM_VOCABULARY}" is read from timm, which '
        + ("is not installed. " if spec is None else f"is installed but lacks {_TIMM_LEMMAS.as_posix()}. ")
        + 'Run `pip install -U timm` (`--no-deps` is enough), or use vocabulary="common-nouns".'
    )


def _first_lemma(line: str) -> str:
    _, _, lemmas = line.partition("\t")
    return lemmas.split(",")[0]


def _distinct(names: Iterable[str]) -> list[str]:
    kept = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"Vocabulary names must be strings, got {name!r} ({type(name).__name__}).")
        if name.strip():
            kept.setdefault(name_key(name), name.strip())
    return list(kept.values())


def universal_vocabulary(
    size: int = NUM_ANCHORS, seed: int = 0, vocabulary: str | os.PathLike | Sequence[str] = "common-nouns"
) -> tuple[str, ...]:
    """`size` names in an order that depends on nothing but the seed and the names themselves.

    A smaller universal vocabulary is the beginning of a larger one. The order is the same on every platform.

    Raises:
        ValueError: the vocabulary holds fewer than `size` names.
    """
    candidates = load_vocabulary(vocabulary)
    return tuple(candidates[i] for i in choose_auxiliary(candidates, size, "random", seed=seed))


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
    | `"none"` | no candidate; `count` is not used | |

    Ranking names by a hash makes the random choice the same on every platform, a smaller choice the beginning of a
    larger one, and the choices made for two tasks equal but for the names the tasks themselves hold.

    Args:
        candidates (`Sequence[str]`): n names.
        count (`int`): How many to choose.
        strategy (`str`, *optional*, defaults to `"random"`): A row of the table.
        seed (`int`, *optional*, defaults to 0): Names the random order.
        text_embeds (`torch.Tensor` of shape `(n, d)`, *optional*): Text embeddings of the candidates; only their
            direction matters.
        task_embeds (`torch.Tensor` of shape `(C, d)`, *optional*): Text embeddings of the task names. Without them
            farthest-point starts from the first candidate (of highest spread).
        logits (`torch.Tensor` of shape `(N, n)`, *optional*): Logits of N >= 2 images over the candidates.

    Raises:
        ValueError: unknown strategy, too few candidates, or an input that is missing, misshapen or not finite.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if strategy == "none":
        return []
    if strategy == "all":
        return list(range(len(candidates)))
    if count < 0:
        raise ValueError(f"The number of auxiliary names must not be negative, got {count}.")
    if count > len(candidates):
        raise ValueError(
            f"{count} auxiliary names are wanted but the vocabulary offers only {len(candidates)}. Use a larger "
            "vocabulary (such as 'imagenet-21k' or your own file), fewer anchors, or strategy='all'."
        )
    if strategy == "random":
        return _random_order(candidates, seed)[:count]

    n = len(candidates)
    pool = torch.arange(n)
    if strategy != "farthest-point":
        pool = _by_spread(_matrix(logits, "logits", strategy, (None, n)))
    if strategy == "highest-spread":
        return pool[:count].tolist()
    if strategy == "spread-then-farthest":
        pool = pool[: 2 * count]
    text_embeds = normalize(_matrix(text_embeds, "text_embeds", strategy, (n, None)), dim=-1)
    if task_embeds is not None:
        task_embeds = normalize(_matrix(task_embeds, "task_embeds", strategy, (None, text_embeds.shape[1])), dim=-1)
    return pool[_farthest_points(text_embeds[pool], task_embeds, count)].tolist()


def _by_spread(logits: torch.Tensor) -> torch.Tensor:
    if len(logits) < 2:
        raise ValueError(f"The spread of logits needs at least 2 images, got {len(logits)}.")
    # A stable sort keeps candidates of equal spread in vocabulary order.
    return logits.std(dim=0).sort(descending=True, stable=True).indices


def _random_order(names: Sequence[str], seed: int) -> list[int]:
    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{seed}\n{names[i]}".encode()).digest()

    return sorted(range(len(names)), key=rank)


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
