"""Finished transfers: what an adapter became on other models, kept in its repository.

``transfers/index.json`` names the models. ``transfers/<model>.safetensors`` holds the finished adapter of one (kind
``"adapter"``: tensors as in ``adapter_model.safetensors``, its configuration in the metadata) or the bridge to it
(kind ``"bridge"``, see [`Bridge`]). Loading the adapter on one of these models takes its transfer by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from safetensors.torch import load_file, save, save_file

from .anchors import Anchors
from .files import read_metadata_json, read_tensors, replace_file
from .fingerprint import ModelId
from .hub import fetch, hub_errors, public_name, read_json, split_revision
from .solvers import check_finite
from .trust import (
    KEY_PREFIX,
    check_adapter_tensors,
    check_json,
    check_semi_orthogonal,
    load_json,
    read_header,
    refuse_pickles,
)


if TYPE_CHECKING:
    from torch import Tensor

    from .bridge import Bridge
    from .classifier import AnchorClassifier

    Finished = AnchorClassifier | tuple[dict, dict[str, Tensor]] | Bridge

INDEX = "transfers/index.json"
ANCHORS = "anchors.json"
SCORES = "scores.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TEACHER_FILE = "teacher.json"
_FORMAT = "hf_transmiter.transfer"
_ATTEMPTS = 3  # when somebody else commits to the repository at the same moment


@dataclass
class TeacherFacts:
    """What `teacher.json` beside a tuned model's adapter says, so that the teacher can be put together again.

    Args:
        weak (`str`), revision (`str` or `None`), fingerprint (`str`): the model that was tuned.
        class_names (`list[str]`): C names in label order.
        templates (`list[str]`): prompts of the tuned model's class vectors (``["{}."]`` after a learnt context).
        zero_shot_templates (`list[str]`): prompts of the weak model's class vectors it started from.
        settings (`dict`): the [`TuningConfig`].
    """

    weak: str
    revision: str | None
    fingerprint: str
    class_names: list[str]
    templates: list[str]
    zero_shot_templates: list[str]
    settings: dict

    @classmethod
    def read(cls, source: str) -> TeacherFacts | None:
        """From a folder or Hub repository; `None` where there is no such file."""
        content = read_json(source, TEACHER_FILE)
        if content is None:
            return None
        return cls(**content)

    def write(self, folder: str | os.PathLike) -> None:
        """Into a folder, beside the adapter."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        replace_file(Path(folder) / TEACHER_FILE, lambda path: path.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class FinishedTransfer:
    """One row of the index.

    Args:
        file (`str`): path in the repository.
        kind (`str`): ``"adapter"`` or ``"bridge"``.
        model (`ModelId`): the strong model.
        num_bytes (`int`), sha256 (`str`): of the file.
    """

    file: str
    kind: str
    model: ModelId
    num_bytes: int
    sha256: str

    def __str__(self) -> str:
        revision = f" (revision {self.model.revision})" if self.model.revision else ""
        return f"{self.model.name}{revision}"


def list_transfers(source: str | os.PathLike, **hub) -> list[FinishedTransfer]:
    """The finished transfers in an adapter's folder or repository; none where there is no index.

    Args:
        source (`str` or `os.PathLike`): folder or Hub id.
        **hub: as [`hub.fetch`].

    Raises:
        ValueError: a damaged index.
    """
    content = read_json(source, INDEX, **hub)
    if content is None:
        return []
    return [FinishedTransfer(**{**row, "model": ModelId(**row["model"])}) for row in content["transfers"]]


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
        raise FileNotFoundError(f"{os.fspath(source)!r} has no {CONFIG if config is None else WEIGHTS}: no adapter.")
    if config.get("peft_type") != "TRANSMITER":
        raise ValueError(f"{os.fspath(source)!r} holds a {config.get('peft_type')} adapter, not a TransMiter adapter.")
    check_adapter_tensors(path, config)
    anchors = fetch(source, ANCHORS, **hub) if config.get("anchors_fingerprint") else None
    if anchors is not None and Anchors.load(anchors).fingerprint != config["anchors_fingerprint"]:
        raise ValueError(
            f"{ANCHORS} and {CONFIG} of {os.fspath(source)!r} hold different names or templates: one of them was "
            "edited. Restore the pair that was saved together."
        )
    return config


