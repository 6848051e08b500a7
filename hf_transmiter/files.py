"""Writing a file so that no reader ever sees half of it, and reading one that somebody else wrote."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open


if TYPE_CHECKING:
    from torch import Tensor


def replace_file(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and moves the result to `path` in one step; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_folder(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and moves the folder it filled to `path` in one step; nothing may be there yet."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        made.mkdir()  # with the usual permissions, which a temporary folder does not have
        write(made)
        os.replace(made, path)


def read_tensors(
    path: str | os.PathLike, format_name: str, what: str, writer: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata says `"format": format_name`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, or of another format; the message says `what` was expected and
            which `writer` makes one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format_name:
                raise ValueError(f"{path} is not a {what}; write one with {writer}.")
            return {key: file.get_tensor(key) for key in file.keys()}, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a {what} ({error}); write one with {writer}.") from error


def read_metadata_json(path: str | os.PathLike, metadata: dict[str, str], key: str, kind: type):
    """The JSON value under `key` of a file's metadata.

    Raises:
        ValueError: missing, not JSON, or not a `kind`.
    """
    try:
        value = json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its metadata has no readable {key!r}.") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged: {key!r} in its metadata is not a {kind.__name__}.")
    return value
