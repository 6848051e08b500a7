"""An adapter's files, read and written without its model: ``adapter_config.json`` and ``adapter_model.safetensors``;
and a bridge's one file.

One folder or repository, or one subfolder of it, holds one adapter of one model. What an adapter has become on another
model goes into a subfolder (``subfolder="vit-l14"``) or a repository of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ..algebra import ORTHOGONALITY, check_semi_orthogonal, check_weights
from .checks import (
    KEY_PREFIX,
    check_adapter_tensors,
    check_json,
    load_json,
    parse_json,
    read_header,
    refuse_pickles,
)
from .files import file_digest, read_metadata_json, read_tensors, replace_file, write_json
from .repo import fetch, public_name, read_json


SCORES = "scores.json"
WEIGHTS = "adapter_model.safetensors"
BRIDGE = "bridge.safetensors"
BRIDGE_SHAPES = {"matrix": ("m", "k"), "mean_strong": ("m",), "mean_weak": ("k",)}
CONFIG = "adapter_config.json"
CALIBRATION = "calibration.safetensors"
TEACHER_FILE = "teacher.json"
_BRIDGE_FORMAT = "hf_transmiter.bridge"


@dataclass
class TeacherFacts:
    """What `teacher.json` beside a tuned model's adapter says, so that the teacher can be put together again.

    Args:
        weak, revision, fingerprint: the model that was tuned.
        class_names: C names in label order.
        templates: prompts of the tuned model's class vectors (``["{}."]`` after a learnt context).
        zero_shot_templates: prompts of the weak model's class vectors it started from.
        settings: the [`TuningConfig`].
        taught_by: where a teacher took the place of labels: `experts`, the formula of its soft labels; `weak`, the
            model that it was before its tuning; `settings` of that tuning; `num_images`, unlabelled.
        learnt: on `held_out` images `accuracy` (or `agreement` with the teacher) and that of `zero_shot`, `changed`,
            how many predictions are others than before, all in percent; and a `warning` where nothing was learnt.
    """

    weak: str
    revision: str | None
    fingerprint: str
    class_names: list[str]
    templates: list[str]
    zero_shot_templates: list[str]
    settings: dict
    taught_by: dict | None = None
    learnt: dict | None = None

    @classmethod
    def read(cls, source: str) -> TeacherFacts | None:
        """From a folder or Hub repository; `None` where there is no such file."""
        content = read_json(source, TEACHER_FILE)
        return None if content is None else cls(**content)

    @property
    def verdict(self) -> str:
        """What was learnt, in a sentence or two."""
        if not self.learnt:
            return "What was learnt was not measured."
        held_out, said = self.learnt["held_out"], f"{self.learnt['changed']:.1f} % of the predictions changed."
        if held_out is None:
            said = f"Held out: not measured, no picture was left over. {said}"
        else:
            kind = "agreement with the teacher" if "agreement" in held_out else "accuracy"
            value, before = held_out.get("accuracy", held_out.get("agreement")), held_out["zero_shot"]
            where = f"on {held_out['num_images']:,} held-out images"
            said = f"{kind[0].upper()}{kind[1:]} {value:.1f} % {where}, {before:.1f} % before. {said}"
        warning = self.learnt["warning"]
        return f"{said} Warning: {warning}" if warning else said

    def write(self, folder: str | os.PathLike) -> None:
        """Into a folder, beside the adapter."""
        write_json(Path(folder) / TEACHER_FILE, asdict(self), "teacher", indent=2, ensure_ascii=True)


def is_transmiter(folder: str | os.PathLike) -> bool:
    """Whether the adapter in a folder is this package's own; of one that cannot be read that is taken for granted."""
    try:
        return load_json(Path(folder) / CONFIG).get("peft_type") == "TRANSMITER"
    except (ValueError, OSError, AttributeError):
        return True


def is_bridge(path: str | os.PathLike) -> bool:
    """Whether a file is a bridge, as far as its header says."""
    try:
        return "bridge" in read_header(path)[0]
    except (ValueError, OSError):
        return False


def read_config(source: str | os.PathLike, **hub) -> dict:
    """The checked content of a TransMiter adapter's ``adapter_config.json``. The weights beside it are not loaded, but
    must be there, as safetensors, and have the shapes that the configuration says.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: another kind of adapter, or damaged files.
    """
    if Path(source).is_dir():
        refuse_pickles(Path(source) / (hub.get("subfolder") or ""))
    config, path = read_json(source, CONFIG, **hub), fetch(source, WEIGHTS, **hub)
    if config is None or path is None:
        place = os.path.join(source, hub.get("subfolder") or "")
        raise FileNotFoundError(f"{place!r} has no {CONFIG if config is None else WEIGHTS}: no adapter.")
    if config.get("peft_type") != "TRANSMITER":
        raise ValueError(f"{os.fspath(source)!r} holds a {config.get('peft_type')} adapter, not a TransMiter adapter.")
    check_adapter_tensors(path, config)
    return config


