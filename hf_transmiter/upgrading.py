"""[`upgrade`]: any number of adapters to one strong model over one bridge, without an image of their tasks.

Per adapter only its names pass through the strong model's text tower; the weak model is loaded only to build a bridge
where none is given. Whatever is finished is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import tqdm

from .anchors import Anchors
from .backbone import DualEncoder
from .bridge import Bridge
from .catalog import load_images
from .classifier import AnchorClassifier
from .evaluation import evaluate
from .files import new_folder, replace_file
from .hub import SANDBOX, fetch, hub_errors, is_hub_id, split_revision
from .scores import THIS, Score, read_scores, write_scores
from .sharing import ZERO_SHOT, name_successor, push
from .transferring import carry, check_bridge
from .transfers import CONFIG, SCORES, WEIGHTS, read_adapter, read_config
from .tuners import TransMiterConfig


logger = logging.getLogger(__name__)

REPORT = "upgrade.json"
# What an earlier run found out about a finished adapter, taken over from its report.
_FACTS = ("dataset", "before", "zero_shot", "after", "seconds", "weights", "pushed", "push_error")
_OF_A_BRIDGE = ("space", "num_pairs", "alignment", "held_out")  # tell one from another


@dataclass
class Upgraded:
    """What became of one adapter.

    Args:
        source (`str`): folder or Hub id of the weak model's adapter.
        folder (`str`): where the strong model's is.
        status (`str`):
            ``"planned"``, ``"upgraded"``, ``"kept"`` (finished by an earlier run), ``"upgraded, not pushed"`` or
            ``"failed"``.
        model (`str`, *optional*): the weak model.
        num_classes (`int`, *optional*): C.
        dataset (`str`, *optional*): what it was scored on, as noted with the weak model's adapter.
        before, zero_shot, after (`float`, *optional*):
            Accuracy in percent of the weak model's adapter (as noted with it), of the strong model without and with
            the adapter.
        remark (`str`, *optional*): why it failed, or why there is no score.
        repo (`str`, *optional*): Hub id it is pushed to in this run, or would be.
        seconds (`float`, *optional*): to carry it over.
        weights (`str`, *optional*): SHA-256 of the weights it was made from.
        pushed (`str`, *optional*): Hub id it was pushed to, by this run or an earlier one.
        push_error (`str`, *optional*): what went wrong with that; the next run with a push tries again.
    """

    source: str
    folder: str
    status: str = "planned"
    model: str | None = None
    num_classes: int | None = None
    dataset: str | None = None
    before: float | None = None
    zero_shot: float | None = None
    after: float | None = None
    remark: str | None = None
    repo: str | None = None
    seconds: float | None = None
    weights: str | None = None
    pushed: str | None = None
    push_error: str | None = None


def upgrade(
    sources: Sequence[str],
    strong: DualEncoder,
    output_dir: str | os.PathLike,
    *,
    bridge: Bridge | None = None,
    dry_run: bool = False,
    push_to_hub: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    images: Callable[[str, str], Dataset] | None = None,
    progress: bool = True,
    **embedding,
) -> list[Upgraded]:
    """Carries TransMiter adapters over to a stronger model.

    Each becomes a folder of `output_dir`, written in one step. It is scored on the dataset that the adapter's
    ``scores.json`` names, where that can be loaded; for an adapter from the Hub only a dataset of the Hub is. One that
    cannot be upgraded does not stop the others.

    Args:
        sources (`Sequence[str]`): folders or Hub ids of adapters.
        strong (`DualEncoder`): the model they are for from now on.
        output_dir (`str` or `os.PathLike`): folder for the adapters, ``upgrade.json`` and bridges built here.
        bridge (`Bridge`, *optional*):
            From the adapters' model to `strong`; built from text alone where omitted, once per weak model.
        dry_run (`bool`, *optional*, defaults to `False`): say what would be done; nothing is written or loaded.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Share each among the caller's own repositories, under its name with the strong model's behind it, and
            name it in the card of the source as `new_version`. Adapters of local folders are not pushed.
        private (`bool`, *optional*): whether new repositories are private; as the source is when omitted.
        create_pr (`bool`, *optional*, defaults to `False`):
            Propose the change of the source's card, where that is somebody else's.
        token (`str` or `bool`, *optional*): Hub token, for reading too; the stored one when omitted.
        images (`Callable[[str, str], Dataset]`, *optional*):
            Dataset of a name and split, for scores; `catalog.load_images` when omitted.
        **embedding: passed to `embed_dataset`.

    Returns:
        `list[Upgraded]`: one per source, in order.

    Raises:
        ValueError: two sources with one name, or a folder of `output_dir` that holds another model's adapter.
        OSError: `push_to_hub` without a login.
    """
    output, hub = Path(output_dir), {"token": token}
    rows, known = _plan(sources, strong, output), _known(output / REPORT)
    if dry_run:
        for row in rows:
            _look(row, strong, bridge, known.get(row.source), hub)
        if push_to_hub:
            try:
                _choose_repos(rows, strong, token)
            except OSError as error:
                for row in rows:
                    row.remark = "; ".join(filter(None, (row.remark, f"cannot be pushed: {error}")))
        return rows
    if push_to_hub:
        _choose_repos(rows, strong, token)
    output.mkdir(parents=True, exist_ok=True)
    run = _Run(strong, bridge, output, images or load_images, {"progress": progress, **embedding}, hub)
    for number, row in enumerate(tqdm(rows, desc="adapters", disable=not progress)):
        try:
            run.carry(row, known.get(row.source))
        except (ValueError, OSError) as error:
            row.status, row.remark = "failed", str(error)
            logger.warning("%s was not upgraded: %s", row.source, error)
        if row.status != "failed" and row.repo is not None and row.pushed != row.repo:
            _share(row, private, create_pr, token)
        _write(output / REPORT, rows[: number + 1], known)
    return rows


def upgrade_table(rows: Sequence[Upgraded]) -> str:
    """What became of each, as a markdown table."""
    lines = [
        "| adapter | classes | weak, % | zero-shot strong, % | upgraded, % | gain | |",
        "|:---|---:|---:|---:|---:|---:|:---|",
    ]
    for row in rows:
        numbers = [_percent(value) for value in (row.before, row.zero_shot, row.after)]
        gain = "" if None in (row.before, row.after) else f"{row.after - row.before:+.1f}"
        said = "; ".join(filter(None, (row.status, row.repo, row.push_error, row.remark)))
        cells = [row.source, row.num_classes or "", *numbers, gain, said]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


class _Run:
    """What the adapters of one run share: the strong model, bridges by weak model, datasets."""

    def __init__(
        self, strong: DualEncoder, bridge: Bridge | None, output: Path, images: Callable, embedding: dict, hub: dict
    ):
        self.strong, self.bridge, self.output, self.images = strong, bridge, output, images
        self.embedding, self.hub, self.built, self.loaded = embedding, hub, {}, {}

    def carry(self, row: Upgraded, known: dict | None) -> None:
        """Fills in the row and its folder, if that is not there yet."""
        if _take_over(row, known):
            content = read_config(row.source, **self.hub)
            _describe(row, content)
            _check_kept(row, self.bridge, self.hub)
            row.status = "kept"
            return
        content, tensors = read_adapter(row.source, **self.hub)
        _describe(row, content)
        _check_form(content, self.strong, self.bridge)
        row.weights = _sha256(row.source, self.hub)
        bridge = self.bridge or self._bridge(content)
        start = time.perf_counter()
        config, upgraded = carry(content, tensors, self.strong, bridge)
        config = TransMiterConfig.from_peft_type(**config)
        classifier = AnchorClassifier(self.strong, config.anchors, upgraded["anchors"].to(self.strong.device))
        classifier.add_adapter(config, upgraded)
        row.seconds = time.perf_counter() - start
        scores = self._score(row, classifier)

        def write(folder: Path) -> None:
            if scores:
                write_scores(folder / SCORES, scores)
            classifier.save_pretrained(folder)

        new_folder(row.folder, write)
        row.status = "upgraded"

    def _bridge(self, content: dict) -> Bridge:
        """From text alone, once per weak model, and kept for the next run."""
        name, revision = content.get("base_model_name_or_path"), content.get("revision")
        if not name:
            raise ValueError("the adapter does not name its model: pass a bridge.")
        if (name, revision) not in self.built:
            on = {"device": self.strong.device, "dtype": self.strong.dtype, **self.hub}
            weak = DualEncoder.from_pretrained(name, revision=revision, **on)
            pair = f"{weak.fingerprint[:8]}-{self.strong.fingerprint[:8]}"
            path = self.output / "bridges" / f"{_slug(name)}-{pair}.safetensors"
            if path.is_file():
                self.built[name, revision] = Bridge.load(path)
            else:
                self.built[name, revision] = Bridge.build(weak, self.strong)
                self.built[name, revision].save(path)
        return self.built[name, revision]

    def _score(self, row: Upgraded, classifier: AnchorClassifier) -> list[Score]:
        """Of the upgraded adapter and the strong model without it, on what the weak model's was scored on."""
        path = fetch(row.source, SCORES, **self.hub)
        try:
            old = [score for score in read_scores(path) if score.metric == "accuracy"] if path is not None else []
        except ValueError as error:
            row.remark = f"not scored: {SCORES} of the source is damaged ({error})"
            return []
        noted = next((score for score in old if score.method == THIS and score.dataset), None)
        if noted is None:
            row.remark = "not scored: nothing is noted with it about a dataset"
            return []
        row.dataset, row.before = noted.dataset, noted.value
        if not (
            _is_local(row.source) or is_hub_id(split_revision(noted.dataset)[0]) or noted.dataset.startswith(SANDBOX)
        ):
            # Whoever wrote that file does not choose what is read on this machine.
            row.remark = f"not scored: {noted.dataset!r} is no dataset of the Hub"
            return []
        key = (noted.dataset, noted.split)
        try:
            if key not in self.loaded:
                self.loaded[key] = self.images(*key)
            on = {"split": noted.split, "dataset_name": noted.dataset, **self.embedding}
            zero_shot = AnchorClassifier(
                self.strong, Anchors(classifier.class_names, (), classifier.anchors.templates)
            )
            scores = evaluate(classifier, self.loaded[key], method=THIS, **on)
            scores += evaluate(zero_shot, self.loaded[key], method=ZERO_SHOT, **on)
        except (ValueError, OSError) as error:
            row.remark = f"not scored: {error}"
            return []
        row.after, row.zero_shot = (next(s.value for s in scores if s.method == m) for m in (THIS, ZERO_SHOT))
        return scores


