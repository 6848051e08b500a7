"""`Embed`: what engines pass it, each in its own form, gets the rows that the model gives itself; the engine's own
caching and copying see its options and nothing else. Ray's own tests are in `tests/raydata`."""

import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from datasets import Dataset, Image, List, Value
from datasets.fingerprint import Hasher
from PIL import Image as PillowImage

from hf_transmiter import DualEncoder, Embed
from hf_transmiter.data import embed


@pytest.fixture
def name(model_dir) -> str:
    return model_dir("clip")


def same(rows, expected: torch.Tensor):
    assert [type(row) for row in rows] == [list] * len(expected)
    assert np.array(rows).dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(np.array(rows)), expected, atol=1e-6, rtol=0)


def encoded(picture: PillowImage.Image) -> bytes:
    picture.save(content := io.BytesIO(), "png")
    return content.getvalue()


def objects(values: list) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


HELD = {
    "an array of arrays of one size": lambda pictures, folder: np.stack([np.asarray(one) for one in pictures]),
    "an array of objects": lambda pictures, folder: objects([np.asarray(one) for one in pictures]),
    "content": lambda pictures, folder: objects([encoded(one) for one in pictures]),
    "rows as `datasets` stores them": lambda pictures, folder: [{"bytes": encoded(p), "path": None} for p in pictures],
    "paths": lambda pictures, folder: np.array([written(one, folder, i) for i, one in enumerate(pictures)]),
}


def written(picture: PillowImage.Image, folder: Path, number: int) -> str:
    picture.save(folder / f"{number}.png")
    return str(folder / f"{number}.png")


@pytest.mark.parametrize("kind", HELD)
def test_a_batch_comes_back_with_rows_in_place_of_pictures(kind, name, make_images, tmp_path):
    pictures = make_images(7)
    batch = {"id": np.arange(7), "image": HELD[kind](pictures, tmp_path)}
    found = Embed(name, batch_size=3)(batch)
    assert found.keys() == {"id", name} and found["id"] is batch["id"] and batch.keys() == {"id", "image"}
    same(found[name], DualEncoder.from_pretrained(name).embed_images(pictures))


def test_options(name, make_images):
    pictures = make_images(2)
    found = Embed(name, image_column="b", keep_images=True)({"a": pictures[::-1], "b": pictures})
    assert list(found) == ["a", "b", name] and found["b"] is pictures
    same(found[name], DualEncoder.from_pretrained(name).embed_images(pictures))
    half = Embed(name, dtype="bfloat16", device="cpu")
    (encoder,) = half.encoders
    assert encoder.dtype == torch.bfloat16 and encoder.device.type == "cpu"
    same(half({"image": pictures})[name], encoder.embed_images(pictures))


def test_several_models(name, model_dir, make_images):
    names, pictures = [name, model_dir("siglip"), "sandbox:strong"], make_images(5)
    found = Embed(*names, batch_size=2)({"image": pictures})
    assert list(found) == names
    for each in names:
        same(found[each], DualEncoder.from_pretrained(each).embed_images(pictures))


def test_a_revision_is_no_part_of_the_column(hub, name, make_images):
    commit = hub.write("alice/clip", {path.name: path.read_bytes() for path in Path(name).iterdir()})
    found = Embed(f"alice/clip@{commit}")({"image": make_images(2)})
    same(found["alice/clip"], DualEncoder.from_pretrained(name).embed_images(make_images(2)))


def test_data_frames_and_iterators_of_them(name, make_images):
    """What `DataFrame.mapInPandas` of Spark passes; of a partition without rows an empty frame."""
    pictures = make_images(5)
    frame = pd.DataFrame({"content": list(map(encoded, pictures)), "path": list("abcde")}, index=range(10, 15))
    found = Embed(name, image_column="content")(iter([frame[:2], frame[2:], frame[:0]]))
    assert isinstance(found, Iterator)
    found = list(found)
    lengths = [len(each) for each in found]
    assert [list(each.columns) for each in found] == [["path", name]] * 3 and lengths == [2, 3, 0]
    assert "content" in frame and name not in frame
    table = pd.concat(found)
    assert "".join(table["path"]) == "abcde"
    same(list(table[name]), DualEncoder.from_pretrained(name).embed_images(pictures))


