"""[`describe`]: what an adapter, bridge, calibration pack or model is, from its small files and headers alone."""

from __future__ import annotations

import math
from pathlib import Path

from .anchors import Anchors
from .calibration import SHAPES
from .catalog import load_anchors
from .files import read_metadata_json
from .hub import fetch, model_location, read_json
from .transfers import BRIDGE as BRIDGE_FILE
from .transfers import TEACHER_FILE
from .trust import check_adapter_tensors, check_json, check_tensors, read_header
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
    bridge = fetch(source, BRIDGE_FILE)
    if bridge is not None:
        return _file(bridge)
    config = read_json(source, "config.json")
    if config is None:
        raise ValueError(
            f"found neither adapter_config.json, {BRIDGE_FILE} nor config.json in {source!r}: no adapter, bridge "
            "or model."
        )
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
        size = {}
        if weights is not None:
            check_adapter_tensors(weights, config)
            size = _header(weights)[1]
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
        facts = dict(check_json(read_metadata_json(path, metadata, "bridge", dict), "bridge", str(path)))
        anchors = facts.pop("anchors")
        names = {} if anchors is None else _names(Anchors.from_dict(anchors, f"the anchors of {path}"))
        return {"kind": "bridge", **facts, **names, **size}
    if metadata.get("format") == "hf_transmiter.calibration":
        facts = {key: metadata.get(key) or None for key in ("dataset", "dataset_fingerprint")}
        names = read_metadata_json(path, metadata, "class_names", list)
        check_json({"class_names": names}, "calibration", str(path))
        images = check_tensors(path, SHAPES, optional=("weak_logits",), what="calibration pack")["N"]
        return {"kind": "calibration pack", "num_images": images, "class_names": names, **facts, **size}
    raise ValueError(f"{path} is neither a bridge nor a calibration pack (format {metadata.get('format')!r}).")


def _size(path: Path | None) -> dict:
    """Without the shapes, of which models have hundreds; nothing for weights in several files."""
    return {} if path is None else {key: value for key, value in _header(path)[1].items() if key != "shapes"}


def _header(path: Path) -> tuple[dict, dict]:
    """Metadata, and shapes, number of parameters and bytes of a safetensors file."""
    metadata, tensors = read_header(path)
    shapes = {name: list(shape) for name, (_, shape) in tensors.items()}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return metadata, {"shapes": shapes, "parameters": parameters, "bytes": path.stat().st_size}