def _plan(sources: Sequence[str], strong: DualEncoder, output: Path) -> list[Upgraded]:
    names = [_slug(Path(source).resolve().name if Path(source).is_dir() else source) for source in sources]
    _check_unique(names, "two adapters have the same name, {}: upgrade them in separate runs.")
    for folder in (output / name for name in names):
        if (folder / CONFIG).is_file() and read_config(folder).get("base_fingerprint") != strong.fingerprint:
            raise ValueError(f"{folder} holds an adapter of another model: choose another output folder.")
    return [Upgraded(source, str(output / name)) for source, name in zip(sources, names, strict=True)]


def _choose_repos(rows: Sequence[Upgraded], strong: DualEncoder, token: str | bool | None) -> None:
    """Among the caller's own: nobody may write to another's."""
    rows = [row for row in rows if not _is_local(row.source)]
    if not rows:
        return
    with hub_errors("your account"):
        user = HfApi(token=token).whoami()["name"]
    behind = _slug(Path(strong.name_or_path or "upgraded").name.split(":")[-1])
    names = [f"{user}/{split_revision(row.source)[0].split('/')[-1]}-{behind}" for row in rows]
    _check_unique(names, "two adapters would be pushed to {}: upgrade one of them without a push, then push it.")
    for row, name in zip(rows, names, strict=True):
        row.repo = name


