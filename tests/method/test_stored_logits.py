"""Calibration packs: stored teacher logits, and that they are only used with their own images."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transmiter.method.stored_logits import CalibrationPack


NAMES = ("cat", "dög")


def test_save_and_load(tmp_path):
    logits = 20 + torch.randn(5, 2)
    path = tmp_path / "calibration.safetensors"
    CalibrationPack(logits, list(NAMES), "fingerprint", "user/photos@main").save(path)
    back = CalibrationPack.load(path)
    assert torch.equal(back.logits, logits.half().float()) and back.logits.dtype == torch.float32
    assert (back.class_names, back.dataset_fingerprint, back.dataset) == (NAMES, "fingerprint", "user/photos@main")
    assert load_file(path)["logits"].dtype == torch.float16 and len(list(tmp_path.iterdir())) == 1
    CalibrationPack(logits, NAMES).save(path)
    back = CalibrationPack.load(path)
    assert back.dataset_fingerprint is None and back.dataset is None and back.weak_logits is None
    CalibrationPack(logits, NAMES, weak_logits=logits - 1).save(path)
    assert torch.equal(CalibrationPack.load(path).weak_logits, (logits - 1).half().float())


def test_its_own_images():
    pack = CalibrationPack(torch.zeros(5, 2), NAMES, "own", "user/photos")
    pack.check_images(5, "own")
    pack.check_images(5, None)  # images that have no fingerprint are taken at their number
    CalibrationPack(torch.zeros(5, 2), NAMES).check_images(5, "any")
    for count, fingerprint in ((5, "other"), (4, "own"), (4, None)):
        with pytest.raises(ValueError, match=r"5 other images \(user/photos\), these are .* Pass the very dataset"):
            pack.check_images(count, fingerprint)


def test_refused(tmp_path):
    for logits in (torch.zeros(5, 3), torch.zeros(5), torch.zeros(1, 5, 2)):
        with pytest.raises(ValueError, match=r"logits must be \(N, 2\), one column per class name, got"):
            CalibrationPack(logits, NAMES)
    bad = torch.zeros(5, 2)
    bad[3, 1] = float("nan")
    with pytest.raises(ValueError, match="the teacher's logits hold NaN .* first in row 3"):
        CalibrationPack(bad, NAMES)
    with pytest.raises(ValueError, match="the weak model's logits hold NaN"):
        CalibrationPack(torch.zeros(5, 2), NAMES, weak_logits=bad)
    with pytest.raises(ValueError, match=r"weak_logits must be \(5, 2\)"):
        CalibrationPack(torch.zeros(5, 2), NAMES, weak_logits=bad[:3])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        CalibrationPack.load(tmp_path / "nowhere")
    save_file({"logits": torch.zeros(5, 2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is not a calibration pack; write one with CalibrationPack.save"):
        CalibrationPack.load(tmp_path / "other")
