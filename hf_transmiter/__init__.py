"""hf_transmiter: carry a fine-tuned CLIP over to a stronger CLIP.

Reading order, the way data flows: `splits`, `vocabulary`, `anchors` (what is asked); `backbone`, `features`,
`classifier` (who answers); `solvers`, `tuners`, `training`, `answers`, `prompt_tuning`, `teachers`, `extraction`,
`moments`, `bridge`, `transferring`, `label_tuning` (what is learnt and moved); `baselines`, `evaluation`, `methods`,
`comparison`, `report` (what it is worth); `drift`, `attaching`, `retraining`, `compatibility`, `upgrade_studies`
(prompts across an upgrade); `trust`, `hub`, `transfers`, `cards`, `sharing`, `preparing`,
`image_classification` (what is shared, and how it is used elsewhere); `sandbox`, `demo`, `catalog`, `app`, `cli`.

Notation: N images, K anchors = C task names + A auxiliary names, d embedding width, D rows of the basis W; x unit
image rows, a unit text rows, s the logit scale, z standardised logits, X a cross moment, P and Q bridges, T class
vectors. weak: the pre-trained model; tuned: it after any fine-tuning; strong: the model that shall inherit.
"""

import importlib


__version__ = "0.1.0"

_EXPORTS = {
    "AnchorClassifier": "classifier",
    "Anchors": "anchors",
    "BenchConfig": "bench_config",
    "Bridge": "bridge",
    "CalibrationPack": "calibration",
    "CoCoOpConfig": "tuners",
    "CoOpConfig": "tuners",
    "ContCoOpConfig": "tuners",
    "CrossMoment": "moments",
    "DatasetSpec": "dataset_specs",
    "DualEncoder": "backbone",
    "ExtractionConfig": "extraction",
    "IVLPConfig": "tuners",
    "KgCoOpConfig": "tuners",
    "Knowledge": "knowledge",
    "LabelTuningConfig": "label_tuning",
    "MaPLeConfig": "tuners",
    "PromptSRCConfig": "tuners",
    "TransMiterConfig": "tuners",
    "TransMiterForImageClassification": "image_classification",
    "TransMiterImageClassificationConfig": "image_classification",
    "TransferConfig": "transferring",
    "TuningConfig": "prompt_tuning",
    "UpgradeScore": "compatibility",
    "Variant": "methods",
    "analyse": "knowledge",
    "attach": "attaching",
    "catalogue": "dataset_specs",
    "compare": "comparison",
    "embed_dataset": "features",
    "evaluate": "evaluation",
    "expected_calibration_error": "reliability",
    "extract": "extraction",
    "find_spec": "dataset_specs",
    "fit_temperature": "reliability",
    "label_tune": "label_tuning",
    "load_split": "dataset_specs",
    "push": "sharing",
    "run_bench": "bench",
    "score_upgrade": "compatibility",
    "set_classes": "tuners",
    "token_map": "attaching",
    "transfer": "transferring",
    "tune": "prompt_tuning",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".tuners", __name__)  # PEFT knows the adapters from now on
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
