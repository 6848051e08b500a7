import json
from types import SimpleNamespace

import pytest
from PIL import Image
from test_figures import drawn  # noqa: F401, a fixture
from test_figures import found as analysed
from test_scores import CEILING, SCORES

from hf_transmiter.evaluation.compare import Comparison, Row, _open
from hf_transmiter.evaluation.methods import BACKPROP, CONTROL, IMAGES, LABELS, WEAK
from hf_transmiter.evaluation.report import Section, comparison_table, draw_ways, write_analysis, write_report
from hf_transmiter.evaluation.task import Answer
from hf_transmiter.hub.scores import Score, markdown_table


def test_report_holds_texts_tables_and_relative_links(tmp_path):
    figure = tmp_path / "out" / "figures" / "print accuracy_bars.png"
    figure.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(figure)
    table = markdown_table(SCORES, notes=CEILING, baseline="bridge")
    sections = [
        Section("Scores", f"What each method reaches.\n\n{table}"),
        Section("Pictures", figures=[None, figure]),
    ]
    path = write_report(tmp_path / "out", sections, title="Upgrade", intro="One task.")
    assert path == tmp_path / "out" / "report.md"
    text = path.read_text()
    order = [
        "# Upgrade\n\nOne task.\n\n## Scores\n\nWhat each method reaches.\n\n| method |",
        "## Pictures\n\n![print ",
    ]
    assert all(part in text for part in order)
    assert table.strip() in text
    assert text.endswith("![print accuracy bars](figures/print%20accuracy_bars.png)\n")
    assert "None" not in text
    assert sorted(p.name for p in path.parent.iterdir()) == ["figures", "report.md"]


def test_report_refuses_figures_outside_of_it(tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    with pytest.raises(ValueError, match="outside.png"):
        write_report(tmp_path / "out", [Section("a", figures=[outside])], title="t")
    assert not (tmp_path / "out").exists()


def test_a_comparison_says_what_each_method_costs_and_needs():
    rows = {}
    for name, accuracy, ece, seconds, *about in (
        ("zero-shot strong", 60.0, 5.0, 0.01, (), None, 0),
        ("refit", 70.0, 9.0, 2.0, {"task images"}, None, 28_300),
        ("a|probe", 80.0, 3.0, 140.0, {"labels", "backprop"}, "needs labels", None),
    ):
        values = {"accuracy": accuracy, "ece": ece}
        scores = {key: Score(name, "test", key, one, seconds=seconds) for key, one in values.items()}
        rows[name] = Row(None, scores, *about, open_names={"zero-shot strong": True, "refit": False}.get(name))
    found = Comparison(rows, None, ("a", "b"), skipped={"EFT": "it failed: a | b"})
    lines = [line for line in comparison_table(found).splitlines() if line.startswith("|")]
    assert lines[0] == (
        "| method | accuracy | ECE | seconds | size | any class names | labels | task images | "
        "backprop | weak model at run time |"
    )
    # The highest accuracy and the lowest calibration error of those that need no labels.
    assert lines[2] == "| zero-shot strong | 60.0 | **5.0** | 0.0 | 0 | yes | no | no | no | no |"
    assert lines[3] == "| refit | **70.0** | 9.0 | 2.0 | 28 kB | no | no | yes | no | no |"
    assert lines[4] == "| a\\|probe | 80.0 | 3.0 | 140 | – | – | yes | no | yes | no |"
    assert comparison_table(found).endswith("\nNot in the table:\n\n- EFT: it failed: a \\| b\n")
    known = {row["name"]: (row["models"], row["open_names"]) for row in found.to_dict()["rows"]}
    assert known == {"zero-shot strong": (1, True), "refit": (1, False), "a|probe": (1, None)}
    found.rows["refit"].size = 37_700_000
    assert "| 37.7 MB |" in comparison_table(found)
    nothing = Comparison({}, None, ("a", "b"), skipped={"EFT": "it failed: x"})
    assert comparison_table(nothing) == "\nNot in the table:\n\n- EFT: it failed: x\n"


@pytest.mark.parametrize("at_hand", [True, False])
def test_whose_names_stay_open(at_hand):
    """Zero-shot, a classifier that says so, the tuned model at run time if it is one; no head on class names."""
    task = SimpleNamespace(tuned_model="a model" if at_hand else None)
    assert _open(task, Answer(None, 0), {WEAK}) and _open(task, Answer(None, 0), ())
    assert _open(task, Answer(None, 400), {WEAK}) is at_hand
    assert _open(task, Answer(None, 400), {IMAGES, BACKPROP}) is False
    assert _open(task, Answer(None, 400, SimpleNamespace(open_vocabulary=True)), {IMAGES}) is True
    assert _open(task, Answer(None, 400, given=True), {LABELS, BACKPROP}) is None


def test_the_ways_that_are_drawn_need_no_labels(tmp_path, drawn):  # noqa: F811
    def row(name, score, **about):
        one = Score(name, "test", "agreement", score, seconds=None if name == "refit" else 1.0)
        return Row(None, {"agreement": one}, **about)

    found = Comparison({"zero-shot strong": row("zero-shot strong", 40.0)}, None, ("a", "b"), recommended="refit")
    assert draw_ways(tmp_path / "ways.png", found, title="t") is None
    found.rows["untuned teacher"] = row("untuned teacher", 50.0, note=CONTROL)
    found.rows["linear probe"] = row("linear probe", 90.0, needs={LABELS})
    found.rows |= {"refit": row("refit", 70.0, open_names=True), "EFT": row("EFT", 60.0, models=3)}
    assert draw_ways(tmp_path / "ways.png", found, title="t") == tmp_path / "ways.png"
    (axes,) = drawn[0].axes
    assert {text.get_text() for text in axes.texts} == {"refit", "EFT"}
    assert axes.get_ylabel() == "agreement with the tuned weak model (%)"


def test_an_analysis_with_labels(tmp_path, drawn):  # noqa: F811
    made = analysed(3, 24, tuned=True)
    path = write_analysis(tmp_path / "out", made, title="What it changes")
    names = ["shifts", "confusions", "reliability"]
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("![")] == [f"![{n}](figures/{n}.png)" for n in names]
    for name in names:
        with Image.open(tmp_path / "out" / "figures" / f"{name}.png") as image:
            assert image.format == "PNG"
    assert text.startswith("# What it changes\n") and f"{made.corrected} corrected, {made.broken} broken" in text
    assert "near 0 (+0.50), $ & co (+0.25)" in text and text.index("## Confidence") < text.index("## Figures")
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == json.loads(json.dumps(made.to_dict()))
    assert len(drawn[2].axes[0].lines) == 4  # the diagonal, before, after, the tuned model


def test_an_analysis_without_matplotlib_is_text(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    path = write_analysis(tmp_path, analysed(3, 12, labelled=False), title="bare")
    assert "![" not in path.read_text() and "Figures" not in path.read_text() and not (tmp_path / "figures").exists()
