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
    "ExtractionConfig": "method.extract",
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
    "load_split": "data.catalogue",
    "push": "hub.push",
    "run_bench": "bench.run",
    "set_classes": "tuners",
    "transfer": "method.transfer",
    "tune": "method.tune",
}
_FOR_THE_COMMAND_LINE = {
    "BenchConfig": "bench.config",
    "CalibrationPack": "method.stored_logits",
    "Comparison": "evaluation.compare",
    "METHODS": "evaluation.methods",
    "STRONG": "evaluation.compare",
    "Section": "evaluation.report",
    "Variant": "evaluation.methods",
    "analyse": "evaluation.analyse",
    "bars": "evaluation.figures",
    "build_app": "cli.app_page",
    "comparison_table": "evaluation.report",
    "few_shot": "data.splits",
    "find_row": "data.catalogue",
    "guess_columns": "data.images",
    "launch": "cli.app_page",
    "load_anchors": "method.saved",
    "load_classifier": "method.saved",
    "load_encoder": "encoders.dual_encoder",
    "load_images": "data.images",
    "load_models": "cli.app_page",
    "load_teacher": "method.saved",
    "make_plan": "bench.cells",
    "markdown": "evaluation.analyse",
    "markdown_table": "hub.scores",
    "public_name": "hub.repo",
    "read_names": "data.class_names",
    "read_templates": "data.anchors",
    "ready_configs": "bench.config",
    "record_scores": "evaluation.evaluate",
    "reliability_figure": "evaluation.figures",
    "replace_file": "hub.files",
    "run_demo": "cli.demo",
    "split_revision": "hub.repo",
    "starting_templates": "method.tune",
    "teacher_facts": "method.saved",
    "teacher_templates": "method.saved",
    "adapter_settings": "method.tune",
    "tuning_of": "evaluation.upgrade",
    "usual_templates": "data.catalogue",
    "write_analysis": "evaluation.report",
    "write_bench_report": "bench.report",
    "write_report": "evaluation.report",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    place = _EXPORTS.get(name) or _FOR_THE_COMMAND_LINE.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".tuners", __name__)  # PEFT knows the adapters from now on
    value = getattr(importlib.import_module(f".{place}", __name__), name)
    if name in _EXPORTS:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
