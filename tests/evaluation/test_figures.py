import logging
import runpy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from hf_transmiter.evaluation import figures
from hf_transmiter.evaluation.analyse import AFTER, BEFORE, TUNED, compare_logits
from hf_transmiter.evaluation.figures import (
    Way,
    bars,
    compatibility_figure,
    confusion_change,
    confusion_difference,
    curves,
    reliability_figure,
    shift_figure,
    ways,
)
from hf_transmiter.evaluation.reliability import expected_calibration_error
from hf_transmiter.evaluation.report import Section, write_report


def one_hot(predicted, classes):
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


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
    return made


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved, to read what they show."""
    kept, save = [], figures._save

    def keep(figure, path):
        kept.append(figure)
        return save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)
    return kept


def ticks(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def names(axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def row(old, upgraded, retrained):
    found = {"old": old, "upgraded": upgraded, "retrained": retrained}
    return {model: values for model, values in found.items() if values is not None}


def check_png(path, width, height):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert width[0] <= image.width <= width[1] and height[0] <= image.height <= height[1]
        assert len(image.convert("RGB").getcolors(2**24)) > 10  # something is on it
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_ways_are_named_beside_their_points_and_not_upon_each_other(tmp_path, drawn):
    crowd = {f"a bridge of some kind, {n}": Way(60 + 0.2 * n, 1 + 0.02 * n) for n in range(6)}
    rows = {"EFT": Way(66, 0.0, 3, True), "refit": Way(72, 1.0, 1, True), "tuned": Way(73, 110, 1, True), **crowd}
    lines = {"zero-shot strong": 49.1}
    path = ways(rows, tmp_path / "ways.png", title="Which way", reference=lines, best="refit")
    check_png(path, (1000, 1200), (700, 800))
    (axes,) = drawn[0].axes
    texts = {text.get_text(): text for text in axes.texts}
    assert set(texts) == set(rows) and axes.get_xscale() == "log"
    boxes = [Text.get_window_extent(text) for text in texts.values()]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    inside = axes.get_window_extent()
    assert all(inside.x0 < box.x0 and box.x1 < inside.x1 for box in boxes)
    assert [name for name, text in texts.items() if text.get_fontweight() == "bold"] == ["refit"]
    said = ["zero-shot strong (49.1)", "any class names", "the task's names only"]
    assert legend(drawn[0]) == [*said, "1 model for a prediction", "3 models for a prediction"]
    assert axes.get_xticklabels()[0].get_text() == "0.1 or less"
    with pytest.raises(ValueError, match="no way"):
        ways({}, tmp_path / "none.png", title="Which way")


def test_bars_show_mean_seeds_and_references(tmp_path, drawn):
    path = tmp_path / "figures" / "bars.png"
    scores = {"refit": [70.0, 72.0, 74.0], "bridge $5$": [60.0]}
    reference = {"zero-shot strong": 55.0, "tuned strong": 90.0}
    assert bars(scores, path, title="Accuracy", reference=reference) == path
    check_png(path, (800, 1300), (200, 700))
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [72.0, 60.0]
    assert [dots.get_offsets()[:, 0].tolist() for dots in axes.collections] == [[70.0, 72.0, 74.0], [60.0]]
    assert [line.get_xdata()[0] for line in axes.lines] == [55.0, 90.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["refit", "bridge $5$"]
    assert [text.get_text() for text in axes.texts] == ["72.0 ± 2.0", "60.0"]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["zero-shot strong (55.0)", "tuned strong (90.0)"]
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > 90 and axes.yaxis_inverted()
    assert drawn[0].get_suptitle() == "Accuracy" and axes.get_xlabel() == "accuracy (%)"


def test_bars_refuse_what_cannot_be_drawn(tmp_path):
    for scores in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one method"):
            bars(scores, tmp_path / "a.png", title="t")
    with pytest.raises(ValueError, match="must end in .png"):
        bars({"a": [1.0]}, tmp_path / "a.pdf", title="t")
    assert not list(tmp_path.iterdir())


def test_curves_sort_points_and_band_where_there_is_a_std(tmp_path, drawn):
    path = tmp_path / "curves.png"
    series = {
        "refit": [(100, 70.0, 1.0), (10, 60.0, 2.0), (1000, 75.0, 0.5)],
        "bridge": [(10, 50.0, 0.0), (105, 52.0, 0.5)],
    }
    assert curves(series, path, title="t", xlabel="unlabelled images", reference={"tuned weak": 65.0}) == path
    check_png(path, (700, 1200), (400, 900))
    (axes,) = drawn[0].axes
    refit, bridge, weak = axes.lines
    assert refit.get_xydata().tolist() == [[10, 60], [100, 70], [1000, 75]]
    assert bridge.get_xydata().tolist() == [[10, 50], [105, 52]]
    assert list(weak.get_ydata()) == [65.0, 65.0]
    band, narrow = axes.collections
    assert narrow.get_paths()[0].get_extents().y1 == 52.5
    box = band.get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (58.0, 75.5)
    # 105 is too close to 100 to have a label of its own.
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "100", "1000"]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "unlabelled images", "accuracy (%)")


def test_curves_on_a_linear_axis_may_start_at_zero(tmp_path, drawn):
    path = tmp_path / "curves.png"
    curves(
        {"a": [(0, 1.0, 0.0), (0.5, 2.0, 0.0)]},
        path,
        title="t",
        xlabel="lambda",
        ylabel="gap (points)",
        xscale="linear",
    )
    assert (drawn[0].axes[0].get_xscale(), drawn[0].axes[0].get_ylabel()) == ("linear", "gap (points)")
    with pytest.raises(ValueError, match="xscale='linear'"):
        curves({"a": [(0, 1.0, 0.0), (0.5, 2.0, 0.0)]}, path, title="t", xlabel="lambda")


def test_one_point_on_a_logarithmic_axis(tmp_path):
    assert curves({"a": [(10, 1.0, 0.0)]}, tmp_path / "one.png", title="t", xlabel="beta").is_file()


def test_curves_refuse_nothing(tmp_path):
    with pytest.raises(ValueError, match="no series"):
        curves({}, tmp_path / "a.png", title="t", xlabel="x")


def test_confusion_difference_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    before = one_hot([0, 1, 1, 2, 1, 0], 4)
    after = one_hot([0, 0, 0, 2, 1, 3], 4)
    difference = confusion_difference(before, after, labels)
    assert difference[:2].tolist() == [[50.0, -50.0, 0.0, 0.0], [-50.0, 0.0, 0.0, 50.0]]
    assert difference[2:].isnan().all()  # classes without images


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_confusion_difference_properties(classes, count, seed):
    draw = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, count, classes, generator=draw)
    labels = torch.randint(classes, (count,), generator=draw)
    difference = confusion_difference(before, after, labels)
    present = labels.bincount(minlength=classes) > 0
    assert torch.equal(~difference.isnan().any(1), present)
    assert torch.allclose(difference[present].sum(1), torch.zeros(int(present.sum()), dtype=torch.float64), atol=1e-9)
    # Weighted by class size, the diagonal is the change of the overall accuracy.
    gain = 100 * ((after.argmax(1) == labels).double().mean() - (before.argmax(1) == labels).double().mean())
    weights = labels.bincount(minlength=classes).double() / count
    assert torch.isclose((difference.diagonal().nan_to_num() * weights).sum(), gain, atol=1e-9)
    assert torch.allclose(confusion_difference(after, before, labels)[present], -difference[present])


def test_confusion_difference_errors():
    logits = torch.zeros(3, 2)
    for before, after, labels in (
        (logits, torch.zeros(3, 3), torch.zeros(3)),
        (logits, logits, torch.zeros(2)),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3)),  # predictions instead of logits
    ):
        with pytest.raises(ValueError, match=r"logits must be \(N, C\)"):
            confusion_difference(before, after, labels)
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([0, -1, 1])):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
            confusion_difference(logits, logits, labels)


def test_confusion_change_of_a_hundred_classes(tmp_path, drawn):
    path = tmp_path / "confusion.png"
    labels = torch.arange(99).repeat_interleave(4)  # class 99 has no image
    before, after = labels.clone(), labels.clone()
    before[8:12] = 3  # class 2 is wrong before, right after
    after[20:22] = 6  # half of class 5 is lost
    names = [f"class_{i}_with_a_name_longer_than_the_axis" for i in range(100)]
    logits = [one_hot(predicted.tolist(), 100) for predicted in (before, after)]
    assert confusion_change(*logits, labels, names, path, title="Tuned to upgraded") == path
    check_png(path, (1000, 1500), (500, 900))
    matrix, changes = drawn[0].axes[:2]
    (image,) = matrix.images
    shown = image.get_array()
    assert (shown[2, 2], shown[2, 3], shown[5, 5], shown[5, 6], shown[0, 0]) == (100, -100, -50, 50, 0)
    assert np.ma.getmaskarray(shown)[99].all() and image.get_clim() == (-100, 100)
    assert len(matrix.get_xticklabels()) == len(matrix.get_yticklabels()) == 25
    assert [bar.get_width() for bar in changes.patches] == [100, -50]
    assert [text.get_text() for text in changes.texts] == ["+100", "−50"]
    assert [t.get_text() for t in changes.get_yticklabels()] == ["class_2_with_a_name_l…", "class_5_with_a_name_l…"]
    assert all(a.title.get_window_extent().x1 <= drawn[0].bbox.x1 for a in (matrix, changes))


def test_confusion_change_without_any_change(tmp_path, drawn):
    logits = torch.eye(3)
    confusion_change(logits, logits, torch.arange(3), "abc", tmp_path / "same.png", title="t")
    assert drawn[0].axes[1].get_title() == "No class gained or lost" and not drawn[0].axes[1].patches
    with pytest.raises(ValueError, match="3 classes and 2 names"):
        confusion_change(logits, logits, torch.arange(3), "ab", tmp_path / "same.png", title="t")


def test_at_most_eight_classes_on_either_side(tmp_path, drawn):
    labels = torch.arange(30)
    before = one_hot([(i + 1) % 30 if i < 12 else i for i in range(30)], 30)
    after = one_hot([i if i < 12 else (i + 1) % 30 for i in range(30)], 30)
    confusion_change(before, after, labels, [str(i) for i in labels.tolist()], tmp_path / "a.png", title="t")
    assert [bar.get_width() for bar in drawn[0].axes[1].patches] == [100] * 8 + [-100] * 8


def test_shifts_show_the_classes_that_changed_most(tmp_path, drawn):
    many = found(40, labelled=False)
    assert shift_figure(many, tmp_path / "many.png") == tmp_path / "many.png"
    (axes,) = drawn[0].axes
    ranked = sorted(many.classes, key=lambda change: -change.probability_shift)
    rows = [*ranked[:12], *ranked[-12:]]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([change.probability_shift for change in rows])
    assert [tick.rstrip("…") for tick in ticks(axes)] == [change.name[:23] for change in rows]
    assert axes.texts[0].get_text() == f"+{rows[0].probability_shift:.1f}"
    assert [text.get_window_extent().x1 <= drawn[0].bbox.x1 for text in axes.texts]


def test_reliability_has_a_line_per_classifier(tmp_path, drawn):
    made = found(4, 400, tuned=True)
    reliability_figure(made.logits, made.labels, tmp_path / "reliability.png", title="sure?")
    top, bottom = drawn[0].axes
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    errors = {name: expected_calibration_error(z, made.labels) for name, z in made.logits.items()}
    assert names == [f"{name} (calibration error {error:.1f} %)" for name, error in errors.items()]
    diagonal, *lines = top.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) and len(lines) == 3
    for stairs in bottom.patches:
        assert sum(stairs.get_data().values) == pytest.approx(100)


def test_compatibility_has_three_bars_and_says_what_was_refused(tmp_path, drawn):
    rows = {
        "ContCoOp": row([70.0, 72.0], [66.0, 64.0], [71.0]),
        "MaPLe": row([74.0], None, [76.0]),
        "IVLP": row([73.0], [20.0], None),
    }
    path = tmp_path / "compatibility.png"
    assert compatibility_figure(rows, path, {"zero-shot old": 55.0, "zero-shot upgraded": 60.0}) == path
    (axes,) = drawn[0].axes
    heights = [[bar.get_height() for bar in group.patches] for group in axes.containers if hasattr(group, "patches")]
    assert heights == [[71.0, 74.0, 73.0], [65.0, 20.0], [71.0, 76.0]]
    diamonds = next(points for points in axes.collections if "harmonic" in str(points.get_label()))
    assert diamonds.get_offsets()[:, 1].tolist() == pytest.approx([67.853, 31.398], abs=1e-3)
    (refused,) = axes.texts
    assert refused.get_text() == "refused" and refused.get_position()[0] == 1
    assert names(axes) == ["ContCoOp\n67.9 ± 0.1", "MaPLe", "IVLP\n31.4"]
    assert {"zero-shot old (55.0)", "zero-shot upgraded (60.0)", "old model", "re-trained"} < set(legend(drawn[0]))
    # Every bar stands beside, not on, its neighbours.
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))


def test_compatibility_leaves_no_room_for_what_was_not_retrained(tmp_path, drawn):
    rows = {"CoOp": row([70.0], [60.0], None), "MaPLe": row([74.0], None, None)}
    compatibility_figure(rows, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    middles = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert middles == pytest.approx([-0.135, 0.865, 0.135])  # the names stand between the two
    assert axes.texts[0].get_position()[0] == pytest.approx(1.135)
    assert "re-trained" not in legend(drawn[0])
    compatibility_figure({"MaPLe": rows["MaPLe"]}, tmp_path / "b.png")  # all refused
    assert [bar.get_height() for bar in drawn[1].axes[0].patches] == [74.0]


def test_without_matplotlib_figures_are_left_out_with_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures._say_missing.cache_clear()
    logits = torch.eye(3)
    with caplog.at_level(logging.INFO, "hf_transmiter"):
        made = [
            bars({"a": [1.0]}, tmp_path / "a.png", title="t"),
            curves({"a": [(1, 1.0, 0.0)]}, tmp_path / "b.png", title="t", xlabel="x"),
            confusion_change(logits, logits, torch.arange(3), "abc", tmp_path / "c.png", title="t"),
        ]
    assert made == [None] * 3 and not list(tmp_path.iterdir())
    assert [record.message for record in caplog.records if "hf-transmiter[plots]" in record.message] == [
        caplog.records[0].message
    ] and len(caplog.records) == 1
    assert "# Report" in write_report(tmp_path, [Section("s", figures=made)], title="Report").read_text()
    # The module itself loads without it.
    assert "bars" in runpy.run_module(figures.__name__)
    figures._say_missing.cache_clear()
