"""Tests of `hf_transmiter.preparing`: caches that are filled here are enough for the same job without a network."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from datasets import config as datasets_config
from local_hub import dataset_files
from typer.testing import CliRunner

from hf_transmiter import Anchors, Bridge, DualEncoder, TuningConfig, extract, tune
from hf_transmiter.bench_config import BenchConfig
from hf_transmiter.catalog import load_images
from hf_transmiter.cli import app
from hf_transmiter.preparing import cache_folders, prepare, prepared_table


NAMES = ("cat", "dog", "car")
EVERYTHING = {
    "models": ["bob/strong"],
    "adapters": ["bob/adapter", "bob/tuned"],
    "bridges": ["bob/bridge"],
    "datasets": ["bob/ToyPets"],
    "with_base": True,
}


def put(hub, repo_id: str, folder: str | Path, **more: bytes) -> str:
    """The files of a folder as a repository."""
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return hub.write(repo_id, {**files, **more})


@pytest.fixture(scope="session")
def folders(model_dir, make_dataset, tmp_path_factory):
    """What bob has on his disk: an adapter, a tuned prompt and a bridge of two tiny models, made once."""
    made = tmp_path_factory.mktemp("bobs")
    weak, strong = (DualEncoder.from_pretrained(model_dir("clip", seed)) for seed in (0, 1))
    weak.name_or_path, weak.model.name_or_path = "bob/weak", "bob/weak"
    weak.model.config._name_or_path = "bob/weak"
    strong.name_or_path = "bob/strong"
    data, config = make_dataset(12), TuningConfig(method="coop", shots=1, epochs=1, n_ctx=4)
    tuned = tune(weak, data, config=config, progress=False)
    tuned.save_pretrained(made / "tuned")
    teacher = DualEncoder.from_pretrained(model_dir("clip", 2))
    extract(weak, teacher, data, class_names=NAMES, progress=False).save_pretrained(made / "adapter")
    words = Anchors((), tuple(f"{a} {b}" for a in NAMES for b in ("red", "blue", "big", "old")))
    Bridge.build(weak, strong, anchors=words).save_pretrained(made / "bridge")
    return made


@pytest.fixture
def shared(hub, folders, model_dir, make_dataset):
    """All of it on the Hub, the adapters' model pinned to its commit; and what nobody reads beside the models."""
    other = {"pytorch_model.bin": b"pickled", "onnx/model.onnx": b"onnx", "onnx/config.json": b"{}"}
    commit = put(hub, "bob/weak", model_dir("clip", 0), **other)
    put(hub, "bob/strong", model_dir("clip", 1), **other)
    for name in ("adapter", "tuned", "bridge"):
        put(hub, f"bob/{name}", folders / name)
    for name, file in (("adapter", "adapter_config"), ("tuned", "adapter_config"), ("tuned", "teacher")):
        content = json.loads(hub.files(f"bob/{name}")[f"{file}.json"])
        content |= {"base_model_name_or_path": "bob/weak"} if file == "adapter_config" else {}
        hub.write(f"bob/{name}", {f"{file}.json": json.dumps({**content, "revision": commit}).encode()})
    hub.add_dataset("bob/ToyPets", dataset_files({"train": make_dataset(12), "test": make_dataset(9, seed=1)}))
    hub.new_machine(token=None)
    hub.log.clear()
    return commit


@pytest.fixture
def unplug(hub, monkeypatch):
    """``unplug()``: no network from here on."""

    def now():
        hub.log.clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)

    return now


def statuses(rows) -> dict[str, str]:
    return {f"{row.kind} {row.name}": row.status for row in rows}


def test_all_is_fetched_once(hub, shared, unplug):
    rows = prepare(**EVERYTHING, progress=False)
    names = ["adapter bob/adapter", "adapter bob/tuned", "bridge bob/bridge", f"model bob/weak@{shared}"]
    names += ["model bob/strong", "dataset bob/ToyPets"]
    assert statuses(rows) == dict.fromkeys(names, "fetched"), [row.remark for row in rows]
    assert {row.kind: row.needed_by for row in rows if row.needed_by} == {"model": "bob/adapter"}
    for row in rows:
        repo = row.name.split("@")[0] if row.kind != "dataset" else f"datasets/{row.name}"
        assert row.revision == hub.repos[repo].find("main")
        assert row.files > 0 and row.num_bytes > 0
    assert not hub.requests("GET", r"\.bin|onnx")  # nothing that is not read
    hub.log.clear()
    assert set(statuses(prepare(**EVERYTHING, progress=False)).values()) == {"there"}
    assert not hub.requests("GET", "/resolve/")
    unplug()
    offline = prepare(**EVERYTHING, progress=False)
    assert statuses(offline) == dict.fromkeys(names, "there"), [row.remark for row in offline]
    assert [(row.revision, row.files, row.num_bytes) for row in offline] == [
        (row.revision, row.files, row.num_bytes) for row in rows
    ]
    assert not hub.log
    table = prepared_table(rows)
    assert f"| model | bob/weak@{shared} (base of bob/adapter) | {shared[:12]} |" in table


