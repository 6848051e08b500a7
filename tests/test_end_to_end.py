"""The whole job on the sandbox's shipped models, with few shots and epochs: numbers a user would notice."""

import pytest
import torch
from peft import PeftModel
from transformers import CLIPModel

from hf_transmiter import sandbox
from hf_transmiter.cli.demo import SANDBOX_TUNING
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.transfer import transfer
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import TuningConfig


@pytest.fixture(scope="module")
def job():
    """Print, LoRA: a domain shift. 600 unlabelled and 600 test pictures."""
    weak, strong = (DualEncoder.from_pretrained(sandbox.model_path(name)) for name in ("weak", "strong"))
    config = TuningConfig(shots=8, **{**SANDBOX_TUNING, "epochs": 12})
    tuned = tune(weak, sandbox.load_dataset("print", "train"), config=config, progress=False)
    images = sandbox.load_dataset("print", "unlabelled").select(range(600))
    test = sandbox.load_dataset("print", "test").select(range(600))
    adapter = extract(weak, tuned, images, progress=False)
    upgraded = transfer(adapter, strong, images, progress=False)
    return weak, strong, tuned, images, test, adapter, upgraded


def accuracy(classifier, test):
    return evaluate(classifier, test, progress=False)[0].value


def test_the_upgrade_lifts_the_strong_model_beyond_both_its_parents(job):
    _, strong, tuned, _, test, _, upgraded = job
    zero_shot = accuracy(AnchorClassifier(strong, tuned.anchors), test)
    assert accuracy(upgraded, test) > zero_shot + 8
    assert upgraded.adapter_config.provenance["parts"] == "both"
    assert accuracy(upgraded, test) > accuracy(tuned, test) - 2


def test_a_bridge_from_text_alone_helps_without_any_image(job):
    weak, strong, tuned, _, test, adapter, _ = job
    anchors = Anchors((), tuple(sandbox.vocabulary()))
    upgraded = transfer(adapter, strong, bridge=Bridge.build(weak, strong, anchors=anchors), progress=False)
    assert accuracy(upgraded, test) > accuracy(AnchorClassifier(strong, tuned.anchors), test) + 3


def test_peft_loads_the_upgrade_onto_a_plain_clip(job, tmp_path):
    _, strong, _, _, test, _, upgraded = job
    upgraded.save_pretrained(tmp_path)
    clip = CLIPModel.from_pretrained(sandbox.model_path("strong"), dtype=torch.float32)
    model = PeftModel.from_pretrained(clip, tmp_path).eval()
    pixels = strong.preprocess(test[:16]["image"])
    with torch.no_grad():
        gap = model(pixel_values=pixels).logits_per_image - upgraded(pixel_values=pixels).logits_per_image
    assert gap.abs().max() < 1e-4
    names = [row[0]["label"] for row in upgraded.predict(test[:16]["image"])]
    with torch.no_grad():
        best = model(pixel_values=pixels).logits_per_image.argmax(1)
    assert names == [upgraded.class_names[i] for i in best]


def test_the_next_upgrade_needs_only_the_new_model(job, tmp_path, caplog):
    _, _, tuned, images, test, adapter, _ = job
    adapter.save_pretrained(tmp_path)
    reloaded = AnchorClassifier.from_pretrained(tmp_path)
    other = DualEncoder.from_pretrained(sandbox.model_path("weak-upgraded"))
    upgraded = transfer(reloaded, other, images, progress=False)
    facts = upgraded.adapter_config.provenance
    assert facts["refit_on"] == 600 and facts["held_out_kl"] < 0.8 * facts["held_out_kl_zero_shot"]
    assert "stands in for" not in caplog.text  # the tuned model's own logits were saved with the adapter
    assert accuracy(upgraded, test) > accuracy(AnchorClassifier(other, tuned.anchors), test) + 5
