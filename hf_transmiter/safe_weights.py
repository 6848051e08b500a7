"""[`load_safetensors`]: of a model whose weights are pickles, the Hub's own conversion of them is read or nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .files import replace_file
from .hub import cached_commit, hub_errors
from .trust import PICKLES


logger = logging.getLogger(__name__)

CONVERTER = "SFconvertbot"  # the account of https://huggingface.co/spaces/safetensors/convert
_NOTE = ".converted"  # in a model's folder of the cache: which pull request is the converter's
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)

Model = TypeVar("Model")


def load_safetensors(
    load: Callable[..., Model],
    name: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> tuple[Model, str | None]:
    """A model by transformers: where its main branch has pickles only, from [`converted_revision`].

    Args:
        load (`Callable`): takes `revision` and loads safetensors only.
        name (`str`): folder, or Hub id of a model whose `config.json` has been read.
        revision (`str`, *optional*): taken as it is; the main branch, or else the conversion, when omitted.
        token (`str` or `bool`, *optional*), cache_dir (`str` or `os.PathLike`, *optional*),
        local_files_only (`bool`, *optional*, defaults to `False`): of the Hub and its cache.

    Returns:
        the model, and the revision it was loaded from.

    Raises:
        OSError: what [`no_safetensors`] says (transformers advises to read pickles), or what `load` raised.
    """
    # By its commit: for "main" transformers may ask a service to convert the pickles, and take the result unnamed.
    commit = cached_commit(name, revision, cache_dir) or revision
    try:
        return load(revision=commit), commit
    except OSError as error:
        converted = None if revision else converted_revision(name, token, cache_dir, local_files_only)
        if converted is None:
            reason = None if local_files_only else no_safetensors(name, revision, token)
            if reason is None:
                raise
            raise OSError(reason) from error
    return load(revision=converted), converted  # out of the handler: an error here is not about the main branch


def converted_revision(
    name: str,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> str | None:
    """The newest pull request in which the Hub's own converter proposes safetensors for a model that has only pickles.

    What others propose is never taken. Without a network: the one that was found before, if its weights are cached.

    Args:
        name (`str`): Hub id, without a revision.
        token (`str` or `bool`, *optional*), cache_dir (`str` or `os.PathLike`, *optional*),
        local_files_only (`bool`, *optional*, defaults to `False`): of the Hub and its cache.

    Returns:
        `str` or `None`: ``"refs/pr/N"``, with a warning that says so; `None` where there is none or the Hub does not
        answer. Never raises.
    """
    if Path(name).exists():
        return None
    offline = local_files_only or constants.HF_HUB_OFFLINE
    note = Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), _NOTE)
    try:
        found = _cached_conversion(name, note, cache_dir) if offline else _find_conversion(name, token)
    except Exception:  # whatever it is, that the weights could not be loaded is what is to be said
        logger.debug("conversion of %s", name, exc_info=True)
        return None
    if found is None:
        return None
    if not offline:
        try:
            replace_file(note, lambda path: path.write_text(found, encoding="utf-8"))
        except OSError:  # a cache that is only read
            logger.debug("%s", note, exc_info=True)
    _say_taken(name, found)
    return found


def _find_conversion(name: str, token: str | bool | None) -> str | None:
    api = HfApi(token=token)
    with hub_errors(name):
        if _pickles_only(api, name) is None:
            return None
        proposals = api.get_repo_discussions(name, author=CONVERTER, discussion_type="pull_request")
        # The Hub was asked for these only, but whose weights are read is not left to its filter.
        numbers = sorted(each.num for each in proposals if each.author == CONVERTER and each.is_pull_request)
        refs = (f"refs/pr/{number}" for number in reversed(numbers))
        return next((ref for ref in refs if any(api.file_exists(name, file, revision=ref) for file in _WEIGHTS)), None)


def _cached_conversion(name: str, note: Path, cache_dir: str | os.PathLike | None) -> str | None:
    # The cache does not say who proposed what is in it: a stranger's pull request, taken by name before, may be too.
    if not note.is_file():
        return None
    ref = note.read_text(encoding="utf-8")
    found = (try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=ref) for file in _WEIGHTS)
    return ref if any(isinstance(path, str) for path in found) else None


@lru_cache
def _say_taken(name: str, ref: str) -> None:
    """Once per process."""
    logger.warning(
        f"{name} has no safetensors on its main branch; taking those of the Hub's converter, {ref}: pin {name}@{ref}"
    )


def _pickles_only(api: HfApi, name: str, revision: str | None = None) -> list[str] | None:
    """Pickles at the top of a repository that has no safetensors there; `None` of any other."""
    files = [file for file in api.list_repo_files(name, revision=revision) if "/" not in file]
    pickles = [file for file in files if Path(file).suffix in PICKLES]
    return None if not pickles or any(file.endswith(".safetensors") for file in files) else pickles


def no_safetensors(name: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """Why a model without safetensors cannot be read, and what may help: for some models somebody has proposed them in
    a pull request, which may be taken by name.

    Args:
        name (`str`), revision (`str`, *optional*), token (`str` or `bool`, *optional*): of the model.

    Returns:
        `str` or `None`: `None` where that is not what is wrong, or where the Hub does not answer.
    """
    if constants.HF_HUB_OFFLINE or Path(name).exists():
        return None
    api = HfApi(token=token)
    try:
        with hub_errors(name):
            pickles = _pickles_only(api, name, revision)
            if pickles is None:
                return None
            refs = api.list_repo_refs(name, include_pull_requests=True).pull_requests or []
            refs = sorted((ref.ref for ref in refs), key=lambda ref: int(ref.rsplit("/", 1)[-1]))
            found = next((ref for ref in refs if api.file_exists(name, SAFE_WEIGHTS_NAME, revision=ref)), None)
    except (OSError, HFValidationError):
        return None
    said = f"{name!r} has no {SAFE_WEIGHTS_NAME}, and {pickles[0]} is not read: such files run the code in them."
    if found:
        return f"{said} There is a pull request with {SAFE_WEIGHTS_NAME}: if you trust it, take {name}@{found}."
    return f"{said} Ask its owner for {SAFE_WEIGHTS_NAME}, or convert it where that is safe and share the result."
