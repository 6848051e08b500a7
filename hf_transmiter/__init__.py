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
    "BenchConfig": "bench.config",
    "Bridge": "method.bridge",
    "CalibrationPack": "method.stored_logits",
    "CoCoOpConfig": "tuners",
    "CoOpConfig": "tuners",
    "ContCoOpConfig": "tuners",
    "CrossMoment": "method.moments",
    "DatasetSpec": "data.catalogue",
    "DualEncoder": "encoders.dual_encoder",
    "ExtractionConfig": "method.extract",
    "IVLPConfig": "tuners",
    "KgCoOpConfig": "tuners",
    "Knowledge": "evaluation.analyse",
    "LabelTuningConfig": "method.label_tune",
    "MaPLeConfig": "tuners",
    "PromptSRCConfig": "tuners",
    "TransMiterConfig": "tuners",
    "TransMiterForImageClassification": "method.image_classifier",
    "TransMiterImageClassificationConfig": "method.image_classifier",
    "TransferConfig": "method.transfer",
    "TuningConfig": "method.tune",
    "UpgradeScore": "evaluation.upgrade",
    "Variant": "evaluation.methods",
    "analyse": "evaluation.analyse",
    "attach": "method.attach",
    "catalogue": "data.catalogue",
    "compare": "evaluation.compare",
    "embed_dataset": "data.embeddings",
    "evaluate": "evaluation.evaluate",
    "expected_calibration_error": "evaluation.reliability",
    "extract": "method.extract",
    "find_spec": "data.catalogue",
    "label_tune": "method.label_tune",
    "load_split": "data.catalogue",
    "push": "hub.push",
    "run_bench": "bench.run",
    "score_upgrade": "evaluation.upgrade",
    "set_classes": "tuners",
    "token_map": "method.attach",
    "transfer": "method.transfer",
    "tune": "method.tune",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".tuners", __name__)  # PEFT knows the adapters from now on
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
