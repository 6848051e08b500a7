"""[`prepare`]: everything a machine without a network needs, into the caches of huggingface_hub and datasets.

Whatever is named is read here by the same functions that read it in the job, so nothing is missed and nothing else is
fetched. Without a network the same call only looks whether the caches are complete.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets.config
from datasets import Dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import constants
from huggingface_hub.utils import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .bench_config import BenchConfig
from .bridge import Bridge
from .bridge_files import WEIGHTS as BRIDGE
from .calibration import CalibrationPack
from .catalog import load_encoder
from .classifier import CALIBRATION
from .dataset_specs import DatasetSpec, find_spec, load_split
from .download_sizes import builder_of, check_room, in_words, on_hub
from .features import guess_columns
from .hub import OPEN_CLIP, SANDBOX, fetch, read_json, split_revision
from .image_sources import list_splits, open_split
from .safe_weights import converted_revision, no_safetensors
from .transfers import CONFIG, INDEX, SCORES, TEACHER_FILE, WEIGHTS, TeacherFacts, list_transfers, read_config
from .trust import check_adapter_tensors
from .tuners import PeftType


logger = logging.getLogger(__name__)

_OF_AN_ADAPTER = ("README.md", "anchors.json", SCORES, INDEX)  # what is not read below


@dataclass
class Prepared:
    """One thing that a job reads.

    Args:
        kind (`str`): ``"model"``, ``"adapter"``, ``"bridge"`` or ``"dataset"``.
        name (`str`): as it was named.
        status (`str`): ``"there"``, ``"fetched"`` or ``"failed"``.
        source (`str`): ``"Hub"``, ``"this machine"`` (a folder or file, to be copied too) or ``"this package"``.
        revision (`str`, *optional*): commit in the Hub's repository; ``name@revision`` is this version for ever.
        files (`int`), num_bytes (`int`): in the caches; of a dataset both as downloaded and as read (Arrow).
        needed_by (`str`, *optional*): the adapter whose base model it is.
        remark (`str`, *optional*): why it failed, or what to beware of.
    """

    kind: str
    name: str
    status: str = "failed"
    source: str = "Hub"
    revision: str | None = None
    files: int = 0
    num_bytes: int = 0
    needed_by: str | None = None
    remark: str | None = None


def prepare(
    models: Sequence[str] = (),
    adapters: Sequence[str] = (),
    bridges: Sequence[str] = (),
    datasets: Sequence[str | Mapping | DatasetSpec] = (),
    config: BenchConfig | str | os.PathLike | None = None,
    *,
    with_base: bool = False,
    progress: bool = True,
) -> list[Prepared]:
    """Fills the caches with what a job reads; afterwards it runs with ``HF_HUB_OFFLINE=1``, here or where the caches
    are copied to. Under ``HF_HUB_OFFLINE=1`` itself it fetches nothing and tells what is missing.

    What is there already is not downloaded again, and an interrupted download goes on where it was. One thing that
    fails does not stop the others.

    Args:
        models (`Sequence[str]`): Hub ids (``id@revision`` too), or ``open_clip:...`` names.
        adapters (`Sequence[str]`): Hub ids of adapters of any kind, tuned models of `tune` among them.
        bridges (`Sequence[str]`): Hub ids.
        datasets (`Sequence[str | Mapping | DatasetSpec]`): what [`find_spec`] takes. All splits are fetched.
        config (`BenchConfig` or `str`, *optional*): a bench, or what [`BenchConfig.read`] takes: its models, datasets.
        with_base (`bool`, *optional*, defaults to `False`): also the models that the adapters belong to.
        progress (`bool`, *optional*, defaults to `True`): show a bar.

    Returns:
        `list[Prepared]`: a row for each, adapters first.

    Raises:
        ValueError: nothing to prepare, or a bench that cannot be read.
        OSError: the disk has not enough room for what is to be fetched.
    """
    if isinstance(config, (str, os.PathLike)):
        config = BenchConfig.read(config)
    if config is not None:
        named = [name for pair in config.models for name in (pair.weak, pair.strong)]
        own = {spec.name: spec for spec in [*config.datasets, config.train_on] if spec is not None}
        models = [*models, *dict.fromkeys(named)]
        datasets = [*datasets, *own.values(), *([config.general] if config.general else [])]
    if not (adapters or bridges or models or datasets):
        raise ValueError("there is nothing to prepare: name models, adapters, bridges, datasets or a bench.")
    total = len(adapters) + len(bridges) + len(models) + len(datasets)
    with tqdm(total=total, desc="preparing", disable=not progress) as bar:
        run = _Run(bar)
        for source in adapters:
            run.add(Prepared("adapter", source), _read_adapter)
        for source in bridges:
            run.add(Prepared("bridge", source), _read_bridge)
        bases = run.bases() if with_base else {}
        wanted = list(dict.fromkeys([*bases, *models]))
        specs = [spec for spec in map(run.spec, datasets) if spec is not None]
        if not constants.HF_HUB_OFFLINE:
            check_room(wanted, specs)
        bar.total = len(adapters) + len(bridges) + len(wanted) + len(datasets)
        for source in wanted:
            run.add(Prepared("model", source, needed_by=bases.get(source)), _read_model)
        for spec in specs:
            run.add(Prepared("dataset", spec.location), partial(_read_dataset, spec))
    return run.rows


def prepared_table(rows: Sequence[Prepared]) -> str:
    """What became of each, as a markdown table."""
    lines = ["| | name | revision | files | size | |", "|:---|:---|:---|---:|---:|:---|"]
    for row in rows:
        said = {"there": "already there"}.get(row.status, row.status)
        said += f" ({row.source})" if row.status != "failed" and row.source != "Hub" else ""
        said += f": {row.remark}" if row.remark else ""
        name = row.name + (f" (base of {row.needed_by})" if row.needed_by else "")
        size = in_words(row.num_bytes) if row.files else ""
        cells = [row.kind, name, (row.revision or "")[:12], row.files or "", size, said]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def cache_folders() -> list[Path]:
    """What has to be copied to another machine: downloads, datasets, and embeddings that earlier jobs made."""
    places = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, constants.HF_ASSETS_CACHE)
    return [Path(place) for place in places if Path(place).is_dir()]


class _Run:
    """Rows so far, and the files that the caches held before each."""

    def __init__(self, bar: tqdm):
        self.rows: list[Prepared] = []
        self.known, self.bar = set(_cached("*")), bar

    def add(self, row: Prepared, read: Callable[[Prepared], str | None]) -> None:
        """Reads one thing, fetching it if need be, and says in its row what became of it. `read` returns its commit,
        `None` for what does not come from the Hub."""
        self.rows.append(row)
        self.bar.update()
        try:
            row.revision = read(row)
        except Exception as error:  # whatever the libraries run into with a stranger's files
            logger.debug("%s %s", row.kind, row.name, exc_info=True)
            row.remark = _one_line(error)
            return
        row.status = "there"
        if row.revision is None:
            row.source = "this package" if row.name.startswith(SANDBOX) else "this machine"
            return
        files = _cached(row.revision)
        row.files, row.num_bytes = len(files), sum(files.values())
        if not self.known.issuperset(files):
            row.status = "fetched"
        self.known.update(files)

    def bases(self) -> dict[str, str]:
        """{model: adapter it belongs to} of the adapters that could be read; those that name none fail."""
        found = {}
        for row in [row for row in self.rows if row.kind == "adapter" and row.status != "failed"]:
            bases = _bases(row.name)
            if not bases:
                row.status, row.remark = "failed", "it does not say which model it belongs to: name that too."
            found |= {base: row.name for base in bases if base not in found}
        return found

    def spec(self, source: str | Mapping | DatasetSpec) -> DatasetSpec | None:
        """The row of a dataset, `None` (and a failed row here) where there is none."""
        if isinstance(source, DatasetSpec):
            return source
        try:
            return find_spec(source)
        except (ValueError, OSError, DatasetsError) as error:
            name = source if isinstance(source, str) else str(source.get("name") or source.get("source"))
            self.rows.append(Prepared("dataset", name, remark=_one_line(error)))
            self.bar.update()
            return None


def _one_line(error: Exception) -> str:
    if isinstance(error, DatasetsError) and error.__cause__ is not None:  # "an error occurred while generating"
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _cached(commit: str) -> dict[Path, int]:
    """Files of a commit in the caches with their sizes; of all commits for ``"*"``."""
    roots = [*Path(constants.HF_HUB_CACHE).glob(f"*/snapshots/{commit}")]
    roots += Path(datasets.config.HF_DATASETS_CACHE).glob(f"*/*/*/{commit}/")
    return {path: path.stat().st_size for root in roots for path in root.rglob("*") if path.is_file()}


def _commit(path: Path, source: str) -> str | None:
    """Of a file that [`fetch`] got from the top of a repository; `None` of a folder's."""
    return None if Path(split_revision(source)[0]).is_dir() else path.parent.name


