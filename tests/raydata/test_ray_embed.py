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
    how, options = Embed(name), {"compute": cluster.TaskPoolStrategy(size=2)}
    if form == "class":
        how, options = Embed, {"fn_constructor_args": (name,), "fn_constructor_kwargs": {"batch_size": 5}}
        # Or two actors hold both processors while the reading waits for one.
        options |= {"num_cpus": 0.5, "compute": cluster.ActorPoolStrategy(size=2)}
    rows = cluster.read_parquet(str(tmp_path / "stored")).random_shuffle(seed=0).repartition(6)
    rows.map_batches(how, batch_size=7, **options).write_parquet(str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 1
    found = read(tmp_path / "out")
    assert sorted(found.column_names) == sorted(["id", "label", name])
    expected = embed_dataset(DualEncoder.from_pretrained(name), stored, cache_dir=tmp_path / "cache").embeds
    torch.testing.assert_close(rows_of(found, name), expected, atol=1e-6, rtol=0)
    assert found.sort("id")["label"][:] == stored["label"][:]


def test_a_bridge_of_sums_over_shards(cluster, stored, model_dir, tmp_path):
    weak, strong = (DualEncoder.from_pretrained(model_dir("clip", seed)) for seed in (0, 1))
    rows = cluster.read_parquet(str(tmp_path / "stored")).repartition(4)
    both = Embed(weak.name_or_path, strong.name_or_path)
    rows.map_batches(both, batch_size=8, compute=cluster.TaskPoolStrategy(size=2)).write_parquet(str(tmp_path / "out"))
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(shards) > 1
    pairs = (Dataset.from_parquet(str(shard), keep_in_memory=True).with_format("torch")[:] for shard in shards)
    pairs = [(shard[strong.name_or_path], shard[weak.name_or_path]) for shard in pairs]
    widths = (strong.embed_dim, weak.embed_dim)
    moment = sum_pairs(pairs, *widths)[0]
    one, _, _ = sum_dataset(weak, strong, stored, "embedding", None, cache_dir=tmp_path / "cache")
    ids = (ModelId.of(weak), ModelId.of(strong))
    bridge, expected = (Bridge.from_moment(each, *ids, space="embedding") for each in (moment, one))
    torch.testing.assert_close(bridge.matrix, expected.matrix, atol=1e-6, rtol=0)
    assert bridge.scale == pytest.approx(expected.scale, abs=1e-6)


def test_pictures_that_ray_reads_itself(cluster, make_images, model_dir, tmp_path):
    name, folder = model_dir("clip"), tmp_path / "pictures"
    folder.mkdir()
    pictures = [*make_images(5, size=20), *make_images(4, size=28)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    expected = DualEncoder.from_pretrained(name).embed_images(pictures).numpy()

    def check(rows, given: Embed, **options):
        rows = rows.map_batches(given, batch_size=4, **options).take_all()
        assert len(rows) == 9 and rows[0].keys() == {"path", name}
        for row in rows:
            number = int(row["path"].rsplit("/")[-1].removesuffix(".png"))
            assert np.abs(np.array(row[name]) - expected[number]).max() < 1e-6

    arrays = cluster.read_images(str(folder), include_paths=True)
    check(arrays, Embed(name))
    check(arrays, Embed(name), batch_format="pandas")
    content = cluster.read_binary_files(str(folder), include_paths=True)
    check(content, Embed(name, image_column="bytes"))
    check(content.drop_columns(["bytes"]), Embed(name, image_column="path", keep_images=True))

    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:-600])
    with pytest.raises(Exception, match=r"the image in row \d of a batch \(path=\S+4.png'\) cannot be read: image"):
        content.map_batches(Embed(name, image_column="bytes")).take_all()
