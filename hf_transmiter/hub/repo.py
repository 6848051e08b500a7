"""Files of a repository, read and written the same way in a local folder and on the Hub, by huggingface_hub.

A source is a folder or a Hub id (``user/name``, ``user/name@revision``). The models that come with this package are
``sandbox:weak`` and so on.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import sha_fileobj

from .checks import load_json
from .rules import KINDS


logger = logging.getLogger(__name__)

SANDBOX = "sandbox:"
SANDBOX_MODELS = ("weak", "strong", "weak-upgraded")
OPEN_CLIP = "open_clip:"
_ASSETS = Path(__file__).parents[1] / "assets" / "sandbox"


def split_revision(source: str) -> tuple[str, str | None]:
    """``"name@revision"`` to its parts. An existing path is a name as a whole."""
    name, at, revision = source.rpartition("@")
    return (name, revision) if at and name and not Path(source.removeprefix(OPEN_CLIP)).exists() else (source, None)


def same_name(a: str | None, b: str | None) -> bool:
    """Whether two names are of one model, of whatever revision; a folder's may be spelt in several ways."""
    return None not in (a, b) and len({os.path.abspath(split_revision(str(name))[0]) for name in (a, b)}) == 1


def model_location(name: str) -> str:
    """Where transformers finds a model: the folder of ``sandbox:NAME``, any other name as it is.

    Raises:
        ValueError: no such model in the sandbox.
    """
    if not name.startswith(SANDBOX):
        return name
    model = name.removeprefix(SANDBOX)
    if model not in SANDBOX_MODELS:
        raise ValueError(f"There is no sandbox model {model!r}; there are {', '.join(SANDBOX_MODELS)}.")
    return str(_ASSETS / model)


def check_hub_id(name: str, what: str) -> None:
    """
    Raises:
        FileNotFoundError: `name` cannot be a Hub id; the message says that there is no such `what`.
    """
    odd = name.startswith((".", "~", os.sep)) or any(letter in name for letter in "*?[\\")
    if odd or not _is_valid_id(name):
        raise FileNotFoundError(f"there is no {what} {name!r}: neither a local path nor a Hub id.")


def is_hub_id(name: object) -> bool:
    """Whether `name` can be ``user/name`` on the Hub: not a path that exists, not ``sandbox:weak``."""
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((SANDBOX, OPEN_CLIP, ".", "~", "/")):
        return False
    return _is_valid_id(name) and not Path(name).exists()


def _is_valid_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Around calls of huggingface_hub: what the Hub refuses and what the network breaks, in one sentence.

    Raises:
        OSError: says what is wrong with `repo_id` and how to mend it.
    """
    try:
        yield
    except EntryNotFoundError:  # an answer, not a failure
        raise
    except HTTPError as error:  # of the HTTP client; those of the Hub are among them
        raise OSError(_in_words(error, repo_id)) from error
    except RuntimeError as error:  # what a failed transfer of a large file ends in
        cause = error.__cause__
        raise OSError(_in_words(cause if isinstance(cause, HTTPError) else error, repo_id)) from error
    except json.JSONDecodeError as error:
        raise OSError(f"The Hub's answer about {repo_id} cannot be read; try again later.") from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _in_words(error: BaseException, repo_id: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no repository {repo_id!r} on the Hub that you may see (and no such folder here). If it is "
            "private, log in with `hf auth login` or pass `token`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch, tag or commit ({_one_line(error.server_message)})."
    if not isinstance(error, HfHubHTTPError):
        return f"The connection to the Hub failed ({_one_line(error)}); try again: what has arrived is not sent again."
    status, said = error.response.status_code, _one_line(error.server_message or error.response.reason_phrase)
    remedy = {
        401: "log in with `hf auth login`, or pass a valid `token`",
        403: "this takes a token that may write there (`hf auth login`); to propose a change to another's repository, "
        "pass `create_pr=True` (`--create-pr`)",
        412: "somebody else has changed it in the meantime; try again",
    }
    return f"The Hub answers {status} for {repo_id} ({said}): {remedy.get(status, 'try again later')}."


def is_open_clip(name: str) -> bool:
    """Whether a model's name is one of the open_clip library, see `open_clip_model`."""
    return name.startswith(OPEN_CLIP)


def is_public_open_clip(name: str) -> bool:
    """Whether such a name means the same everywhere: ``ARCHITECTURE/TAG`` or ``hf-hub:user/repo``, no path."""
    parts = name.removeprefix(OPEN_CLIP).split("/")
    return is_open_clip(name) and len(parts) == 2 and not name.endswith(".safetensors") and public_name(name) == name


def public_name(name: str) -> str:
    """What others may read of where a model or dataset came from: of a path on this machine only its last part."""
    if is_open_clip(name):
        rest = name.removeprefix(OPEN_CLIP)
        architecture, slash, file = rest.partition("/")
        if not _is_path(rest) and slash:
            return f"{OPEN_CLIP}{architecture}/{Path(file).name if _is_path(file) else file}"
        return OPEN_CLIP + (Path(rest).name if _is_path(rest) else rest)
    return Path(name).name if _is_path(name) else name


def _is_path(name: str) -> bool:
    return os.path.isabs(name) or name.startswith((".", "~")) or Path(name).exists()


