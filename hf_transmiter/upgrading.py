"""[`upgrade`]: any number of adapters to one new model over one bridge, without an image of their tasks.

Per adapter only its names pass through the new model's text tower; the old model is loaded only to build a bridge
where none is given. Whatever is finished is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from huggingface_hub.utils import tqdm

from .anchors import Anchors
from .backbone import DualEncoder
from .bridge import Bridge
from .card_facts import THIS
from .catalog import load_encoder, load_images
from .classifier import AnchorClassifier
from .evaluation import Score, evaluate
from .files import new_folder, replace_file
from .hub import fetch, split_revision
from .report import read_scores, write_scores
from .sharing import ZERO_SHOT, name_successor, push
from .transferring import carry
from .transfers import CONFIG, SCORES, read_adapter, read_config
from .tuners import TransMiterConfig


logger = logging.getLogger(__name__)

REPORT = "upgrade.json"


@dataclass
class Upgraded:
    """What became of one adapter.

    Args:
        source (`str`): folder or Hub id of the old adapter.
        folder (`str`): where the new one is.
        status (`str`): ``"planned"``, ``"upgraded"``, ``"kept"`` (finished by an earlier run) or ``"failed"``.
        model (`str`, *optional*): the old model.
        num_classes (`int`, *optional*): C.
        dataset (`str`, *optional*): what it was scored on, as noted with the old adapter.
        before, zero_shot, after (`float`, *optional*):
            Accuracy in percent of the old adapter (as noted with it), of the new model without and with the adapter.
        remark (`str`, *optional*): why it failed, or why there is no score.
        repo (`str`, *optional*): Hub id it was pushed to, or would be.
        seconds (`float`, *optional*): to carry it over.
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

    Each becomes a folder of `output_dir`, written in one step. It is scored on the dataset that the old adapter's
    ``scores.json`` names, where that can be loaded. One that cannot be upgraded does not stop the others.

    Args:
        sources (`Sequence[str]`): folders or Hub ids of adapters.
        strong (`DualEncoder`): the new model.
        output_dir (`str` or `os.PathLike`): folder for the adapters, ``upgrade.json`` and bridges built here.
        bridge (`Bridge`, *optional*):
            From the adapters' model to `strong`; built from text alone where omitted, once per old model.
        dry_run (`bool`, *optional*, defaults to `False`): say what would be done; nothing is written or loaded.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Share each under the old name with the new model's behind it, and name it in the old card as
            `new_version`. Adapters of local folders are not pushed.
        private, create_pr, token (*optional*): as in [`push`]; `create_pr` is for the old card.
        images (`Callable[[str, str], Dataset]`, *optional*):
            Dataset of a name and split, for scores; `catalog.load_images` when omitted.
        **embedding: passed to `embed_dataset`.

    Returns:
        `list[Upgraded]`: one per source, in order.

    Raises:
        ValueError: two sources with one name, or a folder of `output_dir` that holds another model's adapter.
    """
    output = Path(output_dir)
    rows = _plan(sources, strong, output, push_to_hub)
    if dry_run:
        for row in rows:
            _look(row, strong, bridge, output)
        return rows
    output.mkdir(parents=True, exist_ok=True)
    known = _known(output / REPORT)
    run = _Run(strong, bridge, output, images or _images, {"progress": progress, **embedding})
    options = {"private": private, "create_pr": create_pr, "token": token}
    for number, row in enumerate(tqdm(rows, desc="adapters", disable=not progress)):
        try:
            run.carry(row, known.get(row.source))
            if row.repo is not None:
                done = known.get(row.source, {})
                if row.status == "upgraded" or done.get("pushed") != row.repo:
                    _share(row, **options)
        except (ValueError, OSError) as error:
            row.status, row.remark = "failed", str(error)
            logger.warning("%s was not upgraded: %s", row.source, error)
        _write(output / REPORT, rows[: number + 1], known)
    return rows


def upgrade_table(rows: Sequence[Upgraded]) -> str:
    """What became of each, as a markdown table."""
    lines = [
        "| adapter | classes | old, % | new model zero-shot, % | upgraded, % | gain | |",
        "|:---|---:|---:|---:|---:|---:|:---|",
    ]
    for row in rows:
        numbers = [_percent(value) for value in (row.before, row.zero_shot, row.after)]
        gain = "" if None in (row.before, row.after) else f"{row.after - row.before:+.1f}"
        said = "; ".join(filter(None, (row.status, row.repo, row.remark)))
        cells = [row.source, row.num_classes or "", *numbers, gain, said]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


class _Run:
    """What the adapters of one run share: the new model, bridges by old model, datasets."""

    def __init__(self, strong: DualEncoder, bridge: Bridge | None, output: Path, images: Callable, embedding: dict):
        self.strong, self.bridge, self.output, self.images = strong, bridge, output, images
        self.embedding, self.built, self.loaded = embedding, {}, {}

    def carry(self, row: Upgraded, known: dict | None) -> None:
        """Fills in the row and its folder, if that is not there yet."""
        content, tensors = read_adapter(row.source)
        _describe(row, content)
        if (Path(row.folder) / CONFIG).is_file():
            row.status = "kept"
            if known is not None:
                for key in ("dataset", "before", "zero_shot", "after", "remark", "seconds"):
                    setattr(row, key, known.get(key))
            return
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
        """From text alone, once per old model, and kept for the next run."""
        name, revision = content.get("base_model_name_or_path"), content.get("revision")
        if not name:
            raise ValueError("the adapter does not name its model: pass a bridge.")
        if (name, revision) not in self.built:
            weak = load_encoder(name, revision, device=self.strong.device, dtype=self.strong.dtype)
            path = self.output / "bridges" / f"{_slug(name)}-{weak.fingerprint[:8]}.safetensors"
            if path.is_file():
                self.built[name, revision] = Bridge.load(path)
            else:
                self.built[name, revision] = Bridge.build(weak, self.strong)
                self.built[name, revision].save(path)
        return self.built[name, revision]

    def _score(self, row: Upgraded, classifier: AnchorClassifier) -> list[Score]:
        """Of the upgraded adapter and the new model without it, on what the old adapter was scored on."""
        path = fetch(row.source, SCORES)
        old = [score for score in read_scores(path) if score.metric == "accuracy"] if path is not None else []
        noted = next((score for score in old if score.method == THIS and score.dataset), None)
        if noted is None:
            row.remark = "not scored: nothing is noted with it about a dataset"
            return []
        row.dataset, row.before = noted.dataset, noted.value
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


def _plan(sources: Sequence[str], strong: DualEncoder, output: Path, push_to_hub: bool) -> list[Upgraded]:
    names = [_slug(Path(source).resolve().name if Path(source).is_dir() else source) for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two adapters have the same name, {', '.join(twice)}: upgrade them in separate runs.")
    rows, behind = [], _slug(Path(strong.name_or_path or "upgraded").name.split(":")[-1])
    for source, name in zip(sources, names, strict=True):
        folder = output / name
        if (folder / CONFIG).is_file() and read_config(folder)["base_fingerprint"] != strong.fingerprint:
            raise ValueError(f"{folder} holds an adapter of another model: choose another output folder.")
        repo = None if Path(source).is_dir() or not push_to_hub else f"{split_revision(source)[0]}-{behind}"
        rows.append(Upgraded(source, str(folder), repo=repo))
    return rows


def _look(row: Upgraded, strong: DualEncoder, bridge: Bridge | None, output: Path) -> None:
    """What can be known of an adapter before anything is done."""
    try:
        content = read_config(row.source)
        _describe(row, content)
        if bridge is not None and content.get("base_fingerprint") not in (None, bridge.weak.fingerprint):
            raise ValueError(f"the bridge begins at {bridge.weak.name!r}, the adapter was made for {row.model!r}")
        if content.get("base_fingerprint") == strong.fingerprint:
            raise ValueError("it is an adapter of the new model already")
        if (Path(row.folder) / CONFIG).is_file():
            row.status = "kept"
    except (ValueError, OSError) as error:
        row.status, row.remark = "failed", str(error)


def _describe(row: Upgraded, content: dict) -> None:
    row.model, row.num_classes = content.get("base_model_name_or_path"), len(content["class_names"])


def _share(row: Upgraded, *, create_pr: bool, **options) -> None:
    push(row.folder, row.repo, **options)
    name_successor(row.source, row.repo, create_pr=create_pr, token=options["token"])


def _images(dataset: str, split: str) -> Dataset:
    return load_images(dataset, split)


def _known(path: Path) -> dict[str, dict]:
    """Rows of an earlier run by source."""
    if not path.is_file():
        return {}
    return {row["source"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def _write(path: Path, rows: Sequence[Upgraded], known: dict[str, dict]) -> None:
    kept = {row.source: asdict(row) | {"pushed": row.repo if row.status != "failed" else None} for row in rows}
    text = json.dumps({"rows": list({**known, **kept}.values())}, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", split_revision(name)[0]).strip("-.") or "adapter"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