def _lacks(source: str, file: str) -> str:
    if constants.HF_HUB_OFFLINE and not Path(split_revision(source)[0]).is_dir():
        return f"{file} of {source!r} is not in the cache"
    return f"{source!r} has no {file}"


def _read_adapter(row: Prepared) -> str | None:
    source = row.name
    config = fetch(source, CONFIG)
    if config is None:
        raise FileNotFoundError(f"{_lacks(source, CONFIG)}: no adapter. A whole model is named with models (--model).")
    weights = fetch(source, WEIGHTS)
    if weights is None:
        raise FileNotFoundError(f"{_lacks(source, WEIGHTS)}, and no other weights are read.")
    content = read_json(source, CONFIG)
    if content.get("peft_type") == PeftType.TRANSMITER:
        read_config(source)
    else:
        check_adapter_tensors(weights, content)
    TeacherFacts.read(source)
    for file in _OF_AN_ADAPTER:
        fetch(source, file)
    for finished in list_transfers(source):
        if fetch(source, finished.file) is None:
            raise FileNotFoundError(f"{_lacks(source, finished.file)}, which its index names.")
    calibration = fetch(source, CALIBRATION)
    if calibration is not None:
        CalibrationPack.load(calibration)
    return _commit(config, source)


def _bases(source: str) -> list[str]:
    """Models that an adapter says it belongs to, each as ``id@revision``."""
    content, facts = read_json(source, CONFIG), TeacherFacts.read(source)
    found = [(content.get("base_model_name_or_path"), content.get("revision"))]
    found += [] if facts is None else [(facts.weak, facts.revision)]
    return list(dict.fromkeys(f"{name}@{revision}" if revision else name for name, revision in found if name))


