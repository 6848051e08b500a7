"""hf_transmiter: carry a fine-tuned CLIP over to a stronger CLIP.

Reading order, the way data flows: `splits`, `vocabulary`, `anchors` (what is asked); `backbone`, `features`,
`classifier` (who answers); `solvers`, `tuners`, `training`, `answers`, `prompt_tuning`, `teachers`, `extraction`,
`moments`, `bridge`, `transferring`, `label_tuning` (what is learnt and moved); `baselines`, `evaluation`, `methods`,
`comparison`, `report` (what it is worth); `drift`, `attaching`, `retraining`, `compatibility`, `upgrade_studies`
(prompts across an upgrade); `trust`, `hub`, `transfers`, `cards`, `sharing`, `upgrading`, `preparing`,
`image_classification` (what is shared, and how it is used elsewhere); `sandbox`, `demo`, `catalog`, `app`, `cli`.

Notation: N images, K anchors = C task names + A auxiliary names, d embedding width, D rows of the basis W; x unit
image rows, a unit text rows, s the logit scale, z standardised logits, X a cross moment, P and Q bridges, T class
vectors. weak: the pre-trained model; tuned: it after any fine-tuning; strong: the model that shall inherit.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING


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
    "prepare": "preparing",
    "push": "sharing",
    "push_transfer": "transfers",
    "run_bench": "bench",
    "score_upgrade": "compatibility",
    "set_classes": "tuners",
    "token_map": "attaching",
    "transfer": "transferring",
    "tune": "prompt_tuning",
    "upgrade": "upgrading",
}
__all__ = [
    "AnchorClassifier",
    "Anchors",
    "BenchConfig",
    "Bridge",
    "CalibrationPack",
    "CoCoOpConfig",
    "CoOpConfig",
    "ContCoOpConfig",
    "CrossMoment",
    "DatasetSpec",
    "DualEncoder",
    "ExtractionConfig",
    "IVLPConfig",
    "KgCoOpConfig",
    "Knowledge",
    "LabelTuningConfig",
    "MaPLeConfig",
    "PromptSRCConfig",
    "TransMiterConfig",
    "TransMiterForImageClassification",
    "TransMiterImageClassificationConfig",
    "TransferConfig",
    "TuningConfig",
    "UpgradeScore",
    "Variant",
    "analyse",
    "attach",
    "catalogue",
    "compare",
    "embed_dataset",
    "evaluate",
    "expected_calibration_error",
    "extract",
    "find_spec",
    "fit_temperature",
    "label_tune",
    "load_split",
    "prepare",
    "push",
    "push_transfer",
    "run_bench",
    "score_upgrade",
    "set_classes",
    "token_map",
    "transfer",
    "tune",
    "upgrade",
]

if TYPE_CHECKING:
    from .anchors import Anchors
    from .attaching import attach, token_map
    from .backbone import DualEncoder
    from .bench import run_bench
    from .bench_config import BenchConfig
    from .bridge import Bridge
    from .calibration import CalibrationPack
    from .classifier import AnchorClassifier
    from .comparison import compare
    from .compatibility import UpgradeScore, score_upgrade
    from .dataset_specs import DatasetSpec, catalogue, find_spec, load_split
    from .evaluation import evaluate
    from .extraction import ExtractionConfig, extract
    from .features import embed_dataset
    from .image_classification import TransMiterForImageClassification, TransMiterImageClassificationConfig
    from .knowledge import Knowledge, analyse
    from .label_tuning import LabelTuningConfig, label_tune
    from .methods import Variant
    from .moments import CrossMoment
    from .preparing import prepare
    from .prompt_tuning import TuningConfig, tune
    from .reliability import expected_calibration_error, fit_temperature
    from .sharing import push
    from .transferring import TransferConfig, transfer
    from .transfers import push_transfer
    from .tuners import (
        CoCoOpConfig,
        ContCoOpConfig,
        CoOpConfig,
        IVLPConfig,
        KgCoOpConfig,
        MaPLeConfig,
        PromptSRCConfig,
        TransMiterConfig,
        set_classes,
    )
    from .upgrading import upgrade


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


class _ImportAfter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of this package the moment the library that it registers with is imported.

    `import hf_transmiter` is enough for `PeftModel.from_pretrained` to know the adapters and for
    `pipeline("image-classification")` to know the classifier, and costs nothing (importing PEFT or transformers takes
    seconds) where they are not used, as in `hf-transmiter --help`.
    """

    def __init__(self, library: str, module: str):
        self.library, self.module = library, f"{__name__}.{module}"

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.library:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.module)


for _library, _module in {"peft": "tuners", "transformers.models.auto.modeling_auto": "image_classification"}.items():
    if _library in sys.modules:
        importlib.import_module(f"{__name__}.{_module}")
    else:
        sys.meta_path.insert(0, _ImportAfter(_library, _module))
