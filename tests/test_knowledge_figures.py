"""Figures of an analysis: what they show, for a few and for many classes, with and without labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_transmiter import figures, knowledge_figures
from hf_transmiter.knowledge import AFTER, BEFORE, COSINE, TUNED, compare_logits
from hf_transmiter.knowledge_figures import neighbour_figure, reliability_figure, shift_figure, write_analysis
from hf_transmiter.reliability import expected_calibration_error


def found(classes: int, images: int = 60, labelled: bool = True, tuned: bool = False):
    generator = torch.Generator().manual_seed(0)
    logits = {BEFORE: 2 * torch.randn(images, classes, generator=generator)}
    logits[AFTER] = logits[BEFORE] + torch.randn(images, classes, generator=generator)
    if tuned:
        logits[TUNED] = logits[AFTER] + torch.randn(images, classes, generator=generator)
    labels = torch.arange(images) % classes if labelled else None
    names = [f"a class with a rather long name, number {c}" if c == 1 else f"class {c}" for c in range(classes)]
    near = [{"towards": ((f"near {c}", 0.5), ("$ & co", 0.25)), "away": (("far", -0.1),)} for c in range(classes)]
    made = compare_logits(logits, names, labels, near)
    made.measure = COSINE
    return made


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved, to read what they show."""
    kept, save = [], figures._save

    def keep(figure, path):
        kept.append(figure)
        return save(figure, path)

    for module in (figures, knowledge_figures):
        monkeypatch.setattr(module, "_save", keep)
    return kept


def ticks(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_shifts_show_the_classes_that_changed_most(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(knowledge_figures, "ROWS", 5)
    many = found(12)
    assert shift_figure(many, tmp_path / "many.png") == tmp_path / "many.png"
    left, right = drawn[0].axes
    chosen = sorted(many.classes, key=lambda change: -abs(change.probability_shift))[:5]
    rows = sorted(chosen, key=lambda change: -change.probability_shift)
    assert [bar.get_width() for bar in left.patches] == pytest.approx([change.probability_shift for change in rows])
    assert [tick.rstrip("…") for tick in ticks(left)] == [change.name[:25] for change in rows]
    assert "5 of 12" in drawn[0].get_suptitle()
    before, after = (np.asarray(dots.get_offsets())[:, 0] for dots in right.collections[1:])
    assert before == pytest.approx([change.share_before for change in rows])
    assert after == pytest.approx([change.share_after for change in rows])


def test_reliability_has_a_line_per_classifier(tmp_path, drawn):
    made = found(4, 400, tuned=True)
    reliability_figure(made.logits, made.labels, tmp_path / "reliability.png", title="sure?", bins=5)
    top, bottom = drawn[0].axes
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    errors = {name: expected_calibration_error(z, made.labels, 5) for name, z in made.logits.items()}
    assert names == [f"{name} (calibration error {error:.1f} %)" for name, error in errors.items()]
    diagonal, *lines = top.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) and len(lines) == 3
    for stairs in bottom.patches:
        assert sum(stairs.get_data().values) == pytest.approx(100)
    with pytest.raises(ValueError, match="no classifier"):
        reliability_figure({}, made.labels, tmp_path / "none.png", title="")


def test_neighbours_are_written_out(tmp_path, drawn):
    made = found(20)
    neighbour_figure(made, tmp_path / "neighbours.png", count=3)
    axes = drawn[0].axes[0]
    shown = [text.get_text() for text in axes.texts]
    most = made.changed_most(3)
    assert len(ticks(axes)) == 3 and shown[:2] == [f"{most[0].towards[0][0]}\n0.50", "$ & co\n0.25"]
    nowhere = found(3)
    nowhere.classes = [type(change)(**{**vars(change), "towards": ()}) for change in nowhere.classes]
    with pytest.raises(ValueError, match="no class has auxiliary names"):
        neighbour_figure(nowhere, tmp_path / "none.png")


def test_an_analysis_with_labels(tmp_path, drawn, make_dataset):
    images = make_dataset(24)
    made = found(3, 24, tuned=True)
    path = write_analysis(tmp_path / "out", made, images, title="What it changes", count=2)
    names = ["shifts", "confusions", "reliability", "neighbours", "corrected", "broken"]
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("![")] == [f"![{n}](figures/{n}.png)" for n in names]
    for name in names:
        with Image.open(tmp_path / "out" / "figures" / f"{name}.png") as image:
            assert image.format == "PNG"
    assert text.startswith("# What it changes\n") and f"{made.corrected} corrected, {made.broken} broken" in text
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == json.loads(json.dumps(made.to_dict()))
    assert len(drawn[2].axes[0].lines) == 5  # the diagonal, before, after, at the temperature, the tuned model
    # the first corrected picture is the one the adapter is surest of
    was, now = (made.logits[name].argmax(1) for name in (BEFORE, AFTER))
    right = (now == made.labels) & (was != made.labels)
    sure = made.logits[AFTER].softmax(1).max(1).values.where(right, torch.tensor(0.0))
    first, caption = int(sure.argmax()), drawn[4].axes[0].texts[0].get_text().replace("\n", " ")
    assert caption.endswith(f"{100 * float(sure.max()):.0f}\u00a0%") and "→" in caption
    shown = drawn[4].axes[0].images[0].get_array()
    assert np.array_equal(shown, np.asarray(images[first]["image"]))


def test_without_matplotlib_the_text_stays(tmp_path, monkeypatch, make_dataset):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    path = write_analysis(tmp_path, found(3, 12, labelled=False), make_dataset(12), title="bare")
    assert "![" not in path.read_text() and not (tmp_path / "figures").exists()
