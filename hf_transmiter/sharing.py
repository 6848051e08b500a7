"""[`push`]: a saved adapter, tuned model or bridge to the Hub, in one commit, with its card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from .anchors import Anchors
from .bridge import Bridge
from .bridge_files import WEIGHTS as BRIDGE
from .cards import by_people, given_metadata, write_card
from .classifier import AnchorClassifier
from .evaluation import evaluate
from .hub import SANDBOX, fetch, hub_errors, is_hub_id, is_public_open_clip, public_name, push_folder, split_revision
from .scores import THIS, Score, read_scores, write_scores
from .transfers import CONFIG, INDEX, SCORES, WEIGHTS, without_paths
from .trust import load_json


CARD = "README.md"
ZERO_SHOT = "zero-shot"
# What belongs into a repository; settings, checkpoints and whatever else lies in the folder stay at home.
SHARED = (
    *(CONFIG, WEIGHTS, BRIDGE, SCORES, CARD),
    *("anchors.json", "calibration.safetensors", "teacher.json", "transfers/*"),
)
# What describes an adapter's weights, and would be wrong beside others.
_OF_THE_WEIGHTS = (SCORES, "calibration.safetensors", "transfers/*")


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """Uploads what `save_pretrained`, `hf-transmiter tune` or `Bridge.save_pretrained` wrote, in one commit.

    The card is written anew from the files; what people added to its metadata (license, datasets, tags), or a card of
    their own, stays, whether it lies in the folder or in the repository. New weights in an existing repository take
    its old scores, calibration and transfers away, which belonged to the old ones; the history keeps them.

    Args:
        folder (`str` or `os.PathLike`): what to share.
        repo_id (`str`): ``user/name``; made if it is not there.
        private (`bool`, *optional*): whether a new repository is private.
        commit_message (`str`, *optional*): the commit's title.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit instead of making it.
        token (`str` or `bool`, *optional*): Hub token; the stored one when omitted.
        base_model (`str`, *optional*): Hub id of the base model, where it was loaded from a local folder.

    Raises:
        FileNotFoundError: nothing to share in the folder.
        ValueError: the base model is a local folder and `base_model` is not given.
        OSError: the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    if not any((folder / file).is_file() for file in (CONFIG, BRIDGE)):
        raise FileNotFoundError(f"there is neither {CONFIG} nor {BRIDGE} in {str(folder)!r}: nothing to share.")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for pattern in SHARED:
            for file in folder.glob(pattern):
                target = scratch / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        if "/" not in repo_id:
            with hub_errors(repo_id):
                repo_id = f"{HfApi(token=token).whoami()['name']}/{repo_id}"
        if (scratch / CONFIG).is_file():
            _name_base_model(scratch, base_model)
        if (scratch / BRIDGE).is_file():
            Bridge.load(scratch / BRIDGE).without_paths().save(scratch / BRIDGE, overwrite=True)
        if (scratch / SCORES).is_file():
            rows = read_scores(scratch / SCORES)
            write_scores(scratch / SCORES, [replace(r, dataset=r.dataset and public_name(r.dataset)) for r in rows])
        head = _head(repo_id, token)
        stale = _stale(scratch, _file_there(repo_id, head, WEIGHTS, token))
        for file in () if stale else (SCORES, INDEX):  # what the repository has stays there: the card tells of it
            theirs = _file_there(repo_id, head, file, token)
            if theirs is not None and not (scratch / file).is_file():
                (scratch / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(theirs, scratch / file)
        _write_card(scratch, repo_id, _file_there(repo_id, head, CARD, token))
        what = "bridge" if (scratch / BRIDGE).is_file() else "adapter"
        return push_folder(
            scratch,
            repo_id,
            commit_message=commit_message or f"Upload {what} with hf_transmiter",
            private=private,
            create_pr=create_pr,
            token=token,
            delete=stale,
        )


def record_scores(
    folder: str | os.PathLike, classifier: AnchorClassifier, dataset, scores: Sequence[Score], **options
) -> None:
    """Notes scores in ``scores.json`` of an adapter's folder, with those of its plain model, and writes its card.

    Rows about the same dataset, split and metric are replaced, others stay.

    Args:
        folder (`str` or `os.PathLike`): of the adapter.
        classifier (`AnchorClassifier`): what was scored.
        dataset (`datasets.Dataset`): what it was scored on.
        scores (`Sequence[Score]`): what `evaluate` returned.
        **options: as they were passed to `evaluate`.
    """
    scores = [replace(score, method=THIS) for score in scores]
    if classifier.adapter_config is not None:  # the encoder below a TransMiter adapter is the plain model
        anchors = Anchors(classifier.class_names, (), classifier.anchors.templates)
        scores += evaluate(AnchorClassifier(classifier.encoder, anchors), dataset, method=ZERO_SHOT, **options)
    path = Path(folder) / SCORES
    known = read_scores(path) if path.is_file() else []
    new = {(score.dataset, score.split, score.metric, score.method) for score in scores}
    kept = [score for score in known if (score.dataset, score.split, score.metric, score.method) not in new]
    write_scores(path, [*kept, *scores])
    write_card(folder)


def name_successor(
    repo_id: str, new_version: str, *, create_pr: bool = False, token: str | bool | None = None
) -> CommitInfo:
    """Says in the card of an old adapter that there is a newer one: the Hub links to it. One commit, of the card only.

    Args:
        repo_id (`str`): of the old adapter.
        new_version (`str`): Hub id of the new one.
        create_pr (`bool`, *optional*, defaults to `False`): propose it, where the old one is somebody else's.

    Raises:
        OSError: the Hub refuses or cannot be reached.
    """
    repo_id, _ = split_revision(repo_id)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        theirs = _file_there(repo_id, _head(repo_id, token), CARD, token)
        card = ModelCard("---\n---\n" if theirs is None else theirs.read_text(encoding="utf-8"))
        card.data.new_version = new_version
        card.save(scratch / CARD)
        message = f"Name {new_version} as the new version"
        return push_folder(scratch, repo_id, commit_message=message, create_pr=create_pr, token=token)


def _write_card(folder: Path, repo_id: str, theirs: Path | None) -> None:
    """The card, with what people said in the repository's card and in the folder's; their text goes before ours."""
    mine, facts = folder / CARD, {}
    if theirs is not None:
        _, facts = given_metadata(theirs, {})
        _, own = given_metadata(mine, {})
        facts |= {
            key: [*facts.get(key, ()), *value] if isinstance(value, list) else value for key, value in own.items()
        }
        if not mine.is_file() or (by_people(mine) is None and by_people(theirs) is not None):
            shutil.copyfile(theirs, mine)
    write_card(folder, name=repo_id, **facts)


def _name_base_model(folder: Path, base_model: str | None) -> None:
    """Puts the model's Hub id where a path of this machine stood, in every file that names models."""
    local = load_json(folder / CONFIG, "adapter_config").get("base_model_name_or_path")
    named = local is None or is_hub_id(local) or local.startswith(SANDBOX) or is_public_open_clip(local)
    if base_model is None and not named:
        raise ValueError(
            f"the base model is the local folder {local!r}, which nobody else has: pass the Hub id it can be found "
            "under, base_model='user/model' (--base-model)."
        )
    names = {} if base_model is None or local is None else {local: base_model}
    for file in (CONFIG, "teacher.json"):
        if (folder / file).is_file():
            text = json.dumps(without_paths(load_json(folder / file), names), indent=2, sort_keys=True)
            (folder / file).write_text(text + "\n", encoding="utf-8")


def _head(repo_id: str, token: str | bool | None) -> str | None:
    """The repository's last commit, `None` where there is no such repository."""
    try:
        with hub_errors(repo_id):
            return HfApi(token=token).model_info(repo_id).sha
    except OSError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return None
        raise


def _file_there(repo_id: str, head: str | None, file: str, token: str | bool | None) -> Path | None:
    return None if head is None else fetch(repo_id, file, revision=head, token=token, strict=True)


def _stale(folder: Path, theirs: Path | None) -> list[str]:
    """Patterns of what the repository's weights `theirs` leave behind when other ones take their place."""
    mine = folder / WEIGHTS
    if theirs is None or not mine.is_file() or theirs.read_bytes() == mine.read_bytes():
        return []
    return list(_OF_THE_WEIGHTS)
