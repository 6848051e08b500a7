"""What is noted about how something was made."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from .repo import public_name


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what an adapter says, to be noted when it is made."""
    versions = {"python": platform.python_version()}
    for library in ("hf-transmiter", "torch", "transformers", "peft", "datasets", "safetensors"):
        try:
            versions[library.replace("-", "_")] = version(library)
        except PackageNotFoundError:  # installed without its metadata
            continue
    return versions


def named_dataset(dataset, name: str | None) -> dict[str, str]:
    """What provenance says of images that have a name: ``{"dataset": "mteb/dtd (train)"}``."""
    if dataset is None or name is None:
        return {}
    split = getattr(dataset, "split", None)
    return {"dataset": public_name(name) + (f" ({split})" if split is not None else "")}
