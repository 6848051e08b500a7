"""Tests of `hf_transmiter.download_sizes`: what is missing is counted, and compared with the room there is."""

import pytest
from huggingface_hub import hf_hub_download
from local_hub import dataset_files

from hf_transmiter.dataset_specs import find_spec
from hf_transmiter.download_sizes import check_room, in_words
from hf_transmiter.image_sources import load_images


@pytest.fixture
def room(monkeypatch):
    """``room(1000)``: that many bytes are left on the disk."""

    def leave(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": size}))

    return leave


def test_in_words():
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 1_710_000_000: "1.7 GB", 5e13: "50 TB"}
    assert {size: in_words(size) for size in sizes} == sizes


def test_of_a_model_what_is_read_and_not_there(hub, room):
    files = {"model.safetensors": 5000, "config.json": 300, "vocab.txt": 50, "pytorch_model.bin": 9000}
    files |= {"onnx/model.safetensors": 4000, "model.fp16.safetensors": 2500, "README.md": 700}
    hub.write("bob/model", {name: b"x" * size for name, size in files.items()})
    room(5350)
    check_room(["bob/model", "sandbox:weak", "bob/none"], [])  # what is not there is for others to say
    room(5349)
    with pytest.raises(OSError, match=r"5.3 kB are to be fetched, and there are 5.3 kB left in .*set HF_HOME"):
        check_room(["bob/model"], [])
    hf_hub_download("bob/model", "config.json")
    check_room(["bob/model"], [])
    room(0)
    hub.write("bob/shards", {f"model-0000{n}-of-00002.safetensors": b"x" * 1000 for n in (1, 2)})
    with pytest.raises(OSError, match="^2.0 kB"):
        check_room(["bob/shards"], [])


def test_of_a_dataset_downloads_and_arrow_files(hub, room, make_dataset):
    files = dataset_files({"train": make_dataset(6), "test": make_dataset(3)})
    hub.add_dataset("bob/pets", {**files, "video.mp4": b"x" * 10**6})
    spec, size = find_spec("bob/pets"), sum(len(data) for name, data in files.items() if name.endswith(".parquet"))
    room(2 * size)
    check_room([], [spec])
    room(2 * size - 1)
    with pytest.raises(OSError, match="are to be fetched"):
        check_room([], [spec])
    load_images("bob/pets", "test")
    room(0)
    check_room([], [spec, find_spec("sandbox:print")])