def _read_bridge(row: Prepared) -> str | None:
    source = row.name
    Bridge.from_pretrained(source)
    return None if source.endswith(".safetensors") else _commit(fetch(source, BRIDGE), source)


def _read_model(row: Prepared) -> str | None:
    source, (name, revision) = row.name, split_revision(row.name)
    if not (name.startswith((SANDBOX, OPEN_CLIP)) or Path(name).is_dir()):
        # Before the rest: what has arrived is compared with its checksum, which loading does not do.
        if not _fetch_weights(source):
            converted = None if revision else converted_revision(name)
            if converted is None or not _fetch_weights(f"{name}@{converted}"):
                raise OSError(no_safetensors(name, revision) or f"{_lacks(source, SAFE_WEIGHTS_NAME)}.")
        for file in (CONFIG, TEACHER_FILE):  # commands ask for them, to tell a model from an adapter
            fetch(source, file)
    return load_encoder(source).revision


def _fetch_weights(source: str) -> bool:
    """Whether there are safetensors, in one file or in those that an index names."""
    if fetch(source, SAFE_WEIGHTS_NAME) is not None:
        return True
    index = read_json(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return False
    for file in sorted(set(index["weight_map"].values())):
        if fetch(source, file) is None:
            raise OSError(f"{_lacks(source, file)}, which {SAFE_WEIGHTS_INDEX_NAME} names.")
    return True


def _read_dataset(spec: DatasetSpec, row: Prepared) -> str | None:
    builder = builder_of(spec) if on_hub(spec) else None
    if builder is not None:
        builder.download_and_prepare()
        found = builder.as_dataset()
    else:
        splits = list_splits(spec.location, spec.subset)
        found = {split: open_split(spec.location, split, subset=spec.subset) for split in splits}
    for pictures in found.values():
        column = guess_columns(pictures, spec.image_column, spec.label_column)[0]
        for number in {0, len(pictures) - 1} if len(pictures) else ():
            _ = pictures[number][column]
        if builder is not None and len(pictures) and _by_path(pictures, column):
            row.remark = f"its pictures are files below {constants.HF_HUB_CACHE}: copy that to the same path"
    if spec.label_column is not None:
        for role in spec.splits:
            load_split(spec, role)
    return None if builder is None else builder.hash


def _by_path(pictures: Dataset, column: str) -> bool:
    """Whether the Arrow files name the pictures, by their absolute paths, and do not hold them."""
    first = pictures.select_columns([column]).with_format("arrow")[:1][column].to_pylist()[0]
    return isinstance(first, dict) and first.get("bytes") is None
