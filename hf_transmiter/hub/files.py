"""Writing a file so that no reader ever sees half of it, and reading one that somebody else wrote."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from .checks import check_json, check_tensors, parse_json, read_header


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


def replace_metadata(path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Puts other metadata into a safetensors file (one that [`checks.read_header`] reads); its tensors stay."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8:start]), "__metadata__": metadata}).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    made = len(header).to_bytes(8, "little") + header + content[start:]
    replace_file(path, lambda temporary: temporary.write_bytes(made))


def read_tensors(
    path: str | os.PathLike,
    format_name: str,
    what: str,
    writer: str,
    shapes: Mapping[str, tuple[int | str, ...]],
    optional: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata says `"format": format_name`; its header is checked
    by [`checks.check_tensors`] before any tensor is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another file than `what` was expected; the message says which `writer` makes one.
    """
    remedy = f"write one with {writer}"
    metadata, _ = read_header(path, what, remedy)
    if metadata.get("format") != format_name:
        raise ValueError(f"{path} is not a {what}; {remedy}.")
    check_tensors(path, shapes, optional=optional, what=what, remedy=remedy)
    # Copies: what is read is a view of the file, and a file that is written to later would change what was checked.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}, metadata


def read_metadata_json(path: str | os.PathLike, metadata: dict[str, str], key: str, kind: str):
    """The JSON value under `key` of a file's metadata.

    Raises:
        ValueError: missing, or what [`checks.parse_json`] and [`checks.check_json`] refuse for this `kind`.
    """
    try:
        return check_json(parse_json(metadata[key], repr(key)), kind, repr(key))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata has no readable {key!r} ({error}).") from error
