"""Files of a repository, read and written the same way in a local folder and on the Hub, by huggingface_hub.

A source is a folder or a Hub id (``user/name``, ``user/name@revision``). The models that come with this package are
``sandbox:weak`` and so on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .trust import SCHEMA_OF, load_json


SANDBOX = "sandbox:"
SANDBOX_MODELS = ("weak", "strong", "weak-upgraded")
_ASSETS = Path(__file__).parent / "assets" / "sandbox"


def split_revision(source: str) -> tuple[str, str | None]:
    """``"name@revision"`` to its parts. An existing path is a name as a whole."""
    name, at, revision = source.rpartition("@")
    return (name, revision) if at and name and not Path(source).exists() else (source, None)


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
    message = f"there is no {what} {name!r}: neither a local path nor a Hub id."
    if name.startswith((".", "~", os.sep)) or any(letter in name for letter in "*?[\\"):
        raise FileNotFoundError(message)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(message) from error


def fetch(source: str | os.PathLike, file: str, *, subfolder: str | None = None, **hub) -> Path | None:
    """A file of a folder or Hub repository; `None` where there is no such file.

    Args:
        source (`str` or `os.PathLike`): folder, or Hub id (``id@revision`` too).
        file (`str`): path inside it.
        subfolder (`str`, *optional*): folder inside it that `file` is relative to.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only` of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: `source` is neither a folder nor a possible Hub id.
        OSError: the Hub has no such repository, refuses it, or cannot be reached and the file is not in the cache.
    """
    name, revision = split_revision(os.fspath(source))
    if Path(name).is_dir():
        path = Path(name) / (subfolder or "") / file
        return path if path.is_file() else None
    check_hub_id(name, "model or adapter")
    hub["revision"] = hub.get("revision") or revision
    try:
        return Path(hf_hub_download(name, file, subfolder=subfolder, **hub))
    except EntryNotFoundError:
        return None


def read_json(source: str | os.PathLike, file: str, **hub) -> dict | list | None:
    """A JSON file of a folder or Hub repository, see [`fetch`]. A kind of file that `trust` knows is checked.

    Raises:
        ValueError: not JSON, too large, or not what a file of this name holds.
    """
    path = fetch(source, file, **hub)
    return None if path is None else load_json(path, SCHEMA_OF.get(file))


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
    """Uploads a folder in one commit; the repository is made if it is not there, other files in it stay.

    Args:
        folder (`str` or `os.PathLike`): what to upload.
        repo_id (`str`): ``user/name``.
        commit_message (`str`): the commit's title.
        private (`bool`, *optional*): whether a *new* repository is private; the account's default when omitted.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit instead of making it.
        token (`str` or `bool`, *optional*): Hub token; the stored one when omitted.
        delete (`Sequence[str]`, *optional*): glob patterns of files to take away in the same commit.

    Returns:
        `huggingface_hub.CommitInfo`: with `oid`, `commit_url` and `pr_url`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message,
        create_pr=create_pr,
        delete_patterns=list(delete) or None,
    )