def test_of_a_model_what_loading_it_reads(hub, shared):
    def read() -> set[str]:
        files = {path.split("/resolve/")[1].partition("/")[2] for path in hub.requests("GET", "/resolve/")}
        hub.log.clear()
        return files

    DualEncoder.from_pretrained("bob/strong")
    expected = read()
    hub.new_machine(token=None)
    prepare(["bob/strong"], progress=False)
    assert read() == expected >= {"model.safetensors", "config.json", "tokenizer.json"}


DATA = ("--dataset", "bob/ToyPets", "--json", "--quiet")
JOBS = [
    ["transfer", "bob/adapter", "--strong", "bob/strong", "--bridge", "bob/bridge", "--output-dir", "up", *DATA],
    ["evaluate", "up", *DATA],
    ["evaluate", "bob/tuned", *DATA],
]
IN_ONE_PROCESS = """
import json, sys
from hf_transmiter.cli import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
"""


@pytest.fixture
def sealed(hub, shared, model_dir, tmp_path, monkeypatch):
    """What the jobs say with a network, and caches that the command has filled and that were carried elsewhere."""
    teacher = DualEncoder.from_pretrained(model_dir("clip", 2))
    weak = DualEncoder.from_pretrained("bob/weak", revision=shared)
    extract(weak, teacher, load_images("bob/ToyPets"), progress=False).save_pretrained(tmp_path / "adapter")
    put(hub, "bob/adapter", tmp_path / "adapter")
    expected = in_process(tmp_path / "online", monkeypatch)
    home = hub.new_machine(token=None)
    options = ["--adapter", "bob/adapter", "--adapter", "bob/tuned", "--with-base", "--model", "bob/strong"]
    done = CliRunner().invoke(app, ["prepare", *options, "--bridge", "bob/bridge", "--dataset", "bob/ToyPets"])
    assert done.exit_code == 0, done.output
    assert [Path(line.strip()) for line in done.stdout.splitlines()[-2:]] == [home / "hub", home / "datasets"]
    there = hub.new_machine(token=None)
    home.rename(there)
    hub.log.clear()
    return expected


def in_process(folder: Path, monkeypatch) -> list[dict]:
    folder.mkdir()
    monkeypatch.chdir(folder)
    done = [CliRunner().invoke(app, words) for words in JOBS]
    assert [each.exit_code for each in done] == [0] * len(JOBS), [each.output for each in done]
    return [json.loads(each.stdout) for each in done]


def test_the_same_job_without_a_network(hub, sealed, unplug, tmp_path, monkeypatch):
    unplug()
    assert in_process(tmp_path / "offline", monkeypatch) == sealed
    assert not hub.log
    assert sealed[0]["provenance"]["teacher_logits"]  # the calibration came along, and fits the images


