"""[`CalibrationPack`]: the tuned model's logits on unlabelled images, kept so that later upgrades need not run it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..algebra import check_finite
from ..hub.checks import as_list
from ..hub.files import read_metadata_json, read_tensors, replace_file


SHAPES = {"logits": ("N", "C"), "weak_logits": ("N", "C")}
_FORMAT = "hf_transmiter.calibration"


@dataclass
class CalibrationPack:
    """Teacher logits with what is needed to line them up with the same images again.

    Args:
        logits (`Tensor`): (N, C) of the tuned model over the task names, scale included; saved as float16.
        class_names (`tuple[str, ...]`): the C names.
        dataset_fingerprint (`str`, *optional*): of the dataset whose rows the logits belong to, in order.
        dataset (`str`, *optional*): where to find it, for people (Hub id and revision, or a description).
        weak_logits (`Tensor`, *optional*): (N, C) zero-shot logits of the weak model: what tuning started from.

    Raises:
        ValueError: shapes do not fit, or a logit is not finite.
    """

    logits: Tensor
    class_names: tuple[str, ...]
    dataset_fingerprint: str | None = None
    dataset: str | None = None
    weak_logits: Tensor | None = None

    def __post_init__(self):
        self.class_names = tuple(as_list(self.class_names, "class_names"))
        if self.logits.ndim != 2 or self.logits.shape[1] != len(self.class_names):
            raise ValueError(
                f"logits must be (N, {len(self.class_names)}), one column per class name, "
                f"got {tuple(self.logits.shape)}."
            )
        check_finite(self.logits, "the teacher's logits")
        if self.weak_logits is not None:
            if self.weak_logits.shape != self.logits.shape:
                raise ValueError(f"weak_logits must be {tuple(self.logits.shape)}, as logits.")
            check_finite(self.weak_logits, "the weak model's logits")

    def check_images(self, count: int, fingerprint: str | None) -> None:
        """Makes sure that row i belongs to image i.

        Raises:
            ValueError: another number of images, or another dataset fingerprint.
        """
        if count != len(self.logits) or (
            None not in (fingerprint, self.dataset_fingerprint) and fingerprint != self.dataset_fingerprint
        ):
            raise ValueError(
                f"the stored teacher logits belong to {len(self.logits)} other images "
                f"({self.dataset or self.dataset_fingerprint or 'unnamed'}), these are {count}. Pass the very dataset "
                "the adapter was extracted on, in the same order, or leave the calibration pack out."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file; float16 logits, the rest as metadata. Atomic.

        Raises:
            ValueError: what [`load`] would refuse, or a logit beyond the numbers of float16 (65,504).
        """
        metadata = {
            "format": _FORMAT,
            "class_names": json.dumps(self.class_names),
            "dataset_fingerprint": self.dataset_fingerprint or "",
            "dataset": self.dataset or "",
        }
        tensors = {"logits": self.logits, "weak_logits": self.weak_logits}
        tensors = {key: t.to(torch.float16).contiguous() for key, t in tensors.items() if t is not None}
        for key, tensor in tensors.items():
            check_finite(tensor, f"{key} as float16, in which they are saved (numbers up to 65,504),")
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata), type(self).load)

    @classmethod
    def load(cls, path: str | os.PathLike) -> CalibrationPack:
        """Reads what [`save`] wrote. Logits come back as float32.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a calibration pack, or a damaged one.
        """
        tensors, metadata = read_tensors(
            path, _FORMAT, "calibration pack", "CalibrationPack.save", SHAPES, optional=("weak_logits",)
        )
        names = read_metadata_json(path, metadata, "class_names", "calibration")
        about = {key: metadata.get(key) or None for key in ("dataset_fingerprint", "dataset")}
        return cls(class_names=names, **{key: tensor.float() for key, tensor in tensors.items()}, **about)