def read_adapter(source: str | os.PathLike, **hub) -> tuple[dict, dict[str, Tensor]]:
    """The content of a TransMiter adapter's ``adapter_config.json``, and its tensors by part (`anchors`,
    `class_vectors`, ...), without its model.

    Raises:
        FileNotFoundError, ValueError: as [`read_config`]; numbers that are not finite, or a basis that nobody trained
            and that is not orthonormal.
    """
    config, path = read_config(source, **hub), fetch(source, WEIGHTS, **hub)
    # Copies: a loaded tensor is a view of the file, which may be written again while it is in use.
    parts = {key.removeprefix(KEY_PREFIX): tensor.clone() for key, tensor in load_file(path).items()}
    check_weights(parts, f"{{}} of {path}")
    if "basis" in parts and not config.get("train_basis"):
        check_semi_orthogonal(parts["basis"], f"the basis of {path}", full_rank=True)
    return config, parts


def content_digest(adapter: str, bridge: str, fingerprint: str) -> str:
    """SHA-256 of the files of an adapter and a bridge, wherever they are, and of a model's fingerprint."""
    found = hashlib.sha256(fingerprint.encode())
    for source in (adapter, bridge):
        paths = [fetch(source, file) for file in (CONFIG, WEIGHTS, BRIDGE)] if not Path(source).is_file() else [source]
        for path in filter(None, paths):
            found.update(file_digest(path).encode())
    return found.hexdigest()


def write_adapter(folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor]) -> None:
    """Inverse of [`read_adapter`]; each file is replaced in one step.

    Raises:
        FileExistsError: the folder holds another adapter, with scores that would not be this one's.
        ValueError: a value is not finite, or what [`read_config`] would refuse.
    """
    folder, text = Path(folder), json.dumps(config, indent=2, sort_keys=True) + "\n"
    known = check_json(parse_json(text, CONFIG), "adapter_config", CONFIG)
    check_weights(tensors, f"{{}} of {folder / WEIGHTS}")
    content = save({KEY_PREFIX + part: tensor.contiguous() for part, tensor in tensors.items()})
    there = (folder / SCORES).is_file() and (folder / WEIGHTS).is_file()
    if there and (folder / WEIGHTS).read_bytes() != content:
        raise FileExistsError(f"{folder} holds another adapter with its {SCORES}: choose another folder.")
    check = partial(check_adapter_tensors, config=known)
    replace_file(folder / WEIGHTS, lambda path: path.write_bytes(content), check)
    replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def find_bridge(source: str | os.PathLike, **hub) -> str | Path:
    """The file of a bridge: `source` itself, or in a folder or on the Hub; see [`fetch`].

    Raises:
        FileNotFoundError: there is none.
    """
    name = os.fspath(source)
    path = name if name.endswith(".safetensors") else fetch(name, BRIDGE, **hub)
    if path is None:
        raise FileNotFoundError(f"there is no {BRIDGE} in {name!r}; write one with Bridge.save_pretrained.")
    return path


def read_bridge(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a bridge's file, checked: first the header, then values, then that the map is one. Its
    anchors are not: they are the caller's.

    Raises:
        FileNotFoundError, ValueError: no such file; not a bridge, a damaged one, shapes that do not fit, values that
            are not finite, or a matrix that is not (semi-)orthogonal (composed: makes rows longer).
    """
    tensors, metadata = read_tensors(path, _BRIDGE_FORMAT, "bridge", "Bridge.save", BRIDGE_SHAPES)
    facts = read_metadata_json(path, metadata, "bridge", "bridge")
    check_weights(tensors, f"{{}} of {path}")
    matrix, logit = tensors["matrix"], facts["space"] == "logit"
    if logit or not facts.get("through"):
        check_semi_orthogonal(matrix, f"{path}: the matrix", full_rank=logit)
    elif torch.linalg.matrix_norm(matrix.double(), 2) > 1 + ORTHOGONALITY:
        raise ValueError(f"{path}: the matrix is no product of bridges; the file was changed or damaged.")
    return {key: tensor.float() for key, tensor in tensors.items()}, facts


def write_bridge(path: str | os.PathLike, tensors: dict[str, Tensor], facts: dict, read: Callable) -> None:
    """Inverse of [`read_bridge`], in one step.

    Raises:
        ValueError: what `read(path)` would refuse.
    """
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {"format": _BRIDGE_FORMAT, "bridge": json.dumps(facts)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata), read)


# Keys of facts about adapters and bridges whose values are names of models and datasets.
_NAMES = ("base_model_name_or_path", "weak", "strong", "name", "dataset", "derived", "through")


def without_paths(value, base: dict[str, str] | None = None, key: str = ""):
    """Facts about an adapter with [`public_name`]s of models and datasets, or what `base` says instead."""
    if isinstance(value, dict):
        return {name: without_paths(item, base, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, base, key) for item in value]
    if isinstance(value, str) and key in _NAMES:
        return (base or {}).get(value, public_name(value))
    return value
