import json

import pytest
from PIL import Image

from hf_transmiter import DualEncoder, demo, evaluate, sandbox
from hf_transmiter.catalog import load_teacher
from hf_transmiter.classifier import AnchorClassifier
from hf_transmiter.scores import read_scores


def test_refuses_unknown_tasks_and_outputs_that_are_not_its_own(tmp_path):
    with pytest.raises(ValueError, match="no sandbox task 'mars'; there are print"):
        demo.run_demo(tmp_path / "out", domains=["mars"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="--overwrite"):
        demo.run_demo(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="something else than a demo"):
        demo.run_demo(tmp_path / "mine", overwrite=True)
    (tmp_path / "mine" / "scores.json").write_text("[]")  # a common name alone does not make it a demo's
    with pytest.raises(FileExistsError, match="something else than a demo"):
        demo.run_demo(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_leaves_everything_behind(tmp_path):
    found = demo.run_demo(tmp_path / "out", domains=["jargon"], ceiling=False, progress=False)
    out = tmp_path / "out"
    scores = {s.method: s.value for s in read_scores(out / "scores.json") if s.metric == "accuracy"}
    assert scores["refit"] > scores["zero-shot strong"] + 10 and scores["refit"] > scores["tuned weak"]
    rows = json.loads((out / "scores.json").read_text())
    assert set(rows[0]) >= {"method", "split", "metric", "value", "std", "seconds", "peak_mb"}
    figures = sorted(path.name for path in (out / "figures").iterdir())
    assert figures == [f"jargon_{name}.png" for name in ("beta", "confusion", "images", "lambda", "methods")]
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
    assert found["recommended"] == {"jargon": "refit"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode  # as readable as any other folder