@pytest.mark.slow
def test_the_same_job_in_a_process_without_a_network(hub, sealed, tmp_path):
    (tmp_path / "there").mkdir()
    environment = hub.environment(offline=True) | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(JOBS)]
    done = subprocess.run(words, env=environment, cwd=tmp_path / "there", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not hub.log
    decoder, found, text = json.JSONDecoder(), [], done.stdout
    while text.strip():
        value, end = decoder.raw_decode(text.lstrip())
        found, text = [*found, value], text.lstrip()[end:]
    assert found == sealed
    assert "not in the cache" not in done.stderr


def test_what_a_bench_names(hub, shared):
    config = BenchConfig.from_dict(
        {
            "title": "Toy",
            "models": [{"weak": "bob/weak", "strong": "bob/strong"}],
            "datasets": [{"name": "pets", "source": "bob/ToyPets", "label_column": "label"}],
            "tunings": [{"method": "lora", "epochs": 1}],
            "general": "bob/ToyPets",
        }
    )
    rows = prepare(config=config, progress=False)
    assert statuses(rows) == {
        "model bob/weak": "fetched",
        "model bob/strong": "fetched",
        "dataset bob/ToyPets": "there",  # named twice; the first time fetched
    }
    assert [row.status for row in rows if row.kind == "dataset"] == ["fetched", "there"]


def test_one_that_fails_does_not_stop_the_others(hub, shared, model_dir):
    put(hub, "bob/pickled", model_dir("clip", 0))
    files = {name: data for name, data in hub.files("bob/pickled").items() if name != "model.safetensors"}
    hub.repos.pop("bob/pickled")
    hub.write("bob/pickled", {**files, "pytorch_model.bin": b"pickled"})
    hub.write("bob/odd", {"adapter_config.json": hub.files("bob/tuned")["adapter_config.json"],
                          "adapter_model.bin": b"pickled"})  # fmt: skip
    hub.write("bob/text", {"README.md": b"# Nothing"})
    options = {"adapters": ["bob/odd", "bob/strong"], "bridges": ["bob/text"], "datasets": ["bob/none", "dtdd"]}
    rows = prepare(["bob/pickled", "bob/none", "bob/strong", "sandbox:weak"], **options, progress=False)
    remarks = {f"{row.kind} {row.name}": row.remark for row in rows if row.status == "failed"}
    assert set(statuses(rows)) - set(remarks) == {"model bob/strong", "model sandbox:weak"}
    assert "no model.safetensors, and pytorch_model.bin is not read" in remarks["model bob/pickled"]
    assert "Ask its owner" in remarks["model bob/pickled"]
    assert "no adapter_model.safetensors, and no other weights are read" in remarks["adapter bob/odd"]
    assert "A whole model is named with models (--model)" in remarks["adapter bob/strong"]
    assert "no bridge.safetensors in 'bob/text'" in remarks["bridge bob/text"]
    assert "There is no repository 'bob/none'" in remarks["model bob/none"]
    assert "bob/none" in remarks["dataset bob/none"]
    assert "did you mean dtd" in remarks["dataset dtdd"]
    assert not any("\n" in remark for remark in remarks.values())
    assert next(row.source for row in rows if row.name == "sandbox:weak") == "this package"


def test_an_interrupted_download_goes_on(hub, shared, monkeypatch):
    hub.fault("GET", "bob/strong/resolve/.*/model.safetensors", "drop", times=1000)
    rows = prepare(["bob/strong", "bob/weak"], datasets=["bob/ToyPets"], progress=False)
    assert statuses(rows) == {
        "model bob/strong": "failed",
        "model bob/weak": "fetched",
        "dataset bob/ToyPets": "fetched",
    }
    hub.faults.clear()
    hub.log.clear()
    rows = prepare(["bob/strong", "bob/weak"], datasets=["bob/ToyPets"], progress=False)
    assert [row.status for row in rows] == ["fetched", "there", "there"]
    asked = hub.requests("GET", "/resolve/")
    assert asked and all("bob/strong" in path for path in asked)


def test_what_arrived_damaged_is_not_kept(hub, shared, unplug):
    hub.fault("GET", "bob/strong/resolve/.*/model.safetensors", "corrupt")
    (row,) = prepare(["bob/strong"], progress=False)
    assert "model.safetensors of bob/strong arrived damaged" in row.remark
    assert [row.status for row in prepare(["bob/strong"], progress=False)] == ["fetched"]


def test_an_incomplete_cache_names_what_is_missing(hub, shared, unplug):
    prepare(**EVERYTHING, progress=False)
    for pattern in ("models--bob--strong/snapshots/*/model.safetensors", "models--bob--tuned/snapshots/*/adapter_m*"):
        (path,) = (hub.home / "hub").glob(pattern)
        path.unlink()
    (arrow,) = (hub.home / "datasets").glob("bob___toy_pets/*/*/*/*-train.arrow")
    arrow.unlink()
    unplug()
    remarks = {row.name: row.remark for row in prepare(**EVERYTHING, progress=False) if row.status == "failed"}
    assert remarks["bob/strong"] == "model.safetensors of 'bob/strong' is not in the cache."
    assert "adapter_model.safetensors of 'bob/tuned' is not in the cache" in remarks["bob/tuned"]
    assert "toy_pets-train.arrow" in remarks["bob/ToyPets"]
    assert set(remarks) == {"bob/strong", "bob/tuned", "bob/ToyPets"}
    (row,) = prepare(datasets=["bob/others"], progress=False)
    assert "'bob/others' is not in the cache" in row.remark and "hf-transmiter prepare" in row.remark
    done = CliRunner().invoke(app, ["prepare", "--model", "bob/strong", "--model", f"bob/weak@{shared}"])
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1] == "Missing: model bob/strong."


