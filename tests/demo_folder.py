"""What `hf-transmiter demo` leaves of one sandbox task, made in seconds: a prompt tuned for a moment."""

from pathlib import Path

from hf_transmiter.cli.demo import SANDBOX_TUNING
from hf_transmiter.encoders.dual_encoder import load_encoder
from hf_transmiter.method.extract import extract
from hf_transmiter.method.transfer import transfer
from hf_transmiter.method.tune import starting_templates, tune
from hf_transmiter.sandbox import load_dataset
from hf_transmiter.settings import TuningConfig


TASK = "jargon"


def make(folder: Path, tuned: bool = True) -> Path:
    """Writes `jargon/adapter`, `jargon/strong_adapter` and, if asked for, `jargon/tuned` to `folder`."""
    weak, strong, task = load_encoder("sandbox:weak"), load_encoder("sandbox:strong"), folder / TASK
    config = TuningConfig(**{**SANDBOX_TUNING, "epochs": 2, "lr": 0.05, "shots": 1})
    templates = starting_templates("coop")
    images = load_dataset(TASK, "validation")
    teacher = tune(weak, images, "coop", config=config, templates=templates, progress=False)
    adapter = extract(weak, teacher, progress=False)
    adapter.save_pretrained(task / "adapter")
    transfer(adapter, strong, progress=False).save_pretrained(task / "strong_adapter")
    if tuned:
        teacher.save_pretrained(task / "tuned")
    return folder
