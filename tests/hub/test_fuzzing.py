"""Two thousand damaged and hostile files: each is read as what it says or refused by a clear error, in bounded memory.

Valid files are changed by a value (huge, negative, of another type, NaN, deep), a key or some bytes. While one is
read, the process may take no more than `MEMORY` of address space on top of what it has, and `SECONDS` of time: an
allocation or a loop that a file could size fails the test.
"""

import contextlib
import copy
import json
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.hub.adapter_files import TeacherFacts
from hf_transmiter.hub.checks import KEY_PREFIX, adapter_shapes
from hf_transmiter.hub.repo import read_json
from hf_transmiter.hub.scores import read_scores
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.tuners import TransMiterConfig, TransMiterLayer


# Settings of a later version of PEFT are ignored with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
MEMORY = 256 * 2**20
SECONDS = 60
ANCHORS = Anchors(("cat", "dög"), ("sky", "tree", "sea"))
MODEL = {"name": "user/weak", "revision": "main", "fingerprint": "0" * 64}

HOSTILE = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            "",
            " ",
            "{}",
            "a photo of a {}.",
            "../../etc/passwd",
            "/etc/passwd",
            "\ud800",
            "a\0b",
            "\n",
        ),
        *("🐈" * 5, "x" * 2_000, "../x.safetensors", "x.safetensors\n", "mlp", "linear"),
        *("TRANSMITER", "LORA", "COOP", "XLORA", "NaN", "1e999", "0" * 64, "F32", "I64", "embedding", "logit"),
        *(0, -1, 1, 2, 5, 7, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**18)),
        *(0.0, -0.0, 4.0, 0.5, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
        *(
            [],
            {},
            [[]],
            [0],
            [-1],
            [10**9, 10**9],
            [10**18, 0],
            [2**40, 2**40],
            ["cat"],
            ["cat", "cat"],
            [None],
            {"a": {}},
        ),
    ]
)


@dataclass(frozen=True)
class Raw:
    """Stands for a text in the place of a value: what `json` would not write."""

    text: str


RAW = st.sampled_from(
    [
        *(
            "[" * 100_000,
            "[" * 40 + "]" * 40,
            '{"a":' * 5_000 + "1" + "}" * 5_000,
            "1" * 5_000,
            "-1e400",
            "1e-400",
            "nul",
        ),
        *(
            '"\\ud800"',
            '{"a": 1, "a": 2}',
            "[" + "0," * 20_000 + "0]",
            '"' + "y" * 100_000 + '"',
            "0x10",
            "+1",
            "\ufeff1",
        ),
    ]
).map(Raw)


def near(value):
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1:] or "a") ^ 1)
    return value[::-1] if isinstance(value, list) else dict(reversed(value.items()))


def places(value, path=()):
    """Paths of all values inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def changed(draw, content) -> str:
    """JSON text of `content` after one or two changes."""
    content, raw = copy.deepcopy(content), {}
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(content))))
        value = copy.deepcopy(draw(HOSTILE | RAW))  # the next change may be inside it
        if isinstance(value, Raw):
            name = f"<raw {len(raw)}>"
            raw[json.dumps(name)] = value.text
            value = name
        if not path:
            content = value if draw(st.integers(0, 4)) == 0 else content
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(("replace", "replace", "near", "near", "delete", "add")))
        if action == "near":
            parent[path[-1]] = near(parent[path[-1]])
        elif action == "delete":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=10) | st.sampled_from(("task", "width", "__class__", "self", "x" * 300)))] = (
                value
            )
        elif action == "add":
            parent.append(value)
        else:
            parent[path[-1]] = value
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    for name, value in raw.items():
        text = text.replace(name, value)
    return text


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """`data` after one or two flips, cuts or insertions."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(("flip", "flip", "flip", "cut", "insert", "remove", "repeat")))
        if action == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del data[place:]
        elif action == "insert":
            data[place:place] = draw(
                st.binary(min_size=1, max_size=8) | st.sampled_from((b"[", b'"', b"\xff", b"NaN", b"}"))
            )
        elif action == "remove":
            del data[place : place + draw(st.integers(1, 16))]
        else:
            data += data[place : place + 64]
    return bytes(data)


def json_bytes(content) -> st.SearchStrategy[bytes]:
    whole = json.dumps(content, ensure_ascii=False).encode()
    texts = changed(content).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.one_of(texts, texts, damaged(whole))


