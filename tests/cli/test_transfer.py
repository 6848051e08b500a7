"""`bridge` and `transfer` on the command line: bridges as files, folders, repositories; composed, turned round."""

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from commands import run
from safetensors.torch import load_file

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig


WEAK, UPGRADED, STRONG = "sandbox:weak", "sandbox:weak-upgraded", "sandbox:strong"
STREET = ("--dataset", "sandbox:street", "--max-images", "150")


def facts(*args) -> dict:
    return json.loads(run(*args, "--json", "--quiet").stdout)


def error(*args) -> str:
    return run(*args, "--quiet", code=1).stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Text bridges weak -> upgraded -> strong as files, and an adapter of the weak model."""
    folder = tmp_path_factory.mktemp("bridges")
    words = Anchors((), tuple(f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in "abcdefghij"))
    words.save(folder / "words.json")
    for pair in ((WEAK, UPGRADED), (UPGRADED, STRONG), (WEAK, STRONG)):
        name = "-".join(model.split(":")[1].replace("-", "_") for model in pair)
        options = ("--weak", pair[0], "--strong", pair[1], "--anchors", folder / "words.json", "--quiet")
        run("bridge", *options, "--output", folder / f"{name}.safetensors")
    encoder, names = DualEncoder.from_pretrained(WEAK), Anchors(("red disc", "blue ring", "green star"))
    adapter = AnchorClassifier(encoder, names).add_adapter(TransMiterConfig.for_anchors(names, form="linear"))
    adapter.transmiter.tensors("default")["class_vectors"].add_(0.1 * torch.randn(3, encoder.embed_dim))
    adapter.save_pretrained(folder / "adapter")
    return folder


def test_a_folder_for_the_hub_and_a_file(out):
    options = ("--weak", WEAK, "--strong", STRONG, *STREET, "--cache-dir", out / "features")
    found = facts("bridge", *options, "--output", out / "street")
    assert (found["dataset"], found["num_pairs"]) == ("sandbox:street (unlabelled)", 150)
    assert 0 < found["held_out"] < found["alignment"] < 1 and found["held_out_on"] == "images"
    assert sorted(path.name for path in (out / "street").iterdir()) == ["README.md", "bridge.safetensors"]
    bridge = Bridge.from_pretrained(out / "street")
    assert (bridge.dataset, bridge.held_out) == (found["dataset"], found["held_out"])
    assert bridge.versions["torch"] == version("torch")
    said = run("bridge", *options, "--output", out / "street.safetensors").stdout
    assert (
        f"from 150 images pairs, alignment {bridge.alignment:.3f} (held out: {bridge.held_out:.3f} on images)" in said
    )
    assert torch.equal(Bridge.load(out / "street.safetensors").matrix, bridge.matrix)
    for output in ("street", "street.safetensors"):
        assert "--overwrite" in error("bridge", *options, "--output", out / output)
        run("bridge", *options, "--output", out / output, "--overwrite", "--quiet")


def test_transfer_over_a_bridge_from_anywhere(out, hub):
    """A file, a folder and a Hub id give one adapter, without an image; adapter and bridge may both be on the Hub."""
    bridge = Bridge.load(out / "weak-strong.safetensors")
    bridge.save_pretrained(out / "folder")
    bridge.push_to_hub("alice/bridge")
    AnchorClassifier.from_pretrained(out / "adapter").push_to_hub("alice/adapter")
    hub.new_machine()
    sources = ((out / "adapter", out / "weak-strong.safetensors"), (out / "adapter", out / "folder"))
    weights = []
    for number, (adapter, source) in enumerate((*sources, ("alice/adapter", "alice/bridge"))):
        target = out / f"strong-{number}"
        found = facts("transfer", adapter, "--strong", STRONG, "--bridge", source, "--output-dir", target)
        assert found["provenance"]["bridge"]["source"] == "text" and "refit_on" not in found["provenance"]
        weights.append(load_file(target / "adapter_model.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(other[key], weights[0][key]) for key in weights[0])
    args = ("transfer", out / "adapter", "--strong", STRONG, "--output-dir", out / "none")
    assert "alice/none" in error(*args, "--bridge", "alice/none")
    assert "does not exist" in error(*args, "--bridge", out / "none.safetensors")
    assert "load that model, or build a bridge" in error(*args, "--bridge", out / "weak_upgraded-strong.safetensors")


def test_several_adapters_over_one_bridge(out, monkeypatch):
    """Equal to one at a time; models are loaded once; what is finished is kept, what is not is made."""
    second = AnchorClassifier.from_pretrained(out / "adapter")
    second.transmiter.tensors("default")["class_vectors"].mul_(-1)
    second.save_pretrained(out / "second")
    bridge = ("--bridge", out / "weak-strong.safetensors")
    args = ("transfer", out / "adapter", out / "second", "--strong", STRONG, "--output-dir", out / "several", *bridge)
    run(*args[:2], *args[3:5], "--output-dir", out / "alone", *bridge, "--quiet")
    loaded = []
    load = DualEncoder.from_pretrained
    monkeypatch.setattr(DualEncoder, "from_pretrained", lambda name, **on: loaded.append(name) or load(name, **on))
    found = facts(*args)
    assert sorted(loaded) == [STRONG, WEAK] and found["kept"] == 0
    assert [made["output_dir"] for made in found["transferred"]] == [
        str(out / "several" / n) for n in ("adapter", "second")
    ]
    alone, several = (load_file(out / n / "adapter_model.safetensors") for n in ("alone", "several/adapter"))
    assert all(torch.equal(several[key], alone[key]) for key in alone)
    shutil.rmtree(out / "several" / "second")
    kept = (out / "several" / "adapter" / "adapter_config.json").stat().st_mtime_ns
    found = facts(*args)
    assert found["kept"] == 1 and [made["output_dir"] for made in found["transferred"]] == [
        str(out / "several/second")
    ]
    assert (out / "several" / "adapter" / "adapter_config.json").stat().st_mtime_ns == kept
    assert "2 were finished already" in run(*args).stdout
    assert "--overwrite" in error(*args, "--zero-shot-weight", "0.5")  # finished with other settings
    assert facts(*args, "--overwrite")["kept"] == 0


def test_several_adapters_need_a_bridge_and_names_of_their_own(out):
    shutil.copytree(out / "adapter", out / "elsewhere" / "adapter")
    args = (
        "transfer",
        out / "adapter",
        out / "elsewhere" / "adapter",
        "--strong",
        STRONG,
        "--output-dir",
        out / "two",
    )
    bridge = ("--bridge", out / "weak-strong.safetensors")
    assert "cross one bridge, without pictures" in error(*args)
    assert "cross one bridge, without pictures" in error(*args, *bridge, *STREET)
    assert "two adapters are called 'adapter'" in error(*args, *bridge)
    assert not (out / "two").exists()


def test_bridges_of_bridges(out):
    pairs = (out / "weak-weak_upgraded.safetensors", out / "weak_upgraded-strong.safetensors")
    steps = [part for pair in pairs for part in ("--compose", pair)]
    found = facts("bridge", *steps, "--output", out / "composed.safetensors")
    how = f"composed of {WEAK} -> {UPGRADED} and {UPGRADED} -> {STRONG}"
    assert (found["derived"], found["alignment"], found["held_out"]) == (how, None, None)
    measured = ("--output", out / "measured", *STREET, "--cache-dir", out / "features")
    found = facts("bridge", *steps, *measured)
    assert 0 < found["held_out"] < 1 and Bridge.from_pretrained(out / "measured").held_out == found["held_out"]
    assert f"Bridge {how}, alignment not measured" in run("bridge", *steps, "--output", out / "again").stdout
    run("bridge", "--invert", out / "composed.safetensors", "--output", out / "back", "--quiet")
    back = Bridge.from_pretrained(out / "back")
    assert back.derived == f"composed of {STRONG} -> {UPGRADED} and {UPGRADED} -> {WEAK}"
    target = ("--strong", STRONG, "--output-dir", out / "over_composed")
    found = facts("transfer", out / "adapter", *target, "--bridge", out / "measured")
    assert found["provenance"]["bridge"]["alignment"] is None


def test_refused(out):
    first, second = (out / f"{name}.safetensors" for name in ("weak-weak_upgraded", "weak_upgraded-strong"))
    new = ("--output", out / "refused")
    assert "do not meet" in error("bridge", "--compose", second, "--compose", first, *new)
    for wrong in (("--compose", first), ("--compose", first, "--compose", second, "--invert", first)):
        assert "at least twice" in error("bridge", *wrong, *new)
    assert "--weak and --strong" in error("bridge", "--weak", WEAK, *new)
    assert not (out / "refused").exists()
