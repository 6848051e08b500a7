"""Writing in one step, so that no reader ever sees half of it and nothing is lost; reading what somebody else wrote.

A run [`claim`]s its place before the work, and puts its result there by [`replace_file`] or [`replace_folder`]
afterwards. What is being written lies in a hidden folder beside the place (``.NAME.<32 digits>.tmp``), which is gone
when it is done; what a killed run left there is cleared by the next one that claims the place.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .checks import check_json, check_tensors, load_json, parse_json, read_header


try:
    import fcntl
except ImportError:  # there are no such locks on Windows
    fcntl = None

logger = logging.getLogger(__name__)

CHECKPOINT, LOCK = "checkpoint.safetensors", "hf-transmiter.lock"
"""Endings of what lies [`beside`] a place while it is made."""
_LONGEST = 100  # bytes of a name that a hidden one is made from
_TEMPORARY = re.compile(r"(\..+\.)([0-9a-f]{32}|\d+)\.tmp")  # once there were process ids


def is_fixed(path: Path) -> bool:
    """Whether a folder can be filled, but not replaced: it is the current folder or holds it, is a mount point, or
    nothing can be made beside it."""
    path = Path(os.path.realpath(path))
    inside = Path(os.path.realpath(os.curdir)).is_relative_to(path)
    return path.is_dir() and (inside or os.path.ismount(path) or not os.access(path.parent, os.W_OK))


def beside(path: Path, ending: str) -> Path:
    """A hidden place beside another, ``.NAME.ending``; inside a folder that [`is_fixed`]."""
    name, known = path.name.lstrip("."), os.fsencode(path.name)
    if len(known) > _LONGEST:
        name = hashlib.sha256(known).hexdigest()[:32]
    return path / f".output.{ending}" if is_fixed(path) else path.with_name(f".{name}.{ending}")


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A place of the same name in a hidden folder beside `path`, which is gone afterwards.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    folder = beside(path, f"{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder / path.name
    except (OSError, ValueError, SafetensorError) as error:
        if getattr(error, "errno", None) is None and not isinstance(error, SafetensorError):  # a sentence already
            if (hidden := os.fspath(folder / path.name)) not in str(error):
                raise
            kind = type(error) if isinstance(error, OSError) else ValueError
            raise kind(str(error).replace(hidden, os.fspath(path))) from error
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _share(made: Path) -> None:
    """Gives files the permissions that new ones usually have: safetensors leaves them to their owner alone."""
    mode = made.parent.stat().st_mode & 0o666  # of a folder that was made by mkdir
    for path in made.rglob("*") if made.is_dir() else [made]:
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def replace_file(
    path: str | os.PathLike, write: Callable[[Path], object], read: Callable[[Path], object] | None = None
) -> None:
    """Calls `write(temporary)` and moves the result to `path` in one step; missing folders are made.

    Raises:
        OSError: it cannot be written; what was there still is.
        ValueError: what `read(temporary)`, which will read it, refuses.
    """
    path = Path(path)
    with _scratch(path) as temporary:
        write(temporary)
        try:
            read is None or read(temporary)
        except ValueError as error:
            raise ValueError(f"{path} is not saved, as it could not be loaded again: {error}") from error
        _share(temporary)
        os.replace(temporary, path)


def replace_folder(path: str | os.PathLike, write: Callable[[Path], object], replaces: Collection[str] = ()) -> None:
    """Calls `write(temporary)` and moves the folder it filled to `path` in one step; missing folders are made.

    Of a folder that is there those of its [`entries`] go that are in `replaces`. All others are kept beside what was
    written. A link to a folder stays a link.

    Raises:
        FileExistsError: one of the others has a name that was written, too; what was written is in another folder.
        OSError: it cannot be written; what was there still is.
    """
    path = Path(os.path.realpath(path))
    with _scratch(path) as made:
        made.mkdir()
        write(made)
        _share(made)
        try:
            os.replace(made, path)
            return
        except OSError:
            if not path.is_dir() or is_fixed(path):
                raise
        kept = sorted(entries(path) - set(replaces))
        twice = next((name for name in kept if _is_taken(made / name, path / name)), None)
        if twice is not None:
            aside = next(p for i in range(2, 10**6) if not os.path.lexists(p := path.with_name(f"{path.name}-{i}")))
            os.replace(made, aside)
            raise FileExistsError(f"{path / twice} arrived while this was made, and stays: the result is in {aside}.")
        for name in kept:
            _keep(path / name, made / name)
        _exchange(made, path)
        late = sorted(entries(made) - set(replaces) - set(kept))  # of the folder that was there: in this very moment
        for name in late:
            _keep(made / name, path / name)
        if kept or late:
            shown = [name for name in (*kept, *late) if os.path.dirname(name) not in kept]
            logger.warning("%s had other files by now, which are kept: %s.", path, ", ".join(shown[:5]))


def entries(folder: Path) -> set[str]:
    """Relative paths of all that is in a folder."""
    found = ((root, name) for root, *names in os.walk(folder) for some in names for name in some)
    return {os.path.relpath(os.path.join(root, name), folder) for root, name in found}


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_taken(target: Path, source: Path) -> bool:
    """Whether something is where a file or folder would be put, other than a folder for a folder."""
    return target.parent.is_file() or (os.path.lexists(target) and not (_is_folder(target) and _is_folder(source)))


def _keep(source: Path, target: Path) -> None:
    """A file is kept by a link to the same content, where the filesystem has them; of a folder only that it is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if _is_folder(source):
        target.mkdir(exist_ok=True)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def write_json(path: str | os.PathLike, value, kind: str | None = None, **style) -> None:
    """One JSON file, see [`replace_file`]; `kind` is that of [`checks.load_json`].

    Raises:
        ValueError: what `load_json` would refuse.
    """
    text = json.dumps(value, **{"indent": 1, "ensure_ascii": False, **style}) + "\n"
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"), lambda file: load_json(file, kind))