def test_an_image_folder_on_the_hub(hub, make_images, unplug):
    """Its Arrow file holds paths, not pictures, so the cache has to stay where it is: the row says so."""
    files = {}
    for number, image in enumerate(make_images(4)):
        image.save(content := io.BytesIO(), "PNG")
        files[f"train/{NAMES[number % 2]}/{number}.png"] = content.getvalue()
    hub.add_dataset("bob/pictures", files)
    home = hub.new_machine(token=None)
    (row,) = prepare(datasets=["bob/pictures"], progress=False)
    assert row.status == "fetched" and row.remark.endswith(f"below {home / 'hub'}: copy that to the same path")
    unplug()
    assert [row.status for row in prepare(datasets=["bob/pictures"], progress=False)] == ["there"]
    assert load_images("bob/pictures").features["label"].names == ["cat", "dog"]
    home.rename(hub.new_machine(token=None))
    (row,) = prepare(datasets=["bob/pictures"], progress=False)
    assert row.status == "failed" and str(home) in row.remark


def test_room_is_checked_before_anything_large_is_fetched(hub, shared, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="are to be fetched"):
        prepare(["bob/strong"], datasets=["bob/ToyPets"], progress=False)
    assert not hub.requests("GET", r"\.safetensors|\.parquet")


def test_nothing_to_prepare(hub):
    with pytest.raises(ValueError, match="nothing to prepare"):
        prepare(progress=False)
    assert cache_folders() == []


@pytest.mark.slow
def test_verify_reads_all_again_in_a_process_without_a_network(hub, shared, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(hub.home))
    words = ["prepare", "--adapter", "bob/adapter", "--with-base", "--dataset", "bob/ToyPets", "--verify", "--json"]
    done = CliRunner().invoke(app, [*words, "--quiet"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["complete"] and [row["status"] for row in found["rows"]] == ["fetched"] * 3
    # Where the process looks elsewhere, it says so.
    monkeypatch.setenv("HF_HOME", str(hub.home / "elsewhere"))
    done = CliRunner().invoke(app, [*words, "--quiet"])
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and not found["complete"]
    assert all(row["remark"].startswith("without a network: ") for row in found["rows"])


@pytest.mark.slow
def test_a_bench_without_a_network(hub, shared, tmp_path):
    """The table of a machine that was prepared is that of a machine with a network."""
    content = """
title: Toy
models: [{weak: bob/weak, strong: bob/strong}]
datasets: [{name: pets, source: bob/ToyPets, label_column: label, train: train, test: test}]
tunings: [{name: LoRA, method: lora, epochs: 1, batch_size: 4}]
shots: [2]
seeds: [1]
variants: [zero-shot strong, TransMiter, refit, bridge from text]
num_anchors: 8
general: bob/ToyPets
"""
    (tmp_path / "toy.yaml").write_text(content)
    words = ["bench", "--config", str(tmp_path / "toy.yaml"), "--quiet", "--output-dir"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "online")])
    assert done.exit_code == 0, done.output
    hub.new_machine(token=None)
    done = CliRunner().invoke(app, ["prepare", "--config", str(tmp_path / "toy.yaml"), "--quiet"])
    assert done.exit_code == 0, done.output
    hub.log.clear()
    environment = hub.environment(offline=True) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_transmiter", *words, str(tmp_path / "offline")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not hub.log

    reports = [(tmp_path / folder / "report.md").read_text() for folder in ("online", "offline")]
    assert reports[0] == reports[1] and "TransMiter" in reports[0]


@pytest.mark.slow
def test_killed_in_the_middle(hub, shared, tmp_path):
    """By a signal, while the weights arrive: the next run has only the rest to fetch."""
    weights = hub.files("bob/strong")["model.safetensors"]
    assert len(weights) > 1000
    hub.fault("GET", "bob/strong/resolve/.*/model.safetensors", "drop", times=1000)
    environment = hub.environment() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_transmiter", "prepare", "--dataset", "bob/ToyPets", "--model", "bob/strong"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not hub.requests("GET", "bob/strong/resolve/.*/model.safetensors") and process.poll() is None:
        os.sched_yield()
    process.kill()
    process.wait()
    hub.faults.clear()
    rows = prepare(["bob/strong"], datasets=["bob/ToyPets"], progress=False)
    assert [row.status for row in rows] == ["fetched", "fetched"]
