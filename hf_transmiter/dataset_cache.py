"""[`hub_builder`]: a dataset of the Hub at a revision, from the cache of `datasets` where the Hub does not answer."""

from __future__ import annotations

import os
import re
from pathlib import Path

import datasets.config
from datasets import DatasetBuilder, load_dataset_builder
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError


_COMMIT = re.compile("[0-9a-f]{40}")


def hub_builder(name: str, subset: str | None = None, revision: str | None = None) -> DatasetBuilder:
    """The builder of a dataset of the Hub; ``download_and_prepare()`` fills the cache, ``as_dataset(split)`` reads it.

    Without a network `datasets` itself takes whatever version of the dataset the cache got last. Here it is the one
    that was asked for, or an error.

    Args:
        name (`str`): Hub id.
        subset (`str`, *optional*): configuration of a dataset that has several.
        revision (`str`, *optional*): branch, tag or commit.

    Raises:
        datasets.exceptions.DatasetsError: no such dataset or revision, or nothing in it that can be read.
        ConnectionError: the Hub does not answer and the cache does not hold this dataset at this revision.
        ValueError: no such subset, or several in the cache and none named.
    """
    builder = None
    if not datasets.config.HF_HUB_OFFLINE:
        try:
            builder = load_dataset_builder(name, subset, revision=revision)
        except (ConnectionError, LocalEntryNotFoundError):  # nothing of it in the cache
            pass
        except HTTPError as error:  # of the HTTP client: a broken connection, or an answer of the Hub
            if isinstance(error, HfHubHTTPError):
                raise
        if builder is not None and not isinstance(builder, Cache):  # the Hub has answered
            return builder
    version = _cached_version(name, subset, revision)
    config_name, number, commit = version.parts[-3:]
    if builder is not None and Path(builder.cache_dir) == version:
        return builder
    where = {"repo_id": name, "dataset_name": name.split("/")[-1]}
    return Cache(**where, config_name=config_name, version=number, hash=commit)


def _cached_version(name: str, subset: str | None, revision: str | None) -> Path:
    """Its folder in the cache of `datasets`, ``.../SUBSET/VERSION/COMMIT``."""
    *owner, short = name.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(short)])
    found = (path.parent for path in root.glob("*/*/*/dataset_info.json"))
    # A folder of this machine lies under its name there, too; only what is of the Hub has a commit.
    finished = sorted((path for path in found if _COMMIT.fullmatch(path.name)), key=lambda path: path.stat().st_mtime)
    of_subset = [path for path in finished if subset in (None, path.parts[-3])]
    commit = _commit(name, revision)
    found = [path for path in of_subset if path.name == commit] if commit is not None or revision else of_subset[-1:]
    subsets = {path.parts[-3]: path for path in found}
    if not subsets:
        source = f"{name}@{revision}" if revision else name
        others = f", only {', '.join(f'{path.parts[-3]} at {path.name}' for path in finished)}" if finished else ""
        raise ConnectionError(
            f"the dataset {source!r}{f', subset {subset!r},' if subset else ''} is not in the cache "
            f"({os.fspath(root.parent)}){others}, and the Hub cannot be reached: where it can, run "
            f"`hf-transmiter prepare --dataset {source}`, then copy the cache."
        )
    if len(subsets) > 1 and "default" not in subsets:
        raise ValueError(f"the dataset {name!r} has several subsets in the cache; name one: {', '.join(subsets)}.")
    return subsets["default"] if len(subsets) > 1 else next(iter(subsets.values()))


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that the cache of huggingface_hub knows for a branch or tag; `None` where it knows none."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    options = {"repo_type": "dataset", "revision": revision, "local_files_only": True, "allow_patterns": []}
    try:
        return Path(snapshot_download(name, **options)).name
    except LocalEntryNotFoundError:
        return None
