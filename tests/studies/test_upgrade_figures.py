import pytest
import upgrade_figures
from PIL import Image
from upgrade_figures import context_length_figure, drift_figure, layer_study_figure

from hf_transmiter.evaluation import figures
from hf_transmiter.evaluation.drift import LayerDrift


PARAMETERS = [
    LayerDrift("token table", 0.01, 0.2),
    LayerDrift("layer 1", 0.02, 0.1),
    LayerDrift("projection", 0, None),
]
FEATURES = [LayerDrift("embeddings", 0.5, 0.1, 0.99), LayerDrift("layer 1", 3.0, 0.4, 0.8)]


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


def test_context_length_refuses_nothing(tmp_path):
    with pytest.raises(ValueError, match="no method"):
        context_length_figure({}, tmp_path / "a.png")


def test_drift_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="no part"):
        drift_figure([], FEATURES, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert drift_figure(PARAMETERS, FEATURES, tmp_path / "a.png") is None
    assert layer_study_figure({"a": [(1, 1.0, 0.0)]}, tmp_path / "a.png") is None
