"""[`export_space`]: the demo app as a folder that is ready to be a Space on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import SpaceCardData

from .files import replace_file
from .hub import SANDBOX, check_hub_id, split_revision
from .panels import TOP_K


GRADIO_VERSION = "6.31.0"
"""What the Space runs: the version that the app is tested with."""

_APP = '''"""The demo app of hf_transmiter on these models. Written by `hf-transmiter app --export`."""

from hf_transmiter.app import build_app, launch
from hf_transmiter.panels import {imports}


panels = load_panels(
{arguments})
launch(build_app(panels, {examples}top_k={top_k}))
'''
_CARD = """---
{metadata}
---

# {title}

Drop a picture and see, side by side, what these models answer:

{models}

Written by `hf-transmiter app --export`; it runs `hf_transmiter.app.build_app`.
"""
_WHAT = {
    "weak": "the weak model",
    "teacher": "the tuned weak model",
    "strong": "the strong model",
    "adapter": "what the tuning taught, as an adapter of the weak model",
    "upgraded": "what the tuning taught, as an adapter of the strong model",
}


def export_space(
    folder: str | os.PathLike,
    sources: Mapping[str, str],
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    examples: str | None = None,
    top_k: int = TOP_K,
    overwrite: bool = False,
) -> Path:
    """Writes `app.py`, `requirements.txt` and `README.md` with a Space's metadata. No model is loaded.

    Args:
        folder (`str` or `os.PathLike`): where to; other files in it stay, so it may be a clone of the Space.
        sources (`Mapping[str, str]`): arguments of [`load_panels`] by name: Hub ids (``id@revision`` too), or
            ``sandbox:MODEL``.
        class_names (`Sequence[str]`, *optional*), templates (`Sequence[str]`, *optional*): as [`load_panels`].
        examples (`str`, *optional*): Hub id of a data set (or ``sandbox:DOMAIN``) with pictures to try.
        top_k (`int`, *optional*, defaults to 5): names per model.
        overwrite (`bool`, *optional*, defaults to `False`): replace these three files.

    Raises:
        FileExistsError: one of the files is there and `overwrite` is `False`.
        ValueError: no source, or one that is not on the Hub.
    """
    from . import __version__

    if not sources:
        raise ValueError("there is no model to show: name at least one of weak, teacher, strong, adapter, upgraded.")
    for what, source in {**sources, **({"examples": examples} if examples else {})}.items():
        _check_reachable(what, source)
    folder = Path(folder)
    contents = {
        "app.py": _app_file(sources, class_names, templates, examples, top_k),
        "requirements.txt": f"hf-transmiter=={__version__}\n",
        "README.md": _card(sources, examples),
    }
    there = [name for name in contents if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{folder / there[0]} exists: choose another folder, or pass --overwrite.")
    for name, content in contents.items():
        replace_file(folder / name, lambda path, content=content: path.write_text(content, encoding="utf-8"))
    return folder


def _check_reachable(what: str, source: str) -> None:
    name = split_revision(source)[0]
    if source.startswith(SANDBOX):
        return
    if Path(name).exists():
        raise ValueError(f"{what} {source!r} is on this machine, where a Space cannot reach it: push it to the Hub.")
    check_hub_id(name, what)


def _app_file(sources, class_names, templates, examples, top_k) -> str:
    arguments = dict(sources)
    arguments |= {"class_names": list(class_names)} if class_names else {}
    arguments |= {"templates": list(templates)} if templates else {}
    return _APP.format(
        imports="example_pictures, load_panels" if examples else "load_panels",
        arguments="".join(f"    {name}={value!r},\n" for name, value in arguments.items()),
        examples=f"examples=example_pictures({examples!r}), " if examples else "",
        top_k=top_k,
    )


def _card(sources: Mapping[str, str], examples: str | None) -> str:
    on_hub = [split_revision(source)[0] for source in sources.values() if not source.startswith(SANDBOX)]
    shown = next(sources[name] for name in ("upgraded", "adapter", "teacher", "strong", "weak") if name in sources)
    title = f"Upgrade of a fine-tuned CLIP: {split_revision(shown)[0]}"
    datasets = [split_revision(examples)[0]] if examples and not examples.startswith(SANDBOX) else None
    metadata = SpaceCardData(
        title=title,
        **{"sdk": "gradio", "sdk_version": GRADIO_VERSION, "app_file": "app.py", "pinned": False},
        **{"models": sorted(set(on_hub)) or None, "datasets": datasets, "tags": ["clip", "transmiter"]},
    )
    lines = [f"- {_WHAT[name]}: `{source}`" for name, source in sources.items()]
    return _CARD.format(metadata=metadata.to_yaml(), title=title, models="\n".join(lines))