def fetch(
    source: str | os.PathLike, file: str, *, subfolder: str | None = None, strict: bool = False, **hub
) -> Path | None:
    """A file of a folder or Hub repository; `None` where there is no such file.

    Large files of the Hub are named by their SHA-256 in the cache; it is compared with the content each time.
    Without a network, a file that is missing among the cached ones of its repository counts as not there, with a
    warning.

    Args:
        source (`str` or `os.PathLike`): folder, or Hub id (``id@revision`` too).
        file (`str`), subfolder (`str`, *optional*): path inside it, and the folder that it is relative to.
        strict (`bool`, *optional*, defaults to `False`):
            For what is written again afterwards: a Hub that does not answer is an error whatever the cache has.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only` of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: `source` is neither a folder nor a possible Hub id.
        OSError: the Hub has no such repository or revision, refuses it, or cannot be reached and the file is not in
            the cache; or the file arrived damaged.
    """
    name, revision = split_revision(os.fspath(source))
    if is_open_clip(name) or name.startswith(SANDBOX):  # a model: nothing else is kept under such a name
        return None
    if Path(name).is_dir():
        path = Path(name) / (subfolder or "") / file
        return path if path.is_file() else None
    check_hub_id(name, "model or adapter")
    hub["revision"] = hub.get("revision") or revision
    path_in_repo = f"{subfolder}/{file}" if subfolder else file
    try:
        with hub_errors(name):
            path = Path(hf_hub_download(name, path_in_repo, **hub))
    except LocalEntryNotFoundError as error:
        if strict:
            reason = _in_words(error.__cause__ or error, name)
            raise OSError(f"{path_in_repo} of {name!r} cannot be read: {reason}") from error
        return _absent(name, path_in_repo, error, hub.get("cache_dir"), hub["revision"])
    except EntryNotFoundError:
        return None
    _check_content(path, f"{path_in_repo} of {name}")
    return path


def _absent(
    name: str, file: str, error: LocalEntryNotFoundError, cache_dir: str | os.PathLike | None, revision: str | None
) -> None:
    """What to make of a file that is not in the cache when the Hub does not answer: `None`, or an error."""
    if try_to_load_from_cache(name, file, cache_dir, revision) is not None:
        return  # asked before, and the Hub had no such file
    cause, reason = error.__cause__, "offline (HF_HUB_OFFLINE or local_files_only)."
    if cause is not None and not isinstance(cause, OfflineModeIsEnabled):
        reason = _in_words(cause, name)
    if isinstance(cause, HfHubHTTPError) or not _is_cached(name, cache_dir, revision):
        raise OSError(f"{file} of {name!r} is neither in a folder here nor in the cache: {reason}") from error
    logger.warning(f"{file} of {name} is not in the cache and counts as not there: {reason}")


def _is_cached(name: str, cache_dir: str | os.PathLike | None, revision: str | None) -> bool:
    """Whether the cache has any file of this revision."""
    try:
        snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return False
    return True


def _check_content(path: Path, what: str) -> None:
    # Of a plain download huggingface_hub checks only the size. In a cache without links there is nothing to compare.
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as content:
        if sha_fileobj(content).hex() == blob.name:
            return
    for damaged in (path, blob):
        damaged.unlink(missing_ok=True)
    raise OSError(f"{what} arrived damaged and was taken out of the cache: try again.")


def cached_commit(
    name: str, files: Sequence[str], revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> str | None:
    """The commit whose copy of one of these files is in the cache; `None` for a folder. transformers 5 no longer says
    it."""
    if Path(name).is_dir():
        return None
    found = (try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision) for file in files)
    return next((Path(path).parent.name for path in found if isinstance(path, str)), None)


def read_json(source: str | os.PathLike, file: str, **hub) -> dict | list | None:
    """A JSON file of a folder or Hub repository, see [`fetch`]. A kind of file that `rules` knows is checked.

    Raises:
        ValueError: not JSON, too large, or not what a file of this name holds.
    """
    path, kind = fetch(source, file, **hub), file.removesuffix(".json")
    return None if path is None else load_json(path, kind if kind in KINDS else None)


def refuse_links_out(folder: Path, files: Iterable[str]) -> None:
    """
    Raises:
        ValueError: one of the files is a link out of the folder: what it leads to is not part of it.
    """
    for file in files:
        target = (folder / file).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{file} in {str(folder)!r} is a link out of that folder, to {str(target)!r}: copy what shall be "
                "shared into the folder, or take the link away."
            )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    delete: Sequence[str] = (),
) -> CommitInfo:
    """Uploads a folder in one commit, which also takes away the files `delete` that are there; other files stay. The
    repository is made if it is not there. The other arguments are those of [`push`](hf_transmiter.hub.push.push); the
    answer is the last commit's where nothing is new.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        OSError: the Hub refuses or the connection fails; the repository is as it was.
        ValueError: a link out of the folder, a bad `repo_id`, or metadata in the README.md that the Hub does not
            accept.
    """
    folder = Path(folder)
    mine = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if not mine:
        raise FileNotFoundError(f"there is nothing to push in {str(folder)!r}.")
    refuse_links_out(folder, mine)
    api = HfApi(token=token)
    with hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        changes = [CommitOperationAdd(file, folder / file) for file in mine]
        if delete:
            stale = (set(delete) - set(mine)).intersection(api.list_repo_files(repo_id))
            changes += [CommitOperationDelete(file) for file in sorted(stale)]
        # Not upload_folder, which may split what it uploads into several commits.
        return api.create_commit(repo_id, changes, commit_message=commit_message, create_pr=create_pr)