# datasets


def test_map_of_datasets_in_two_processes(name, make_dataset):
    dataset = make_dataset(11).add_column("id", list(range(11)))
    found = dataset.map(Embed(name), batched=True, batch_size=4, num_proc=2)
    assert found.features == {"label": dataset.features["label"], "id": Value("int64"), name: List(Value("float32"))}
    assert found["id"][:] == dataset["id"][:] and found["label"][:] == dataset["label"][:]
    expected = DualEncoder.from_pretrained(name).embed_images(dataset["image"][:])
    torch.testing.assert_close(found.with_format("torch")[name][:], expected, atol=1e-6, rtol=0)


def test_formats_and_streams_of_datasets(name, make_dataset):
    dataset = make_dataset(3)
    expected = DualEncoder.from_pretrained(name).embed_images(dataset["image"][:])
    kept = dataset.map(Embed(name, keep_images=True), batched=True)
    assert kept.column_names == ["image", "label", name] and isinstance(kept.features["image"], Image)
    options = {"batched": True, "remove_columns": "image"}
    for form in (dataset.with_format("numpy"), dataset.with_format("torch"), dataset.to_iterable_dataset()):
        rows = list(form.map(Embed(name), **options))
        assert rows[0].keys() == {"label", name}
        torch.testing.assert_close(torch.tensor(np.array([r[name] for r in rows])), expected, atol=1e-6, rtol=0)


def test_other_columns_are_not_decoded(name, make_images):
    pictures = make_images(2)
    columns = {"image": [{"bytes": encoded(one), "path": None} for one in pictures]}
    columns["other"] = [{"bytes": b"no picture", "path": None}] * 2
    dataset = Dataset.from_dict(columns).cast_column("image", Image()).cast_column("other", Image())
    assert dataset.map(Embed(name), batched=True).column_names == ["other", name]


def test_the_cache_of_datasets_sees_the_options_alone(name, model_dir, make_images, tmp_path):
    ours = Embed(name)
    before, written = Hasher.hash(ours), pickle.dumps(ours)
    ours({"image": make_images(1)})
    assert Hasher.hash(ours) == before == Hasher.hash(pickle.loads(written)) == Hasher.hash(Embed(name))
    assert len(pickle.dumps(ours)) < 1000
    options = [{"image_column": "image"}, {"keep_images": True}, {"batch_size": 2}, {"dtype": "bfloat16"}]
    others = [Embed(model_dir("clip", 1)), Embed(name, "a/b"), *(Embed(name, **each) for each in options)]
    assert len({before, *map(Hasher.hash, others)}) == 7


@pytest.mark.slow
def test_another_process_finds_what_was_cached(name):
    code = f"print(Hasher.hash(Embed({name!r})))"
    code = f"from hf_transmiter import Embed; from datasets.fingerprint import Hasher; {code}"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == Hasher.hash(Embed(name))


def test_a_folder_that_is_written_again_is_another_model(make_dataset, tmp_path):
    dataset, folder = make_dataset(3).to_parquet(tmp_path / "pictures.parquet"), str(tmp_path / "model")
    dataset = Dataset.from_parquet(str(tmp_path / "pictures.parquet"), cache_dir=str(tmp_path / "cache"))
    found = []
    for seed in (0, 0, 1):
        tiny_models.save("clip", folder, seed)
        found.append(dataset.map(Embed(folder), batched=True))
        expected = DualEncoder.from_pretrained(folder).embed_images(dataset["image"][:])
        torch.testing.assert_close(found[-1].with_format("torch")[folder][:], expected, atol=1e-6, rtol=0)
    assert found[0].cache_files == found[1].cache_files != found[2].cache_files


# Processes and threads


