"""The K names every model answers about: task names first, then auxiliary names that only widen the logit vector.

Anchors are compared by fingerprint wherever two models, an adapter and a bridge have to agree on them
(arXiv 2508.08604 uses 1024 names in all, the same ones for every model).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from ..hub.checks import as_list, check_json, load_json
from ..hub.files import replace_file
from ..hub.rules import MOST_CHARACTERS, MOST_NAMES, MOST_TEMPLATES
from ..settings import check_number
from .class_names import listed
from .vocabulary import NUM_ANCHORS, choose_auxiliary, load_vocabulary, name_key, universal_vocabulary


_TEMPLATES_FILE = Path(__file__).parents[1] / "assets" / "templates.json"
TEMPLATES: dict[str, tuple[str, ...]] = {
    name: tuple(row["templates"]) for name, row in json.loads(_TEMPLATES_FILE.read_text(encoding="utf-8")).items()
}
DEFAULT_TEMPLATES = TEMPLATES["default"]
PROMPTED = ("{}.",)  # template of class vectors whose context is learnt


@dataclass(frozen=True)
class Anchors:
    """K = C + A ordered names and the templates they are written into. Immutable; lists are turned into tuples.

    Args:
        task: the C names of the task, in label order. May be empty only if `auxiliary` is not: such universal anchors
            serve bridges that know no task.
        auxiliary: the A names that only widen the logit vector.
        templates: phrases with one `{}` each, for the name. With several, embeddings are averaged over the templates.

    Raises:
        ValueError: no name at all, an empty name, duplicates (compared exactly), no template, a template without
            exactly one `{}`, a text of more than 1,000 characters, or more of them than can be saved.
        TypeError: a name or template is not a string, or a bare string is given where a list is wanted.
    """

    made_from: ClassVar = {(str, list, tuple): "make some of your class names, Anchors(('cat', 'dog'))"}

    task: tuple[str, ...]
    auxiliary: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, _strings(getattr(self, field.name), field.name))
        if not self.names:
            raise ValueError("Anchors need at least one name: pass the task's class names, auxiliary names or both.")
        duplicates = [repr(name) for name, count in Counter(self.names).items() if count > 1]
        if duplicates:
            raise ValueError(
                f"Anchor names must differ, but these occur more than once: {listed(duplicates)}. "
                "Rename or remove them; every column of the logits needs its own name."
            )
        if not self.templates:
            raise ValueError(f"Anchors need at least one template, such as {DEFAULT_TEMPLATES[0]!r}.")
        for template in self.templates:
            rest = template.replace("{}", "", 1)
            if rest == template or "{" in rest or "}" in rest:
                raise ValueError(f"A template needs exactly one {{}} for the name, got {template!r}.")

    @property
    def names(self) -> tuple[str, ...]:
        """All K names, task first: column k of the logits belongs to `names[k]`."""
        return self.task + self.auxiliary

    @property
    def num_task(self) -> int:
        """C, the number of task names."""
        return len(self.task)

    @property
    def num_anchors(self) -> int:
        """K = C + A, the number of all names."""
        return len(self.task) + len(self.auxiliary)

    def __len__(self) -> int:
        return self.num_anchors

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the canonical JSON of the ordered names, C and the templates."""
        content = {"names": self.names, "num_task": self.num_task, "templates": self.templates}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def check_same(self, other: Anchors) -> None:
        """Makes sure that column k means the same in both.

        Raises:
            ValueError: names, their order, the number of task names or the templates differ; the message says which.
        """
        if self.fingerprint == other.fingerprint:
            return
        here, there = set(self.names), set(other.names)
        only_here = [repr(name) for name in self.names if name not in there]
        only_there = [repr(name) for name in other.names if name not in here]
        differences = []
        if only_here:
            differences.append(f"{len(only_here)} names only in the first: {listed(only_here)}")
        if only_there:
            differences.append(f"{len(only_there)} names only in the second: {listed(only_there)}")
        if not differences and self.names != other.names:
            k = next(k for k, pair in enumerate(zip(self.names, other.names, strict=True)) if pair[0] != pair[1])
            differences.append(
                f"the same names in another order, first at position {k}: {self.names[k]!r} / {other.names[k]!r}"
            )
        if self.num_task != other.num_task:
            differences.append(f"{self.num_task} / {other.num_task} of the names are task names")
        if self.templates != other.templates:
            differences.append(f"templates {list(self.templates)} / {list(other.templates)}")
        raise ValueError("The two sets of anchors differ: " + "; ".join(differences) + ".")

    def to_dict(self) -> dict[str, list[str]]:
        """`{"task": [...], "auxiliary": [...], "templates": [...]}`, ready for JSON."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, content: dict, where: str = "the description of anchors") -> Anchors:
        """Inverse of [`~Anchors.to_dict`]. `where` is what an error calls it.

        Raises:
            ValueError: a key is missing or unknown, a value is of another kind, or what [`Anchors`] itself refuses.
        """
        return cls(**check_json(content, "anchors", where))

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes [`~Anchors.to_dict`] as JSON, atomically. Saving equal anchors over themselves is no overwriting.

        Raises:
            FileExistsError: `path` holds something else and `overwrite` is `False`.
        """
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if path.exists() and not overwrite:
            if path.read_text(encoding="utf-8") == text:
                return
            raise FileExistsError(f"{path} exists and holds something else; choose another path or overwrite=True.")
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), type(self).load)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Anchors:
        """Reads what [`~Anchors.save`] wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not JSON, too large, or not a description of anchors.
        """
        return cls.from_dict(load_json(path), os.fspath(path))

    @classmethod
    def build(
        cls,
        task: Sequence[str],
        *,
        vocabulary: str | os.PathLike | Sequence[str] = "common-nouns",
        strategy: str = "random",
        num_anchors: int = NUM_ANCHORS,
        seed: int = 0,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        embeds: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> Anchors:
        """C task names widened with auxiliary names from a vocabulary.

        A strategy that reads embeddings or logits takes them for the *pool*, that is for
        `Anchors.build(task, vocabulary=vocabulary, strategy="all").names`, in that order:

        ```python
        >>> pool = Anchors.build(["cat", "dog"], strategy="all")
        >>> embeds = torch.nn.functional.normalize(torch.randn(len(pool), 16), dim=-1)  # any model's text embeddings
        >>> anchors = Anchors.build(["cat", "dog"], strategy="farthest-point", num_anchors=100, embeds=embeds)
        ```

        Args:
            task, templates (`Sequence[str]`): as in [`Anchors`].
            vocabulary (`str`, `os.PathLike` or `Sequence[str]`, *optional*, defaults to `"common-nouns"`):
                As in [`load_vocabulary`]. Names that equal a task name up to case, spaces, underscores and hyphens are
                left out.
            strategy (`str`), seed (`int`): as in [`choose_auxiliary`]; `"random"` is the published choice.
            num_anchors (`int`, *optional*, defaults to 1024): K, task names included. Not used by `"all"`.
            embeds (`torch.Tensor`, *optional*): (pool size, d) text embeddings of the pool.
            logits (`torch.Tensor`, *optional*): (N, pool size) logits of the N unlabelled images over the pool.

        Raises:
            ValueError: more task names than `num_anchors`, a vocabulary too small for it, or what
                [`choose_auxiliary`] and [`Anchors`] refuse.
        """
        task, num_anchors = _strings(task, "task"), check_number("num_anchors", num_anchors, least=1)
        taken = {name_key(name) for name in task}
        candidates = [name for name in load_vocabulary(vocabulary) if name_key(name) not in taken]
        if strategy != "all" and num_anchors < len(task):
            said = f"{len(task)} task names do not fit into num_anchors={num_anchors}"
            raise ValueError(f"{said}; raise num_anchors to at least {len(task)}.")
        pool = len(task) + len(candidates)
        embeds = _pool_tensor(embeds, "embeds", axis=0, pool=pool)
        logits = _pool_tensor(logits, "logits", axis=1, pool=pool)
        chosen = choose_auxiliary(
            candidates,
            num_anchors - len(task),
            strategy,
            seed=seed,
            text_embeds=None if embeds is None else embeds[len(task) :],
            task_embeds=None if embeds is None else embeds[: len(task)],
            logits=None if logits is None else logits[:, len(task) :],
        )
        return cls(task, [candidates[i] for i in chosen], templates)

    @classmethod
    def universal(cls) -> Anchors:
        """Anchors without a task, the same for everyone: what bridges between models are built on."""
        return cls((), universal_vocabulary())


def read_templates(values: Sequence[str] | None) -> tuple[str, ...]:
    """Prompts as people write them: phrases with ``{}``, or names of shipped templates: `"default"` (for none, too),
    `"tip-adapter-ensemble"` (seven phrases), or a data set's single phrase (`"oxford_pets"`, `"dtd"`, ...).
    `TEMPLATES` holds them all, `assets/templates.json` says where each comes from.

    Raises:
        ValueError: there are no templates of that name.
    """
    phrases = []
    for value in values or ("default",):
        if "{" not in value and value not in TEMPLATES:
            raise ValueError(
                f"No templates named {value!r}; choose one of {', '.join(TEMPLATES)}, or write a phrase with {{}}."
            )
        phrases += [value] if "{" in value else TEMPLATES[value]
    return tuple(phrases)


def _pool_tensor(values: torch.Tensor | None, name: str, *, axis: int, pool: int) -> torch.Tensor | None:
    if values is not None and (values.ndim != 2 or values.shape[axis] != pool):
        wanted = f"({pool}, d)" if axis == 0 else f"(N, {pool})"
        raise ValueError(
            f"{name} must have the shape {wanted}, one {'row' if axis == 0 else 'column'} for each of "
            f"Anchors.build(task, vocabulary=..., strategy='all').names, got {tuple(values.shape)}."
        )
    return values


def _strings(values: Iterable[str], what: str) -> tuple[str, ...]:
    values = tuple(as_list(values, what))
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{what}[{position}] must be a string, got {value!r} ({type(value).__name__}).")
        if not value.strip():
            raise ValueError(f"{what}[{position}] is empty; every entry needs a text.")
        if len(value) > MOST_CHARACTERS:
            said = f"{what}[{position}] ({value[:30]!r}...) has {len(value):,} characters"
            raise ValueError(f"{said}; names and templates may have {MOST_CHARACTERS:,}: shorten it.")
    most = MOST_TEMPLATES if what == "templates" else MOST_NAMES
    if len(values) > most:
        raise ValueError(f"{what} has {len(values):,} entries, at most {most:,} can be saved.")
    return values
