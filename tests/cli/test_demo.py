import json

import pytest
import torch
from commands import error, run
from peft import PeftModel
from PIL import Image
from transformers import CLIPModel

from hf_transmiter import DualEncoder, evaluate, sandbox
from hf_transmiter.hub.repo import model_location
from hf_transmiter.hub.scores import read_scores
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.saved import load_teacher


def test_refuses_unknown_tasks_and_outputs_that_are_not_its_own(tmp_path):
    assert "no sandbox task 'mars'; there are print" in error("demo", "--output-dir", tmp_path, "--domains", "mars")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for options in ((), ("--overwrite",)):
        said = error("demo", "--output-dir", tmp_path / "mine", *options)
        assert "was not written by this command: choose another folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_leaves_everything_behind(tmp_path):
    out = tmp_path / "out"
    said = run("demo", "--output-dir", out, "--domains", "jargon", "--quiet").stdout
    scores = {s.method: s.value for s in read_scores(out / "scores.json") if s.metric == "accuracy"}
    assert scores["refit"] > scores["zero-shot strong"] + 10 and scores["refit"] > scores["tuned weak"]
    rows = json.loads((out / "scores.json").read_text())
    assert set(rows[0]) >= {"method", "split", "metric", "value", "std", "seconds"} and "peak_mb" not in rows[0]
    figures = sorted(path.name for path in (out / "figures").iterdir())
    assert figures == [f"jargon_{name}.png" for name in ("confusion", "methods", "ways")]
    for name in figures:
        assert min(Image.open(out / "figures" / name).size) > 300 and name in (out / "report.md").read_text()
    encoder = DualEncoder.from_pretrained("sandbox:weak")
    tuned = load_teacher(str(out / "jargon" / "tuned"), encoder)
    accuracy = evaluate(tuned, sandbox.load_dataset("jargon", "test"), progress=False)[0].value
    assert accuracy == pytest.approx(scores["tuned weak"], abs=0.1)
    card = (out / "jargon" / "strong_adapter" / "README.md").read_text()
    assert f"{scores['refit']:.1f}" in card and "tuned weak" in card and str(out) not in card
    assert AnchorClassifier.from_pretrained(out / "jargon" / "adapter").calibration is not None
    assert (out / "jargon" / "bridge.safetensors").is_file()
    assert len(AnchorClassifier.from_pretrained(out / "jargon" / "strong_adapter").class_names) == 36
    lines = said.splitlines()
    assert lines[-1] == f"Report: {out / 'report.md'}"
    gain, said = scores["refit"] - scores["zero-shot strong"], lines[0].removeprefix("Task: jargon (coop). ")
    assert said.startswith(f"Take refit: refit scores {scores['refit']:.1f} against ") and f", {gain:+.1f} ± " in said
    assert said in (out / "report.md").read_text()
    upgraded = AnchorClassifier.from_pretrained(out / "jargon" / "strong_adapter")
    clip = CLIPModel.from_pretrained(model_location("sandbox:strong"), dtype=torch.float32)
    with_peft = PeftModel.from_pretrained(clip, out / "jargon" / "strong_adapter").eval()
    pixels = upgraded.encoder.preprocess(sandbox.load_dataset("jargon", "test")[:8]["image"])
    with torch.no_grad():
        answers = with_peft(pixel_values=pixels).logits_per_image
        torch.testing.assert_close(answers, upgraded(pixel_values=pixels).logits_per_image, atol=1e-3, rtol=0)
    error("demo", "--output-dir", out)  # needs --overwrite
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode  # as readable as any other folder
