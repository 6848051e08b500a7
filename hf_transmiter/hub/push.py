"""[`push`]: a saved adapter, tuned model or bridge to the Hub, in one commit, with its card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .adapter_files import BRIDGE, CALIBRATION, CONFIG, SCORES, TEACHER_FILE, WEIGHTS, without_paths
from .card import README, by_people, given_metadata, write_card
from .card_text import NamedModel
from .checks import as_list, load_json, read_header
from .files import read_metadata_json, replace_metadata
from .repo import fetch, hub_errors, public_name, push_folder, refuse_links_out
from .scores import read_scores, write_scores


# What belongs into a repository; settings, checkpoints and whatever else lies in the folder stay at home.
SHARED = (CONFIG, WEIGHTS, BRIDGE, SCORES, README, CALIBRATION, TEACHER_FILE)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    base_model: str | None = None,
    subfolder: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> CommitInfo:
    """Uploads what `save_pretrained`, `hf-transmiter tune` or `Bridge.save_pretrained` wrote, in one commit.

    The card is written anew from the files; what people added to its metadata (license, datasets, tags), or a card of
    their own, stays, whether it lies in the folder or in the repository. New weights in the place of others take their
    scores and calibration away, which belonged to the old ones; the history keeps them.

    Args:
        folder (`str` or `os.PathLike`), repo_id (`str`): from where, and to which ``user/name`` (made if not there).
        private, commit_message, create_pr, token: as in huggingface_hub.
        base_model (`str`, *optional*): Hub id of the base model, where it was loaded from a local folder.
        subfolder (`str`, *optional*):
            Folder of the repository that it goes to, such as what an adapter there has become on another model. The
            Hub shows one card per repository, so none is written.
        license (`str`, *optional*), tags (`Sequence[str]`, *optional*): for the card.

    Raises:
        FileNotFoundError: nothing to share in the folder.
        ValueError: the base model is a local folder and `base_model` is not given, or a file is a link out of the
            folder.
        OSError: the Hub refuses or cannot be reached.
    """
    folder, tags = Path(folder), as_list(tags, "tags")
    if subfolder is not None and (license is not None or tags):
        raise ValueError("license and tags are for the card, which no subfolder has: leave them out.")
    if not any((folder / file).is_file() for file in (CONFIG, BRIDGE)):
        raise FileNotFoundError(f"there is neither {CONFIG} nor {BRIDGE} in {str(folder)!r}: nothing to share.")
    refuse_links_out(folder, SHARED)
    if (folder / CONFIG).is_file():
        load_json(folder / CONFIG, "adapter_config")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / (subfolder or "")
        place.mkdir(parents=True, exist_ok=True)
        for file in SHARED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, place / file)
        api = HfApi(token=token)
        with hub_errors(repo_id):
            repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        if (place / CONFIG).is_file():
            _name_base_model(place, base_model)
        if (place / BRIDGE).is_file():
            _hide_paths(place / BRIDGE)
        if (place / SCORES).is_file():
            rows = read_scores(place / SCORES)
            write_scores(place / SCORES, [replace(r, dataset=r.dataset and public_name(r.dataset)) for r in rows])
        with hub_errors(repo_id):
            head = api.model_info(repo_id).sha if api.repo_exists(repo_id) else None
        there = {"revision": head, "subfolder": subfolder, "token": token}
        new, old = place / WEIGHTS, _file_there(repo_id, WEIGHTS, **there)
        replaced = old is not None and new.is_file() and old.read_bytes() != new.read_bytes()
        stale = [SCORES, CALIBRATION] if replaced else []
        scores = None if stale else _file_there(repo_id, SCORES, **there)
        # What the repository has stays: the card tells of it.
        if scores is not None and not (place / SCORES).is_file():
            shutil.copyfile(scores, place / SCORES)
        if subfolder is None:
            facts = {"license": license, "tags": list(tags)}
            _write_card(place, repo_id, _file_there(repo_id, README, **there), facts)
        else:
            (place / README).unlink(missing_ok=True)
        what = "bridge" if (place / BRIDGE).is_file() else "adapter"
        return push_folder(
            scratch,
            repo_id,
            commit_message=commit_message or f"Upload {what} with hf_transmiter",
            private=private,
            create_pr=create_pr,
            token=token,
            delete=[f"{subfolder}/{file}" if subfolder else file for file in stale],
        )


def _write_card(folder: Path, repo_id: str, theirs: Path | None, said: dict) -> None:
    """The card, with what people said in the repository's card, in the folder's and now; their text goes before
    ours."""
    mine = folder / README
    facts = given_metadata(mine, said)[1]
    if theirs is not None:
        facts = given_metadata(theirs, facts)[1]
    if theirs is not None and (not mine.is_file() or (by_people(mine) is None and by_people(theirs) is not None)):
        shutil.copyfile(theirs, mine)
    write_card(folder, name=repo_id, **facts)


def _hide_paths(path: Path) -> None:
    """Puts names where paths of this machine stand in the facts of a bridge."""
    metadata, _ = read_header(path, "bridge")
    facts = read_metadata_json(path, metadata, "bridge", "bridge")
    replace_metadata(path, {**metadata, "bridge": json.dumps(without_paths(facts))})


def _name_base_model(folder: Path, base_model: str | None) -> None:
    """Puts the model's Hub id where a path of this machine stood, in every file that names models."""
    local = load_json(folder / CONFIG, "adapter_config").get("base_model_name_or_path")
    if base_model is None and local is not None and NamedModel(local).kind is None:
        raise ValueError(
            f"the base model is the local folder {local!r}, which nobody else has: pass the Hub id it can be found "
            "under, base_model='user/model' (--base-model)."
        )
    names = {} if base_model is None or local is None else {local: base_model}
    for file in (CONFIG, TEACHER_FILE):
        if (folder / file).is_file():
            text = json.dumps(without_paths(load_json(folder / file), names), indent=2, sort_keys=True)
            (folder / file).write_text(text + "\n", encoding="utf-8")


def _file_there(repo_id: str, file: str, revision: str | None, **hub) -> Path | None:
    return None if revision is None else fetch(repo_id, file, revision=revision, strict=True, **hub)