def read_adapter(source: str | os.PathLike, **hub) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and weights of a TransMiter adapter, without its model.

    Returns:
        The content of ``adapter_config.json``, and the tensors by part (`anchors`, `class_vectors`, ...).

    Raises:
        FileNotFoundError, ValueError: as [`read_config`].
    """
    config, path = read_config(source, **hub), fetch(source, WEIGHTS, **hub)
    # Copies: a loaded tensor is a view of the file, which may be written again while it is in use.
    return config, _parts(config, {key: tensor.clone() for key, tensor in load_file(path).items()}, str(path))


def write_adapter(folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor]) -> None:
    """Inverse of [`read_adapter`]; each file is replaced in one step.

    Raises:
        FileExistsError: the folder holds another adapter, with scores or transfers that would not be this one's.
    """
    folder = Path(folder)
    named = {KEY_PREFIX + part: tensor.contiguous() for part, tensor in tensors.items()}
    content = save(named)
    held = [file for file in (INDEX, SCORES) if (folder / file).is_file()]
    if held and (folder / WEIGHTS).is_file() and (folder / WEIGHTS).read_bytes() != content:
        raise FileExistsError(f"{folder} holds another adapter with its {' and '.join(held)}: choose another folder.")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    replace_file(folder / WEIGHTS, lambda path: path.write_bytes(content))
    replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def read_transfer(
    source: str | os.PathLike, entry: FinishedTransfer, **hub
) -> tuple[dict, dict[str, Tensor]] | Bridge:
    """The finished adapter (configuration and tensors, as [`read_adapter`]) or the bridge of an entry.

    Raises:
        ValueError: the file is missing, is not the one the index describes, or is damaged.
    """
    path = fetch(source, entry.file, **hub)
    if path is None or path.stat().st_size != entry.num_bytes or _sha256(path) != entry.sha256:
        raise ValueError(f"{entry.file} of {os.fspath(source)!r} is not the file its index describes: push it again.")
    if entry.kind == "bridge":
        from .bridge import Bridge  # not at the top: bridges come later in the order of the package

        return Bridge.load(path)
    metadata, _ = read_header(path)
    config = read_metadata_json(path, metadata, "config", dict)
    check_json(config, "adapter_config", f"the configuration in {path}")
    if config["peft_type"] != "TRANSMITER" or config.get("base_fingerprint") != entry.model.fingerprint:
        raise ValueError(f"{path} is not the adapter of {entry} that its index says: push it again.")
    check_adapter_tensors(path, config)
    tensors, _ = read_tensors(path, _FORMAT, "finished transfer", "save_transfer")
    return config, _parts(config, tensors, str(path))


def save_transfer(folder: str | os.PathLike, transfer: Finished, *, overwrite: bool = False) -> FinishedTransfer:
    """Adds a finished transfer to an adapter's folder; nothing but its file and the index is written.

    Args:
        folder (`str` or `os.PathLike`): of the weak model's adapter.
        transfer (`AnchorClassifier`, `tuple` or `Bridge`):
            What [`transfer`] returned, what [`read_adapter`] reads of it, or the bridge it would need.
        overwrite (`bool`, *optional*, defaults to `False`): replace the transfer to the same model.

    Raises:
        FileExistsError: there is one for this model, and `overwrite` is `False`.
        ValueError: no TransMiter adapter in the folder, or a transfer that is not one of it.
    """
    return _add(folder, read_json(folder, CONFIG) or {}, transfer, overwrite)


def _add(folder: str | os.PathLike, own: dict, transfer: Finished, overwrite: bool) -> FinishedTransfer:
    """[`save_transfer`] for the adapter with the configuration `own`."""
    if own.get("peft_type") != "TRANSMITER":
        raise ValueError("a transfer goes beside a TransMiter adapter, and there is none.")
    entries, bridge = list_transfers(folder), hasattr(transfer, "matrix")
    if bridge:
        model, transfer = transfer.strong, transfer.without_paths()
        if own.get("base_fingerprint") not in (None, transfer.weak.fingerprint):
            raise ValueError(f"the bridge begins at {transfer.weak.name!r}, the adapter is another model's.")
    else:
        config, tensors = transfer if isinstance(transfer, tuple) else transfer.adapter_tensors()
        if config.get("base_fingerprint") is None:
            raise ValueError("the finished adapter does not say which weights it belongs to: make it with transfer.")
        if config["class_names"] != own["class_names"]:
            raise ValueError("the finished adapter answers over other class names than the one it is to stand beside.")
        model = ModelId(config["base_model_name_or_path"], config["revision"], config["base_fingerprint"])
        config = without_paths(config)
    known = next((entry for entry in entries if entry.model.fingerprint == model.fingerprint), None)
    if known is not None and not overwrite:
        raise FileExistsError(f"{folder} already has a transfer to {known}; pass overwrite=True to replace it.")
    name = public_name(model.name or "model")
    file = known.file if known else _file_name(name, model.fingerprint, [entry.file for entry in entries])
    path = Path(folder) / file
    if bridge:
        transfer.save(path, overwrite=True)
    else:
        named = {KEY_PREFIX + part: tensor.contiguous() for part, tensor in tensors.items()}
        metadata = {"format": _FORMAT, "config": json.dumps(config)}
        replace_file(path, lambda temporary: save_file(named, temporary, metadata=metadata))
    kind, size = "bridge" if bridge else "adapter", path.stat().st_size
    entry = FinishedTransfer(file, kind, replace(model, name=name), size, _sha256(path))
    rows = [asdict(row) for row in entries if row is not known] + [asdict(entry)]
    content = {"format": "hf_transmiter.transfers", "version": 1, "transfers": rows}
    text = json.dumps(content, indent=2) + "\n"
    replace_file(Path(folder) / INDEX, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return entry


def push_transfer(
    repo_id: str,
    transfer: Finished,
    *,
    overwrite: bool = False,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Adds a finished transfer to an adapter's repository on the Hub, in one commit that touches nothing else.

    Args:
        repo_id (`str`): of the weak model's adapter.
        transfer (`AnchorClassifier`, `tuple` or `Bridge`): see [`save_transfer`].

    Raises:
        FileExistsError: there is one for this model, and `overwrite` is `False`.
        OSError: the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    for attempt in range(_ATTEMPTS):
        with hub_errors(repo_id):
            head = api.model_info(repo_id).sha
        with tempfile.TemporaryDirectory() as scratch:
            own = fetch(repo_id, CONFIG, revision=head, token=token, strict=True)
            index = fetch(repo_id, INDEX, revision=head, token=token, strict=True)
            if index is not None:
                replace_file(Path(scratch) / INDEX, lambda path, index=index: path.write_bytes(index.read_bytes()))
            entry = _add(scratch, {} if own is None else load_json(own, "adapter_config"), transfer, overwrite)
            operations = [CommitOperationAdd(file, Path(scratch) / file) for file in (entry.file, INDEX)]
            try:
                with hub_errors(repo_id):
                    message = commit_message or f"Add the transfer to {entry}"
                    return api.create_commit(
                        repo_id, operations, commit_message=message, create_pr=create_pr, parent_commit=head
                    )
            except OSError as error:
                # The index has changed in between: it must be read again, or the other's entry would be lost.
                moved = getattr(getattr(error.__cause__, "response", None), "status_code", None) == 412
                if not moved or attempt == _ATTEMPTS - 1:
                    raise
    raise AssertionError("not reached")


def missing_transfer(source: str, made_for: str, model: str | None, entries: Sequence[FinishedTransfer]) -> str:
    """What to tell somebody whose model an adapter has no transfer for."""
    there = ", ".join(str(entry) for entry in entries) or "none"
    strong = model or "MODEL"
    return (
        f"the adapter {source!r} was made for {made_for!r}, this is {model!r}. Finished transfers there: {there}. "
        f"Load one of these models, or make a transfer: hf-transmiter transfer {source} --strong {strong} "
        "--output-dir out/upgraded"
    )


def _parts(config: dict, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """By part, and checked: finite, and a basis that nobody trained is orthonormal."""
    parts = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
    for part, tensor in parts.items():
        check_finite(tensor.reshape(1, -1), f"{part} of {where}")
    if "basis" in parts and not config.get("train_basis"):
        check_semi_orthogonal(parts["basis"], f"the basis of {where}", full_rank=True)
    return parts


def without_paths(value, base: dict[str, str] | None = None, key: str = ""):
    """Facts about an adapter with [`public_name`]s of models and datasets, or what `base` says instead."""
    if isinstance(value, dict):
        return {name: without_paths(item, base, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, base) for item in value]
    if isinstance(value, str) and key in ("base_model_name_or_path", "weak", "strong", "name", "dataset", "derived"):
        return (base or {}).get(value, public_name(value))
    return value


def _file_name(name: str, fingerprint: str, taken: Sequence[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", split_revision(name)[0]).strip("-.") or "model"
    file = f"transfers/{name}.safetensors"
    return file if file not in taken else f"transfers/{name}-{fingerprint[:8]}.safetensors"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
