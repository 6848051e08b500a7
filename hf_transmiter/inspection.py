"""[`describe`]: what an adapter, bridge, calibration pack or model is, from its small files and headers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .anchors import Anchors
from .catalog import TEACHER_FILE, load_anchors
from .hub import fetch, model_location, read_json
from .tuners import PeftType


def describe(source: str) -> dict:
    """Facts about a saved thing. Neither its tensors nor the base model are loaded.

    Args:
        source (`str`): a ``.safetensors`` file (bridge or calibration pack), a folder, a Hub id (``id@revision`` too).

    Returns:
        `dict`: `kind` (`"bridge"`, `"calibration pack"`, `"TransMiter adapter"`, `"tuned model"`, `"PEFT adapter"` or
        `"model"`), what is known about it, and `parameters` and `bytes` of its weights; `shapes` of what this package
        writes.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: none of these, or a damaged file.
    """
    if Path(source).is_file():
        return _file(Path(source))
    source = model_location(source)
    adapter = read_json(source, "adapter_config.json")
    if adapter is not None:
        return _adapter(source, adapter)
    config = read_json(source, "config.json")
    if config is None:
        raise ValueError(f"found neither adapter_config.json nor config.json in {source!r}: no adapter and no model.")
    towers = {key: config[key].get("hidden_size") for key in ("vision_config", "text_config") if config.get(key)}
    facts = {"model_type": config.get("model_type"), "embed_dim": config.get("projection_dim"), "hidden_size": towers}
    return {"kind": "model", **facts, **_size(fetch(source, "model.safetensors"))}


def _adapter(source: str, config: dict) -> dict:
    base = {"base_model": config.get("base_model_name_or_path"), "base_revision": config.get("revision")}
    weights = fetch(source, "adapter_model.safetensors")
    if config.get("peft_type") == PeftType.TRANSMITER:
        pack = fetch(source, "calibration.safetensors")
        anchors = load_anchors(source)
        facts = {key: config.get(key) for key in ("form", "embed_dim", "provenance")}
        facts["calibration"] = None if pack is None else _file(pack)
        size = {} if weights is None else _header(weights)[1]
        return {"kind": "TransMiter adapter", **base, **facts, **_names(anchors), **size}
    teacher = read_json(source, TEACHER_FILE)
    facts = {"peft_type": config.get("peft_type"), **base}
    if teacher is None:
        return {"kind": "PEFT adapter", **facts, **_size(weights)}
    names = _names(Anchors(teacher["class_names"], (), teacher["templates"]))
    return {"kind": "tuned model", **facts, **names, "settings": teacher["settings"], **_size(weights)}


def _names(anchors: Anchors) -> dict:
    return {
        "num_classes": anchors.num_task,
        "num_auxiliary": len(anchors.auxiliary),
        "class_names": list(anchors.task),
        "templates": list(anchors.templates),
        "anchors_fingerprint": anchors.fingerprint,
    }


def _file(path: Path) -> dict:
    metadata, size = _header(path)
    if metadata.get("format") == "hf_transmiter.bridge":
        facts = json.loads(metadata["bridge"])
        anchors = facts.pop("anchors", None)
        return {"kind": "bridge", **facts, **(_names(Anchors.from_dict(anchors)) if anchors else {}), **size}
    if metadata.get("format") == "hf_transmiter.calibration":
        facts = {key: metadata.get(key) or None for key in ("dataset", "dataset_fingerprint")}
        names = json.loads(metadata["class_names"])
        images = size["shapes"]["logits"][0]
        return {"kind": "calibration pack", "num_images": images, "class_names": names, **facts, **size}
    raise ValueError(f"{path} is neither a bridge nor a calibration pack (format {metadata.get('format')!r}).")


def _size(path: Path | None) -> dict:
    """Without the shapes, of which models have hundreds; nothing for weights in several files."""
    return {} if path is None else {key: value for key, value in _header(path)[1].items() if key != "shapes"}


def _header(path: Path) -> tuple[dict, dict]:
    """Metadata, and shapes, number of parameters and bytes of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}.") from error
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return metadata, {"shapes": shapes, "parameters": parameters, "bytes": path.stat().st_size}
