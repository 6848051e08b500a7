"""[`no_safetensors`]: what to do about a model of the Hub whose weights are pickles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from transformers.utils import SAFE_WEIGHTS_NAME

from .hub import hub_errors
from .trust import PICKLES


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
            files = [file for file in api.list_repo_files(name, revision=revision) if "/" not in file]
            pickles = [file for file in files if Path(file).suffix in PICKLES]
            if not pickles or any(file.endswith(".safetensors") for file in files):
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


@contextmanager
def safetensors_only(name: str, revision: str | None = None, token: str | bool | None = None) -> Iterator[None]:
    """Around a load of safetensors by transformers, whose message advises to read pickles.

    Raises:
        OSError: what [`no_safetensors`] says, or what was raised inside.
    """
    try:
        yield
    except OSError as error:
        reason = no_safetensors(name, revision, token)
        if reason is None:
            raise
        raise OSError(reason) from error
