"""The grids in `tests/studies/configs` are read as `hf-transmiter bench` reads them; their images are elsewhere."""

from pathlib import Path

import pytest

from hf_transmiter.bench.cells import cells
from hf_transmiter.bench.config import BenchConfig


CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture
def folders(monkeypatch):
    """What the configurations name by environment variables."""
    values = {"TINY_CLIP": "/models/clip", "TINY_STRONG": "/models/strong", "TINY_PHOTOS": "/photos"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_tiny_photos(folders):
    config = BenchConfig.read(CONFIGS / "tiny_photos.yaml")
    assert [(pair.weak, pair.strong) for pair in config.models] == [("/models/clip/weak", "/models/strong")]
    assert [spec.source for spec in config.datasets] == ["/photos/photos", "/photos/negatives"]
    assert all((spec.train, spec.test) == ("train", "test") for spec in config.datasets)
    assert len({cell.key for cell in cells(config)}) == 12  # two datasets, two tunings, three seeds


def test_tiny_photos_needs_its_folder(folders, monkeypatch):
    monkeypatch.delenv("TINY_PHOTOS")
    with pytest.raises(ValueError, match="TINY_PHOTOS"):
        BenchConfig.read(CONFIGS / "tiny_photos.yaml")
