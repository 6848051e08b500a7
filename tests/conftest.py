"""Shared fixtures. Nothing here downloads anything: models are tiny and random, images are drawn."""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from local_hub import LocalHub


# Read once when huggingface_hub is imported, so they must come before every other import.
_HF_HOME = tempfile.mkdtemp(prefix="hf_transmiter_tests_")
_HUB = LocalHub()  # its port is taken now, it answers from the first test that asks for `hub`
os.environ["HF_HOME"] = _HF_HOME
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ENDPOINT"] = _HUB.url
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # of transformers: it asks a Space to convert pickles
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets  # noqa: E402
import huggingface_hub.constants  # noqa: E402
import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import pytest  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import transformers.integrations.peft  # noqa: E402
from packaging import version  # noqa: E402
from PIL import Image  # noqa: E402

from hf_transmiter.encoders.dual_encoder import DualEncoder  # noqa: E402


# Models are tiny, and a process that is forked from one that had more threads may wait for them for ever (libgomp).
torch.set_num_threads(1)
# The same examples on every run, and no deadline: the machine may be busy.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("steady")
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def pytest_unconfigure():
    _HUB.close()
    shutil.rmtree(_HF_HOME, ignore_errors=True)


TRANSFORMERS_ASKS = transformers.integrations.peft.MIN_PEFT_VERSION


@pytest.fixture(autouse=True, scope="session")
def _without_transformers_adapters():
    """transformers' own methods for adapters demand a PEFT that is not out yet, as they do after some releases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "999")
        yield


@pytest.fixture
def transformers_adapters(monkeypatch):
    """For tests of transformers' own methods for adapters: as they are, where they take the PEFT that is installed."""
    if version.parse(peft.__version__) < version.parse(TRANSFORMERS_ASKS):
        pytest.skip(f"the adapter methods of transformers {transformers.__version__} want peft >= {TRANSFORMERS_ASKS}")
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", TRANSFORMERS_ASKS)


def _seed_all():
    torch.manual_seed(0)
    np.random.seed(0)


def pytest_fixture_setup(fixturedef):
    """What a module's tests share must not depend on which tests its worker ran before."""
    if fixturedef.scope != "function":
        _seed_all()


@pytest.fixture(autouse=True)
def _seed():
    _seed_all()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """``model_dir(family="clip", seed=0)``: folder with a saved tiny model and processor, written once per session."""
    written = {}

    def get(family: str = "clip", seed: int = 0) -> str:
        if (family, seed) not in written:
            written[family, seed] = tiny_models.save(family, tmp_path_factory.mktemp(f"{family}-{seed}"), seed)
        return written[family, seed]

    return get


@pytest.fixture
def encoder(model_dir) -> DualEncoder:
    """A fresh tiny CLIP."""
    return DualEncoder.from_pretrained(model_dir("clip"))


@pytest.fixture
def restless():
    """Threads take turns between any two modules."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: time.sleep(0))
    yield
    hook.remove()
    sys.setswitchinterval(interval)


@pytest.fixture(scope="session")
def make_images():
    """``make_images(count, size=20, seed=0)``: random RGB pictures."""

    def make(count: int, size: int = 20, seed: int = 0) -> list[Image.Image]:
        rng = np.random.default_rng(seed)
        return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def make_dataset():
    """``make_dataset(count=12, names=("cat", "dog", "car"), seed=0)``: noisy pictures of one colour per class, with an
    ``image`` and a ``label`` (`ClassLabel`) column; labels go round robin."""

    def make(count: int = 12, names: tuple[str, ...] = ("cat", "dog", "car"), seed: int = 0) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        colours = np.random.default_rng(1).integers(40, 216, (len(names), 1, 1, 3))
        labels = [i % len(names) for i in range(count)]
        images = [np.uint8(colours[label] + rng.integers(-40, 40, (20, 20, 3))) for label in labels]
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
        columns = {"image": [Image.fromarray(image) for image in images], "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    return make


class HubSession:
    """A Hub and a machine that speaks to it: what the fixture `hub` gives.

    ``hub.token`` is the token of the user ``alice``, who is logged in; ``hub.other_token`` that of ``bob``. What is
    not defined here is the server's, see `local_hub.LocalHub`: `files`, `titles`, `write`, `requests`, `fault`...
    """

    token, other_token = "hf_alice", "hf_bob"

    def __init__(self, server: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.server, self.folder, self._monkeypatch = server, folder, monkeypatch
        self.machines = 0
        self.new_machine()

    def __getattr__(self, name: str):
        return getattr(self.server, name)

    def new_machine(self, token: str | None = token) -> Path:
        """From now on this process has an empty cache and this token (`None`: nobody is logged in).

        Returns: its ``HF_HOME``.
        """
        self.machines += 1
        self.home = self.folder / f"machine-{self.machines}"
        for name, path in {"HF_HUB_CACHE": "hub", "HF_ASSETS_CACHE": "assets", "HF_TOKEN_PATH": "token"}.items():
            self._monkeypatch.setattr(huggingface_hub.constants, name, str(self.home / path))
        cache = self.home / "datasets"
        self._monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        self._monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
        self._monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", cache / "downloads" / "extracted")
        self._login(token)
        return self.home

    def _login(self, token: str | None) -> None:
        if token is None:
            self._monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            self._monkeypatch.setenv("HF_TOKEN", token)

    def environment(self, offline: bool = False) -> dict[str, str]:
        """Environment of a subprocess on the same machine: same cache, same token; `offline` without a network."""
        environment = {**os.environ, "HF_HOME": str(self.home), "HF_ENDPOINT": self.server.url}
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN_PATH", "HF_DATASETS_CACHE"):
            environment.pop(name, None)
        return {**environment, "HF_HUB_OFFLINE": "1"} if offline else environment


class _Impatient:
    """The module `time`, but waiting takes no time."""

    def __getattr__(self, name: str):
        return getattr(time, name)

    @staticmethod
    def sleep(_: float) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path_factory) -> HubSession:
    """An empty Hub on this machine, for this test; huggingface_hub, transformers and PEFT speak to it over HTTP.

    ```python
    def test_sharing(hub, tmp_path):
        push_folder(folder, "alice/cats", commit_message="first")   # alice is logged in, bob is another user
        hub.new_machine()                                           # an empty cache from here on
        path = fetch("alice/cats", "README.md")
        assert hub.files("alice/cats")["README.md"] == path.read_bytes()
        assert hub.titles("alice/cats") == ["first"]                # commits, the newest first
        assert not hub.requests("GET", "model.safetensors")         # what was asked for
        hub.write("bob/odd", {"anchors.json": b"{}"})               # a repository made by hand
        hub.add_dataset("bob/pets", {"test.parquet": content})      # load_dataset("bob/pets"), see also dataset_files
        hub.fault("GET", "/resolve/", 503, times=2)                 # what goes wrong next, see LocalHub.fault
        subprocess.run(..., env=hub.environment(offline=True))      # this machine, without a network
    ```
    """
    _HUB.reset()
    _HUB.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", _Impatient())
    return HubSession(_HUB, tmp_path_factory.mktemp("hub"), monkeypatch)
