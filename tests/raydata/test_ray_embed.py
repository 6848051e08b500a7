"""`Embed` on a cluster of Ray: rows, shards, and what is added up over shards, against one process."""

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset

from hf_transmiter import Bridge, DualEncoder, Embed, embed_dataset
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.moments import sum_dataset, sum_pairs


@pytest.fixture
def stored(make_dataset, tmp_path) -> Dataset:
    """48 pictures in 4 files, each row with its number."""
    dataset = make_dataset(48).add_column("id", list(range(48)))
    for shard in range(4):
        dataset.shard(4, shard).to_parquet(tmp_path / "stored" / f"{shard}.parquet")
    return dataset


def read(folder) -> Dataset:
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", keep_in_memory=True)


def rows_of(dataset: Dataset, column: str) -> torch.Tensor:
    dataset = dataset.sort("id")
    assert dataset["id"][:] == list(range(len(dataset)))
    return dataset.with_format("torch")[column][:]


@pytest.mark.parametrize("form", ["instance", "class"])
def test_two_workers_write_the_rows_of_one_process(form, cluster, stored, model_dir, tmp_path):
    name = model_dir("clip")
    how = (Embed(name),) if form == "instance" else (Embed,)
    options = (
        {} if form == "instance" else {"fn_constructor_args": (name,), "fn_constructor_kwargs": {"batch_size": 5}}
    )
    rows = cluster.read_parquet(str(tmp_path / "stored")).random_shuffle(seed=0).repartition(6)
    rows.map_batches(*how, batch_size=7, concurrency=2, **options).write_parquet(str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 1
    found = read(tmp_path / "out")
    assert sorted(found.column_names) == sorted(["id", "label", name])
    expected = embed_dataset(DualEncoder.from_pretrained(name), stored, cache_dir=tmp_path / "cache").embeds
    torch.testing.assert_close(rows_of(found, name), expected, atol=1e-6, rtol=0)
    assert found.sort("id")["label"][:] == stored["label"][:]


def test_a_bridge_of_sums_over_shards(cluster, stored, model_dir, tmp_path):
    weak, strong = (DualEncoder.from_pretrained(model_dir("clip", seed)) for seed in (0, 1))
    rows = cluster.read_parquet(str(tmp_path / "stored")).repartition(4)
    rows = rows.map_batches(Embed(weak.name_or_path, keep_images=True), batch_size=8, concurrency=2)
    rows.map_batches(Embed(strong.name_or_path), batch_size=8, concurrency=2).write_parquet(str(tmp_path / "out"))
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(shards) > 1
    pairs = (Dataset.from_parquet(str(shard), keep_in_memory=True).with_format("torch")[:] for shard in shards)
    pairs = [(shard[strong.name_or_path], shard[weak.name_or_path]) for shard in pairs]
    widths = (strong.embed_dim, weak.embed_dim)
    moment = sum_pairs(pairs, *widths)[0]
    one, _, _ = sum_dataset(weak, strong, stored, "embedding", None, cache_dir=tmp_path / "cache")
    added = sum_pairs(pairs[1:], *widths)[0] + sum_pairs(pairs[:1], *widths)[0]  # each where its shard lies
    ids = (ModelId.of(weak), ModelId.of(strong))
    bridge, expected, other = (Bridge.from_moment(each, *ids, space="embedding") for each in (moment, one, added))
    for made in (bridge, other):
        torch.testing.assert_close(made.matrix, expected.matrix, atol=1e-6, rtol=0)
        assert made.scale == pytest.approx(expected.scale, abs=1e-6)


def test_pictures_that_ray_reads_itself(cluster, make_images, model_dir, tmp_path):
    name, folder = model_dir("clip"), tmp_path / "pictures"
    folder.mkdir()
    pictures = [*make_images(5, size=20), *make_images(4, size=28)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    expected = DualEncoder.from_pretrained(name).embed_images(pictures).numpy()

    def check(rows, left: list[str]):
        rows = rows.take_all()
        assert len(rows) == 9 and sorted(rows[0]) == sorted(left)
        for row in rows:
            number = int(row["path"].rsplit("/")[-1].removesuffix(".png"))
            assert np.abs(np.array(row["x"]) - expected[number]).max() < 1e-6

    arrays = cluster.read_images(str(folder), include_paths=True)
    check(arrays.map_batches(Embed(name, column="x"), batch_size=4), ["path", "x"])
    check(arrays.map_batches(Embed(name, column="x"), batch_size=4, batch_format="pandas"), ["path", "x"])
    content = cluster.read_binary_files(str(folder), include_paths=True)
    check(content.map_batches(Embed(name, "bytes", column="x"), batch_size=4), ["path", "x"])
    paths = content.drop_columns(["bytes"])
    check(paths.map_batches(Embed(name, "path", column="x", keep_images=True), batch_size=4), ["path", "x"])

    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:-600])
    with pytest.raises(
        Exception, match=r"the image in row \d of a batch \(path=\S+4.png'\) cannot be read: image file"
    ):
        content.map_batches(Embed(name, "bytes")).take_all()
