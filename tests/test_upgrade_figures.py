from types import SimpleNamespace

import pytest
from PIL import Image

from hf_transmiter import figures, upgrade_figures
from hf_transmiter.drift import LayerDrift
from hf_transmiter.upgrade_figures import (
    compatibility_figure,
    context_length_figure,
    drift_figure,
    layer_study_figure,
)


PARAMETERS = [
    LayerDrift("token table", 0.01, 0.2),
    LayerDrift("layer 1", 0.02, 0.1),
    LayerDrift("projection", 0, None),
]
FEATURES = [LayerDrift("embeddings", 0.5, 0.1, 0.99), LayerDrift("layer 1", 3.0, 0.4, 0.8)]


def row(method, old, upgraded, retrained, harmonic):
    return SimpleNamespace(method=method, old=old, upgraded=upgraded, retrained=retrained, harmonic=harmonic)


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved, to read what they show."""
    kept, save = [], figures._save

    def keep(figure, path):
        kept.append(figure)
        return save(figure, path)

    for module in (figures, upgrade_figures):
        monkeypatch.setattr(module, "_save", keep)
    return kept


def ticks(axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_drift_has_size_and_share_of_every_part(tmp_path, drawn):
    path = tmp_path / "figures" / "drift.png"
    assert drift_figure(PARAMETERS, FEATURES, path) == path
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > image.height
    assert [file.name for file in path.parent.iterdir()] == ["drift.png"]
    parameters, features, parameters_share, features_share = drawn[0].axes
    assert ticks(parameters) == ["token table", "layer 1", "projection"] and ticks(features) == [
        "embeddings",
        "layer 1",
    ]
    assert [bar.get_height() for bar in parameters.patches] == [0.01, 0.02, 0]
    assert [bar.get_height() for bar in features.patches] == [0.5, 3.0]
    assert list(parameters_share.lines[0].get_ydata())[:2] == [20.0, 10.0]
    assert list(features_share.lines[0].get_ydata()) == [10.0, 40.0]
    assert parameters.get_ylim()[0] == features.get_ylim()[0] == features_share.get_ylim()[0] == 0


def test_drift_of_unequal_models_shows_the_similarity(tmp_path, drawn):
    rows = [LayerDrift("embeddings", None, None, None), LayerDrift("layer 1 (new: 2)", None, None, 0.7)]
    drift_figure(None, rows, tmp_path / "drift.png")
    (axes,) = drawn[0].axes
    assert not axes.patches and list(axes.lines[0].get_ydata())[1] == 0.7 and axes.get_ylim() == (0, 1.05)
    assert "similarity" in axes.get_ylabel()


@pytest.mark.parametrize("depth", [2, 24])
def test_labels_of_shallow_and_deep_towers_do_not_overlap(tmp_path, drawn, depth):
    layers = [LayerDrift(f"layer {i + 1}", 1.0 + i, 0.1, 0.9) for i in range(depth)]
    drift_figure([LayerDrift("token table", 1.0, 0.1), *layers], [*layers, FEATURES[0]], tmp_path / "drift.png")
    for axes in drawn[0].axes[:2]:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        if depth == 24:  # upright; slanted ones are apart although the boxes around them touch
            assert all(left.x1 <= right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
        assert min(box.y0 for box in boxes) >= 0


def test_layer_study_counts_whole_layers(tmp_path, drawn):
    scores = {"old model": [(1, 70.0, 1.0), (2, 71.0, 1.5)], "upgraded model": [(1, 68.0, 2.0), (2, 55.0, 3.0)]}
    path = tmp_path / "layers.png"
    assert layer_study_figure(scores, path, {"zero-shot old model": 50.0}) == path
    (axes,) = drawn[0].axes
    old, upgraded, floor = axes.lines
    assert old.get_xydata().tolist() == [[1, 70], [2, 71]] and upgraded.get_xydata().tolist() == [[1, 68], [2, 55]]
    assert list(floor.get_ydata()) == [50.0, 50.0] and floor.get_linestyle() == "--"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert legend(drawn[0]) == ["old model", "upgraded model", "zero-shot old model (50.0)"]


def test_context_length_has_error_bars(tmp_path, drawn):
    scores = {"CoOp": [(16, 60.0, 2.0), (4, 62.0, 1.0)], "ContCoOp": [(4, 66.0, 0.5), (16, 67.0, 0.25)]}
    path = tmp_path / "context.png"
    assert context_length_figure(scores, path) == path
    (axes,) = drawn[0].axes
    assert ticks(axes) == ["4", "16"] and legend(drawn[0]) == ["CoOp", "ContCoOp"]
    coop = axes.containers[0]
    assert list(coop[0].get_ydata()) == [62.0, 60.0]
    assert list(coop[0].get_xdata()) == pytest.approx([4, 16], rel=0.02)
    (bars,) = coop[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[61.0, 63.0], [58.0, 62.0]]


def test_context_length_refuses_what_it_cannot_draw(tmp_path):
    for scores, message in (
        ({}, "no series"),
        ({"a": [(4, 60.0)]}, r"\(M, mean, std\)"),
        ({"a": [(0, 60.0, 1.0)]}, "0 or less"),
        ({"a": [(4, float("nan"), 1.0)]}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            context_length_figure(scores, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_compatibility_has_three_bars_and_says_what_was_refused(tmp_path, drawn):
    rows = [
        row("ContCoOp", [70.0, 72.0], [66.0, 64.0], [71.0], [68.0, 67.0]),
        row("MaPLe", [74.0], None, [76.0], None),
        row("IVLP", [73.0], [20.0], None, [31.5]),
    ]
    path = tmp_path / "compatibility.png"
    assert compatibility_figure(rows, path, {"zero-shot old": 55.0, "zero-shot upgraded": 60.0}) == path
    (axes,) = drawn[0].axes
    heights = [[bar.get_height() for bar in group.patches] for group in axes.containers if hasattr(group, "patches")]
    assert heights == [[71.0, 74.0, 73.0], [65.0, 20.0], [71.0, 76.0]]
    diamonds = next(points for points in axes.collections if "harmonic" in str(points.get_label()))
    assert diamonds.get_offsets()[:, 1].tolist() == [67.5, 31.5]
    (refused,) = axes.texts
    assert refused.get_text() == "refused" and refused.get_position()[0] == 1
    assert ticks(axes) == ["ContCoOp\n67.5 ± 0.7", "MaPLe", "IVLP\n31.5"]
    assert {"zero-shot old (55.0)", "zero-shot upgraded (60.0)", "old model", "re-trained"} < set(legend(drawn[0]))
    # Every bar stands beside, not on, its neighbours.
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))


def test_compatibility_leaves_no_room_for_what_was_not_retrained(tmp_path, drawn):
    rows = [row("CoOp", [70.0], [60.0], None, [64.6]), row("MaPLe", [74.0], None, None, None)]
    compatibility_figure(rows, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    middles = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert middles == pytest.approx([-0.135, 0.865, 0.135])  # the names stand between the two
    assert axes.texts[0].get_position()[0] == pytest.approx(1.135)
    assert "re-trained" not in legend(drawn[0])
    compatibility_figure(rows[1:], tmp_path / "b.png")  # all refused
    assert [bar.get_height() for bar in drawn[1].axes[0].patches] == [74.0]


def test_compatibility_refuses_what_it_cannot_draw(tmp_path):
    for rows, message in (
        ([], "no method"),
        ([row("CoOp", [], None, None, None)], "old of CoOp"),
        ([row("CoOp", [70.0], [float("inf")], None, None)], "upgraded of CoOp must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            compatibility_figure(rows, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no part"):
        drift_figure([], FEATURES, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert drift_figure(PARAMETERS, FEATURES, tmp_path / "a.png") is None
    assert layer_study_figure({"a": [(1, 1.0, 0.0)]}, tmp_path / "a.png") is None