def _check_unique(names: Sequence[str], message: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(message.format(", ".join(twice)))


def _look(row: Upgraded, strong: DualEncoder, bridge: Bridge | None, known: dict | None, hub: dict) -> None:
    """What can be known of an adapter before anything is done."""
    try:
        kept, content = _take_over(row, known), read_config(row.source, **hub)
        _describe(row, content)
        if kept:
            _check_kept(row, bridge, hub)
            row.status = "kept"
        else:
            _check_form(content, strong, bridge)
    except (ValueError, OSError) as error:
        row.status, row.remark = "failed", str(error)


def _take_over(row: Upgraded, known: dict | None) -> bool:
    """Whether an earlier run finished this adapter; the row then gets what that found out."""
    if not (Path(row.folder) / CONFIG).is_file():
        return False
    for key in _FACTS if known is not None else ():
        setattr(row, key, known.get(key))
    if known is not None and known["status"] != "failed":
        row.remark = known.get("remark")
    return True


def _check_kept(row: Upgraded, bridge: Bridge | None, hub: dict) -> None:
    """
    Raises:
        ValueError: the finished adapter was made from other weights, or over another bridge.
    """
    if row.weights not in (None, _sha256(row.source, hub)):
        raise ValueError(f"{row.folder} was made from other weights; remove the folder to make it anew.")
    over = (read_config(row.folder).get("provenance") or {}).get("bridge")
    if None not in (bridge, over) and any(over.get(key) != getattr(bridge, key) for key in _OF_A_BRIDGE):
        raise ValueError(f"{row.folder} was made over another bridge; remove the folder to make it anew.")


def _check_form(content: dict, strong: DualEncoder, bridge: Bridge | None) -> None:
    """
    Raises:
        ValueError: the adapter cannot be carried to `strong` over this bridge, or one built from text.
    """
    if content.get("base_fingerprint") == strong.fingerprint:
        raise ValueError("it is an adapter of the strong model already.")
    source = TransMiterConfig.from_peft_type(**content)
    if bridge is not None:
        check_bridge(source, strong, bridge)
    elif source.form == "mlp":
        raise ValueError("a published (mlp) adapter does not cross a bridge built from text: pass one in logit space.")


def _describe(row: Upgraded, content: dict) -> None:
    row.model, row.num_classes = content.get("base_model_name_or_path"), len(content["class_names"])


def _share(row: Upgraded, private: bool | None, create_pr: bool, token: str | bool | None) -> None:
    """Pushes the adapter and names it in the card of its source; what goes wrong is noted in the row."""
    source, failed = split_revision(row.source)[0], "upgraded, not pushed"
    try:
        if private is None:
            with hub_errors(source):
                private = HfApi(token=token).model_info(source).private
        push(row.folder, row.repo, private=private, token=token)
        failed = None
        name_successor(source, row.repo, create_pr=create_pr, token=token)
        row.pushed, row.push_error = row.repo, None
    except (ValueError, OSError) as error:
        row.status = failed or row.status
        row.push_error = str(error) if failed else f"pushed, but the card of {source} does not name it: {error}"
        logger.warning("%s: %s", row.repo, row.push_error)


def _is_local(source: str) -> bool:
    return Path(split_revision(source)[0]).is_dir()


def _sha256(source: str, hub: dict) -> str:
    return hashlib.sha256(fetch(source, WEIGHTS, **hub).read_bytes()).hexdigest()


def _known(path: Path) -> dict[str, dict]:
    """Rows of an earlier run by source."""
    if not path.is_file():
        return {}
    return {row["source"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def _write(path: Path, rows: Sequence[Upgraded], known: dict[str, dict]) -> None:
    done = {row.source: asdict(row) for row in rows}
    text = json.dumps({"rows": list({**known, **done}.values())}, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", split_revision(name)[0]).strip("-.") or "adapter"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