def test_a_process_loads_a_model_once(name, model_dir, make_images, monkeypatch):
    monkeypatch.setattr(embed, "_LOADED", {})
    loaded, load = [], embed.load_encoder
    monkeypatch.setattr(embed, "load_encoder", lambda *args, **options: loaded.append(args) or load(*args, **options))
    batch = {"image": make_images(2)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ours: ours(batch)[name], [pickle.loads(pickle.dumps(Embed(name)))] * 8))
    assert loaded == [(name,)] and all(rows == found[0] for rows in found)
    Embed(name, model_dir("clip", 1), dtype="bfloat16")(batch)
    Embed(model_dir("clip", 1), dtype="bfloat16")(batch)
    assert len(loaded) == 3


def _threads_of_a_fork(ours: Embed, picture) -> tuple[int, int]:
    rows = ours({"image": [picture]})[ours.models[0]]
    torch.rand(1000, 1000).exp().sum()  # waits for ever for threads that stayed with the parent
    return len(rows), torch.get_num_threads()


def _fork_with_threads(name: str, picture) -> None:
    torch.set_num_threads(2)
    torch.rand(1000, 1000).exp().sum()
    with get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_threads_of_a_fork, (Embed(name), picture)).get(timeout=60) == (1, 1)


@pytest.mark.slow
def test_a_fork_of_a_process_with_threads_does_not_hang(name, make_images):
    """In a process of its own, which keeps those threads: whatever is forked from this one must not wait for them."""
    process = get_context("spawn").Process(target=_fork_with_threads, args=(name, make_images(1)[0]))
    process.start()
    process.join(120)
    assert process.exitcode == 0


# What is wrong, in one sentence


@pytest.mark.parametrize(
    "batch, said",
    [
        ({"a": [1], "b": ["x"]}, "no image column found among a, b: pass image_column="),
        ({"img": [1], "image": [1]}, r"image_column could be img or image \(columns: img, image\)"),
        ({}, "no columns"),
    ],
)
def test_the_column_of_pictures(batch, said, name):
    for form in (batch, pd.DataFrame(batch)):
        with pytest.raises(ValueError, match=said):
            Embed(name)(form)
    with pytest.raises(ValueError, match="there is no column 'c'; the columns are a, b" if batch else said):
        Embed(name, image_column="c")({"a": [1], "b": ["x"]} if batch else {})


def test_a_picture_that_cannot_be_read(name, make_images, tmp_path):
    content = [encoded(one) for one in make_images(6)]
    content[4] = content[4][:-100]
    batch = {"image": objects(content), "id": np.arange(10, 16), "path": list("abcdef"), "x": np.zeros(6)}
    said = r"the image in row 4 of a batch \(id='14', path='e'\) cannot be read: image file is truncated"
    for form in (batch, pd.DataFrame(batch | {"x": list("uvwxyz")}).drop(columns="x")):
        with pytest.raises(ValueError, match=said):
            Embed(name, batch_size=3)(form)
    pictures = [{"bytes": each, "path": f"cats/{i}.png"} for i, each in enumerate(content)]
    dataset = Dataset.from_dict({"image": pictures, "id": list(range(6))}).cast_column("image", Image())
    said = r"the image in row 1 of a batch \(id='4'\) cannot be read \(cats/4.png\): image file is truncated"
    with pytest.raises(ValueError, match=said):
        dataset.map(Embed(name), batched=True, batch_size=3)


def test_what_is_no_model_and_what_is_no_batch(name, encoder, make_dataset):
    for model in (encoder, None, Path(name)):
        with pytest.raises(TypeError, match="model must be a str, not"):
            Embed(name, model)
    for models in ((), (name, name), ("me/clip", "me/clip@v2")):
        with pytest.raises(ValueError, match="pass the names of one or more models, each once; got"):
            Embed(*models)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Embed(name, batch_size=0)
    with pytest.raises(TypeError, match="a batch must be columns and their values, .*, not of the type list"):
        Embed(name)([{"image": 1}])
    with pytest.raises(TypeError, match="pass batched=True to map.*, not of the type LazyRow"):
        make_dataset(1).map(Embed(name))
    with pytest.raises(FileNotFoundError, match="there is no model"):
        Embed("~/nowhere")({"image": [1]})
