"""Fixtures of the tests of open_clip's models. Skipped without open_clip; `.ci/open-clip-tests` makes an environment
that has it."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_open_clip
from PIL import Image

from hf_transmiter.encoders.dual_encoder import DualEncoder


def pytest_collection_modifyitems(config, items):
    for item in items:
        if Path(__file__).parent in item.path.parents and find_spec("open_clip") is None:
            item.add_marker(pytest.mark.skip(reason="needs open_clip: run .ci/open-clip-tests"))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """``folder_of(kind, seed=0)``: a folder with a model of that kind, written once per session."""
    written = {}

    def get(kind: str, seed: int = 0) -> str:
        if (kind, seed) not in written:
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}")
            tiny_open_clip.build(kind, seed).save_pretrained(folder)
            written[kind, seed] = str(folder)
        return written[kind, seed]

    return get


@pytest.fixture
def load(folder_of):
    """``load(kind, seed=0)``: a fresh encoder."""
    return lambda kind, seed=0: DualEncoder.from_pretrained(f"open_clip:{folder_of(kind, seed)}")


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    """Folder of a `CLIPModel` of transformers with a text tower of the same size and the same tokens."""
    return tiny_open_clip.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def pictures():
    """``pictures(count)``: of many sizes and colours."""

    def make(count: int) -> list[Image.Image]:
        rng = np.random.default_rng(0)
        # Some margins of odd length are rounded the other way by open_clip: these are even.
        sizes = [(64, 64 + 8 * number)[:: 1 - 2 * (number % 2)] for number in range(count)]
        return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]

    return make