def split_file(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


@st.composite
def tensor_files(draw, whole: bytes, header: dict, data: bytes, inner: str | None = None) -> bytes:
    """A safetensors file with a changed header (or a changed JSON text in its metadata), or damaged bytes."""
    kind = draw(st.sampled_from(("header", "header", "bytes", "size") + ("inner", "inner") * (inner is not None)))
    if kind == "bytes":
        return draw(damaged(whole))
    if kind == "inner":
        header = copy.deepcopy(header)
        text = draw(changed(json.loads(header["__metadata__"][inner])))
        header["__metadata__"][inner] = text.encode("utf-8", "replace").decode()
        text = json.dumps(header).encode()
    else:
        text = draw(json_bytes(header)) if kind == "header" else json.dumps(header).encode()
    size = len(text)
    if kind == "size":
        size = draw(
            st.sampled_from((0, 1, size - 1, size + 1, len(whole), 2**23, 2**23 + 1, 10**8, 2**31, 2**63, 2**64 - 1))
        )
    return struct.pack("<Q", size) + text + data


class Hang(BaseException):
    """Not an `Exception`, so that nothing on the way takes it for the file's fault."""


@contextlib.contextmanager
def bounded():
    """Limits of memory and time, where the platform has them."""

    def alarm(*_):
        raise Hang(f"still not read after {SECONDS} s")

    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def read(load, path):
    """What `load(path)` returns, `None` where it refuses the file; any other exception fails the test."""
    with bounded():
        try:
            return load(path)
        except (ValueError, OSError) as error:
            assert str(error).strip() and len(str(error)) < 10_000
            return None


@pytest.mark.skipif(sys.platform != "linux", reason="limits of one process")
def test_the_limits_hold(monkeypatch):
    """What the tests below would see of a file that sizes an allocation or a loop."""
    with bounded(), pytest.raises((RuntimeError, MemoryError), match="allocate|^$"):
        torch.zeros(2 * MEMORY, dtype=torch.uint8)
    with bounded(), pytest.raises(MemoryError):
        bytearray(2 * MEMORY)
    torch.zeros(2 * MEMORY, dtype=torch.uint8)
    monkeypatch.setitem(globals(), "SECONDS", 0.1)
    with pytest.raises(Hang), bounded():
        while True:
            pass


def cases(count: int):
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


CONFIG = {
    "auxiliary_names": ["sky", "tree", "sea"],
    "anchors_fingerprint": ANCHORS.fingerprint,
    "auto_mapping": None,
    "base_fingerprint": "0" * 64,
    "base_model_name_or_path": "user/weak",
    "class_names": ["cat", "dög"],
    "embed_dim": 6,
    "exclude_modules": None,
    "form": "mlp",
    "inference_mode": True,
    "mlp_ratio": 4,
    "peft_type": "TRANSMITER",
    "peft_version": "0.21.2",
    "provenance": {"num_images": 8, "settings": {"epochs": 2}},
    "revision": "main",
    "seed": 0,
    "target_modules": None,
    "task_type": None,
    "templates": ["a photo of a {}."],
    "train_basis": False,
    "width": 8,
}
SCORE = {
    "method": "refit",
    "split": "test",
    "metric": "accuracy",
    "value": 62.5,
    "std": 0.5,
    "seconds": 1.5,
}
SCORES = [SCORE | {"seeds": 3}, SCORE | {"value": None, "seeds": 1, "dataset": "user/cats", "num_images": 40}]
TEACHER = {
    "weak": "user/weak",
    "revision": None,
    "fingerprint": "0" * 64,
    "class_names": ["cat", "dög"],
    "templates": ["{}."],
    "zero_shot_templates": ["a photo of a {}."],
    "settings": {"method": "coop", "epochs": 2},
}
MODEL_CONFIG = {
    "model_type": "clip",
    "projection_dim": 6,
    "vision_config": {"hidden_size": 8},
    "text_config": {"hidden_size": 8},
}


def make_folder(folder: Path) -> Path:
    """One valid file of every kind."""
    contents = {"adapter_config": CONFIG, "scores": SCORES, "teacher": TEACHER}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    ANCHORS.save(folder / "anchors.json")
    tensors = {name: torch.randn(shape) for name, shape in adapter_shapes(CONFIG).items()}
    tensors[KEY_PREFIX + "basis"] = torch.linalg.qr(tensors[KEY_PREFIX + "basis"])[0].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    CalibrationPack(torch.randn(5, 2), ("cat", "dög"), "abc", "user/cats").save(folder / "calibration.safetensors")
    facts = {"space": "logit", "scale": 1.0, "source": "images", "num_pairs": 9, "alignment": 0.9, "beta": 500.0}
    facts |= {"strong": MODEL, "weak": MODEL, "anchors": ANCHORS.to_dict()}
    matrix, zeros = torch.linalg.qr(torch.randn(5, 5))[0].contiguous(), torch.zeros(5)
    tensors = {"matrix": matrix, "mean_strong": zeros, "mean_weak": zeros.clone()}
    metadata = {"format": "hf_transmiter.bridge", "bridge": json.dumps(facts)}
    save_file(tensors, folder / "bridge.safetensors", metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return make_folder(tmp_path_factory.mktemp("valid"))


def load_adapter(path: Path) -> TransMiterLayer:
    """What loading an adapter allocates by its configuration, without a model."""
    config = TransMiterConfig.from_pretrained(path)
    config.embed_dim = config.embed_dim or 6
    layer = TransMiterLayer()
    layer._active_adapter = ["default"]
    layer.update_layer("default", config, torch.zeros(1))
    return layer


LOADERS = {
    "adapter_config.json": lambda path: load_adapter(path.parent),
    "adapter_model.safetensors": lambda path: load_adapter(path.parent),
    "anchors.json": Anchors.load,
    "scores.json": read_scores,
    "teacher.json": lambda path: TeacherFacts.read(str(path.parent)),
    "calibration.safetensors": CalibrationPack.load,
    "bridge.safetensors": Bridge.load,
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_files_that_are_changed_here_are_valid(folder, name):
    assert LOADERS[name](folder / name)


def run(folder: Path, name: str, data: st.SearchStrategy[bytes], count: int, load=None) -> list:
    """Reads `count` variants of a file, and gives back what was accepted."""
    path, accepted = folder / name, []
    original, load = path.read_bytes(), load or LOADERS[name]

    @cases(count)
    @given(data)
    def try_one(content):
        path.write_bytes(content)
        found = read(load, path)
        if found is not None:
            accepted.append(found)

    try:
        try_one()
    finally:
        path.write_bytes(original)
    assert count < 100 or 0 < len(accepted) < count / 2  # changes are neither too coarse nor too mild
    return accepted


def tensor_data(path: Path, inner: str | None = None) -> st.SearchStrategy[bytes]:
    return tensor_files(path.read_bytes(), *split_file(path), inner)


def test_adapter_configs(folder):
    for layer in run(folder, "adapter_config.json", json_bytes(CONFIG), 400):
        assert sum(tensor.numel() for tensor in layer.tensors("default").values()) < 2_000


SIZES = {
    "width": st.sampled_from((5, 8, 10**5, 10**6)) | st.integers(5, 10**6),
    "mlp_ratio": st.sampled_from((4, 64)) | st.integers(1, 64),
    "embed_dim": st.sampled_from((6, 65_536, None)) | st.integers(1, 65_536),
    "class_names": st.sampled_from((2, 3, 2_000)) | st.integers(1, 100),
    "auxiliary_names": st.sampled_from((3, 2, 2_000)) | st.integers(0, 100),
}


def test_sizes_of_adapters(folder):
    """Possible ones, only not those of the weights."""

    def config(sizes: dict) -> bytes:
        # The basis has room for all names, the fingerprint is not there: nothing but the weights contradicts.
        for key, letter in (("class_names", "c"), ("auxiliary_names", "a")):
            if key in sizes:
                sizes[key] = [f"{letter}{i}" for i in range(sizes[key])]
        changed = CONFIG | {"anchors_fingerprint": None} | sizes
        names = len(changed["class_names"]) + len(changed["auxiliary_names"])
        return json.dumps(changed | {"width": max(changed["width"], names)}).encode()

    data = st.fixed_dictionaries({}, optional=SIZES).map(config)
    for layer in run(folder, "adapter_config.json", data, 100):
        assert {tuple(tensor.shape) for tensor in layer.tensors("default").values()} == set(
            adapter_shapes(CONFIG).values()
        )


def test_adapter_weights(folder):
    accepted = run(folder, "adapter_model.safetensors", tensor_data(folder / "adapter_model.safetensors"), 350)
    assert all(isinstance(layer, TransMiterLayer) for layer in accepted)


def test_anchors(folder):
    for anchors in run(folder, "anchors.json", json_bytes(ANCHORS.to_dict()), 300):
        assert len(anchors.fingerprint) == 64 and Anchors.from_dict(anchors.to_dict()) == anchors


def test_bridges(folder):
    for bridge in run(folder, "bridge.safetensors", tensor_data(folder / "bridge.safetensors", "bridge"), 200):
        assert bridge.matrix.isfinite().all()


def test_calibration_packs(folder):
    data = tensor_data(folder / "calibration.safetensors", "class_names")
    for pack in run(folder, "calibration.safetensors", data, 150):
        assert pack.logits.isfinite().all() and pack.logits.shape[1] == len(pack.class_names)


def test_scores(folder):
    for scores in run(folder, "scores.json", json_bytes(SCORES), 100):
        assert all(isinstance(score.value, (int, float)) and score.seeds >= 1 for score in scores)


def test_facts_of_tuned_models(folder):
    for facts in run(folder, "teacher.json", json_bytes(TEACHER), 50):
        assert Anchors(facts.class_names, (), facts.templates).num_task


def test_configurations_of_models(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    data = json_bytes(MODEL_CONFIG)
    for content in run(tmp_path, "config.json", data, 20, lambda path: read_json(path.parent, path.name)):
        assert isinstance(content, dict)