def fill_folder(path: str | os.PathLike, write: Callable[[Path], object], *, reads: bool = False) -> None:
    """Lets `write(folder)` fill a folder: a new or empty one in one step, else file by file beside what is there.
    Where it `reads` that, it writes there itself."""
    path = Path(path)
    if not path.is_dir() or not (any(path.iterdir()) or is_fixed(path)):
        replace_folder(path, write)
    elif reads:
        write(path)
    else:
        with _scratch(path) as made:
            made.mkdir()
            write(made)
            _share(made)
            for entry in list(made.iterdir()):
                os.replace(entry, path / entry.name)


def _exchange(made: Path, path: Path) -> None:
    """Two folders take each other's place: in one step on Linux, else in three, which [`claim`] can undo."""
    with suppress(AttributeError):  # a C library without it
        if ctypes.CDLL(None).renameat2(-100, os.fsencode(made), -100, os.fsencode(path), 2) == 0:
            return
    earlier = beside(path, "earlier")
    os.replace(path, earlier)
    os.replace(made, path)
    os.replace(earlier, made)


@contextmanager
def claim(path: str | os.PathLike) -> Iterator[None]:
    """Keeps a place that is going to be written for this run alone, by a lock on a hidden file beside it. The lock
    goes with the process, however that ends; a filesystem without locks keeps nothing, which is logged.

    What killed runs left beside the place and in it is cleared, and an exchange of folders that was cut short undone.

    Raises:
        BlockingIOError: another run, or thread, has it.
        OSError: nothing can be written there; the message says why.
    """
    place = Path(os.path.realpath(path))
    try:
        if os.path.islink(path) and not place.exists():
            raise OSError(f"it is a link to {place}, which is not there")
        new = [folder for folder in place.parents if not folder.exists()]
        place.exists()  # or its name is too long
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = beside(place, LOCK)
        held = _locked(lock)
    except BlockingIOError:
        said = f"another run is writing to {path}: wait for its end, or choose another place."
        raise BlockingIOError(said) from None
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path} cannot be written: there is a file where a folder must be.") from None
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}.") from error
    try:
        if held is None:
            logger.info("%s is on a filesystem without locks: other runs are not kept out.", path)
        else:
            _clear(place, lock)
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        if held is not None:
            os.close(held)
        for folder in new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _locked(path: Path) -> int | None:
    """The descriptor of a file that is locked now; `None` where there are no locks."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            descriptor = os.open(path, os.O_RDONLY)  # what another user's killed run left
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no locks")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:  # who had it took the file away in this moment: once more
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
                return None
            raise
        os.close(descriptor)


def _clear(place: Path, lock: Path) -> None:
    """Takes away what killed runs left of a place that is claimed."""
    earlier, stem = beside(place, "earlier"), lock.name.removesuffix(LOCK)
    if earlier.is_dir() and not place.exists():
        os.replace(earlier, place)
    found = [earlier]
    for path in (*lock.parent.glob(".*.tmp"), *place.glob(".*.tmp"), *place.glob("*/.*.tmp")):
        name, inside = _TEMPORARY.fullmatch(path.name), path.is_relative_to(place)
        own = name and name[1] in (stem, f"{stem}{CHECKPOINT}.")
        if own or (name and inside and not _is_held(path.with_name(name[1] + LOCK))):
            found.append(path)
    for path in (*place.glob(f".*.{LOCK}"), *place.glob(f"*/.*.{LOCK}")):
        path == lock or _is_held(path)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    """Whether a place is claimed; a lock that is not held goes."""
    try:
        if lock.exists() and (descriptor := _locked(lock)) is not None:
            lock.unlink()
            os.close(descriptor)
    except OSError:
        return True
    return False


def file_state(path: str | os.PathLike) -> tuple[int, ...]:
    """Size of a file, and what changes with its content; a copy that keeps the times of its original has another."""
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, which is read once, as long as its state stays."""
    return _file_digest(os.fspath(path), *file_state(path))


@cache  # without a limit: one that the pictures exceed would have all of them read again every time
def _file_digest(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tensors: Mapping[str, Tensor], *facts) -> str:
    """SHA-256 of named tensors, and of facts that JSON can write."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


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
