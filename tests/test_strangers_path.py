"""What a stranger does: adapters and bridges that somebody else has pushed, on a machine that has nothing of theirs.

The second machine is a process of its own, with an empty cache and nobody logged in.
"""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hf_transmiter import Bridge, DualEncoder, TuningConfig, extract, push, sandbox, transfer, tune
from hf_transmiter.hub.repo import model_location


BEFORE = """
import torch
from safetensors.torch import save_file
torch.set_grad_enabled(False)
pictures, found = [f"{number}.png" for number in range(4)], {}
"""
LOAD = """
from hf_transmiter import AnchorClassifier
model = AnchorClassifier.from_pretrained("SOURCE")
found["SOURCE"] = model(pixel_values=model.encoder.preprocess(pictures)).logits_per_image
"""
AS_PEFT = """
import hf_transmiter
from peft import PeftModel
from transformers import CLIPModel
clip = CLIPModel.from_pretrained("alice/weak", dtype=torch.float32)
model = PeftModel.from_pretrained(clip, "alice/adapter").eval()
found["PEFT"] = model(pixel_values=hf_transmiter.DualEncoder(clip).preprocess(pictures)).logits_per_image
"""


@pytest.fixture
def shared(hub, tmp_path):
    """The first machine: a model tuned on the sandbox, read out as an adapter, a bridge; all pushed.

    Returns: the expected logits of the adapter and of what it becomes over the bridge.
    """
    for name in ("weak", "strong"):
        HfApi().create_repo(f"alice/{name}")
        HfApi().upload_folder(repo_id=f"alice/{name}", folder_path=model_location(f"sandbox:{name}"))
    weak, strong = (DualEncoder.from_pretrained(f"alice/{name}") for name in ("weak", "strong"))
    data = sandbox.load_dataset("print", "validation")
    config = TuningConfig(shots=2, epochs=2, batch_size=24, lr=1e-3)
    tuned = tune(weak, data, config=config, progress=False)
    tuned.save_pretrained(tmp_path / "tuned")
    push(tmp_path / "tuned", "alice/tuned")
    adapter = extract(weak, tuned, data.select(range(100)), progress=False)
    adapter.push_to_hub("alice/adapter")
    bridge = Bridge.build(weak, strong)
    bridge.push_to_hub("alice/bridge")
    for number in range(4):
        data[number]["image"].save(tmp_path / f"{number}.png")
    upgraded = transfer(adapter, strong, bridge=bridge, progress=False)
    pictures = [tmp_path / f"{number}.png" for number in range(4)]
    return [each(pixel_values=each.encoder.preprocess(pictures)).logits_per_image for each in (adapter, upgraded)]


def test_a_strangers_path(hub, shared, tmp_path):
    adapter, upgraded = shared
    home = hub.new_machine(token=None)
    assert not home.exists()

    def machine(*words: str, offline: bool = False) -> str:
        environment = hub.environment(offline) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def logits(*parts: str, offline: bool = False) -> dict[str, torch.Tensor]:
        machine("-c", "".join((BEFORE, *parts, "save_file(found, 'logits.safetensors')")), offline=offline)
        return load_file(tmp_path / "logits.safetensors")

    load, load_upgraded = (LOAD.replace("SOURCE", source) for source in ("alice/adapter", "upgraded"))
    # Three lines, and the same logits to the bit.
    assert torch.equal(logits(load, AS_PEFT)["alice/adapter"], adapter)
    # To the strong model with zero images.
    words = ("transfer", "alice/adapter", "--strong", "alice/strong", "--bridge", "alice/bridge")
    said = machine("-m", "hf_transmiter", *words, "--output-dir", "upgraded", "--json", "--quiet")
    facts = json.loads(said)["provenance"]
    assert facts["bridge"]["source"] == "text" and "refit_on" not in facts
    # All of it again without a network, and as PEFT users do.
    asked = len(hub.log)
    found = logits(load, load_upgraded, AS_PEFT, offline=True)
    assert torch.equal(found["alice/adapter"], adapter)
    assert torch.equal(found["upgraded"], upgraded) and not torch.equal(upgraded, adapter)
    torch.testing.assert_close(found["PEFT"], adapter, rtol=0, atol=1e-4)  # CLIPModel divides by its own norm
    assert len(hub.log) == asked
