"""hf_transmiter: carry a fine-tuned CLIP over to a stronger CLIP.

Ten rooms, in the order in which they lean on each other: `hub` (files and repositories), `encoders` (any two-tower
CLIP), `sandbox` (a drawn world and tiny CLIPs), `data` (what is asked, of which pictures), `tuners` (the adapters as
PEFT methods), `training` (one loop), `method` (one step per file), `evaluation` (what an upgrade is worth),
`bench` (grids of experiments), `cli` (what people start). Above them `settings` (what each step can be told) and
`algebra` (pure tensors). Each room's docstring names its files in reading order.

Notation: N images, K anchors = C task names + A auxiliary names, d embedding width, D rows of the basis W; x unit
image rows, a unit text rows, s the logit scale, z standardised logits, X a cross moment, P and Q bridges, T class
vectors. weak: the pre-trained model; tuned: it after any fine-tuning; strong: the model that shall inherit.
"""

import importlib


__version__ = "0.1.0"

_EXPORTS = {
    "AnchorClassifier": "method.classifier",
    "Anchors": "data.anchors",
    "Bridge": "method.bridge",
    "CoOpConfig": "tuners",
    "ContCoOpConfig": "tuners",
    "DualEncoder": "encoders.dual_encoder",
    "Embed": "data.embed",
    "ExtractionConfig": "method.extract",
    "FeatureTable": "data.table",
    "LabelTuningConfig": "method.label_tune",
    "TransMiterConfig": "tuners",
    "TransMiterForImageClassification": "method.image_classifier",
    "TransferConfig": "method.transfer",
    "TuningConfig": "method.tune",
    "attach": "method.attach",
    "compare": "evaluation.compare",
    "embed_dataset": "data.embeddings",
    "evaluate": "evaluation.evaluate",
    "extract": "method.extract",
    "label_tune": "method.label_tune",
    "load_images": "data.images",
    "push": "hub.push",
    "run_bench": "bench.run",
    "set_classes": "tuners",
    "transfer": "method.transfer",
    "tune": "method.tune",
}
_FOR_THE_COMMAND_LINE = {
    "algebra": ("guessing",),
    "hub.adapter_files": ("content_digest", "is_bridge", "is_transmiter"),
    "hub.files": ("CHECKPOINT", "beside", "claim", "entries", "is_fixed", "replace_folder"),
    "hub.repo": ("fetch", "public_name", "read_json", "split_revision"),
    "hub.scores": ("markdown_table",),
    "encoders.dual_encoder": ("load_encoder",),
    "data.anchors": ("read_templates",),
    "data.catalogue": ("find_row", "load_split", "usual_templates"),
    "data.class_names": ("read_names",),
    "data.images": ("guess_columns",),
    "data.splits": ("few_shot",),
    "method.saved": (
        *("load_anchors", "load_classifier", "load_teacher", "load_teacher_and_weak"),
        *("teacher_facts", "teacher_templates"),
    ),
    "method.stored_logits": ("CalibrationPack",),
    "method.tune": ("adapter_settings", "starting_templates"),
    "evaluation.analyse": ("analyse", "markdown"),
    "evaluation.compare": ("WEAK_ALONE", "Comparison"),
    "evaluation.evaluate": ("note_scores", "record_scores"),
    "evaluation.methods": ("METHODS", "STRONG", "Variant"),
    "evaluation.retrieval": ("evaluate_bridge", "index_verdict"),
    "evaluation.report": ("comparison_table", "write_analysis", "write_comparison"),
    "evaluation.upgrade": ("tuning_of",),
    "bench.cells": ("make_plan",),
    "bench.config": ("BenchConfig", "ready_configs"),
    "bench.report": ("write_bench_report",),
    "cli.app_page": ("build_app", "launch", "load_models"),
    "cli.demo": ("run_demo",),
}
_PLACES = {**{name: place for place, names in _FOR_THE_COMMAND_LINE.items() for name in names}, **_EXPORTS}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".tuners", __name__)  # PEFT knows the adapters from now on
    value = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    if name in _EXPORTS:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
