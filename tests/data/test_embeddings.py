import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator, PartialState, debug_launcher
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_transmiter.data import embeddings
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.images import load_images
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.dual_encoder import DualEncoder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embeddings, "PART_ROWS", 4)


@pytest.fixture
def watch(encoder):
    """``watch()``: number of images the encoder has embedded; ``watch.stop_after = n`` interrupts at image n + 1."""

    def count():
        return count.images

    def hook(module, args, kwargs):
        batch = len(kwargs["pixel_values"])
        if count.images + batch > count.stop_after:
            raise KeyboardInterrupt
        count.images += batch

    count.images, count.stop_after = 0, float("inf")
    encoder.model.vision_model.register_forward_pre_hook(hook, with_kwargs=True)
    return count


def same(left: FeatureTable, right: FeatureTable):
    torch.testing.assert_close(left.embeds, right.embeds, atol=1e-6, rtol=0)
    assert torch.equal(left.labels, right.labels) and left.class_names == right.class_names


# What the table holds


def test_rows_are_the_encoders_in_order(encoder, make_dataset, tmp_path):
    dataset = make_dataset(11)
    table = embed_dataset(encoder, dataset, cache_dir=tmp_path, batch_size=3)
    assert len(table) == 11 and table.embeds.dtype == torch.float32
    torch.testing.assert_close(table.embeds, encoder.embed_images(dataset["image"][:]), atol=1e-6, rtol=0)
    assert table.labels.tolist() == dataset["label"][:] and table.labels.dtype == torch.long
    assert table.class_names == ["cat", "dog", "car"]
    assert table.dataset_fingerprint == dataset._fingerprint
    (path,) = tmp_path.iterdir()  # no parts and no temporary files stay behind
    assert path.suffix == ".npy" and np.array_equal(np.load(path), table.embeds)


def test_without_labels(encoder, make_dataset, tmp_path):
    table = embed_dataset(encoder, make_dataset(5).remove_columns("label"), cache_dir=tmp_path)
    assert table.labels is None and table.class_names is None and len(table) == 5


def test_with_an_accelerator_of_the_caller(encoder, make_dataset, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    table = embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path / "a", accelerator=Accelerator(cpu=True))
    same(embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path / "b"), table)


def test_formats_of_the_dataset_are_not_applied(encoder, make_dataset, tmp_path):
    dataset = make_dataset(5)
    table = embed_dataset(encoder, dataset, cache_dir=tmp_path / "a")
    same(embed_dataset(encoder, dataset.with_format("torch"), cache_dir=tmp_path / "b"), table)


# Caching


def test_default_cache_is_among_the_hubs_assets(encoder, make_dataset):
    folder = Path(constants.HF_ASSETS_CACHE, "hf_transmiter", "features", "default")
    before = set(folder.glob("*.npy"))
    embed_dataset(encoder, make_dataset(3))
    assert len(set(folder.glob("*.npy")) - before) == 1


def test_a_finished_table_is_never_made_again(encoder, make_dataset, watch, tmp_path):
    first = embed_dataset(encoder, make_dataset(11), cache_dir=tmp_path)
    watch.stop_after = 0
    same(embed_dataset(encoder, make_dataset(11), cache_dir=tmp_path, batch_size=2), first)
    with pytest.raises(KeyboardInterrupt):  # the guard itself works
        embed_dataset(encoder, make_dataset(10), cache_dir=tmp_path)


def test_rows_of_the_tower(encoder, make_dataset, watch, tmp_path):
    """``[x | h]`` in a file of its own; what needs x alone takes it from there."""
    dataset = make_dataset(11)
    wide = embed_dataset(encoder, dataset, tower=True, cache_dir=tmp_path, batch_size=3)
    pixels = encoder.preprocess(dataset["image"])
    torch.testing.assert_close(wide.embeds, encoder.embed_pixels(pixels, tower=True), atol=1e-6, rtol=0)
    assert wide.embeds.shape == (11, 48)
    watch.stop_after = 0
    narrow = embed_dataset(encoder, dataset, cache_dir=tmp_path)
    assert torch.equal(narrow.embeds, wide.embeds[:, :16]) and torch.equal(narrow.labels, wide.labels)
    assert torch.equal(torch.cat(list(narrow.batches(4))), narrow.embeds)
    assert torch.equal(narrow.select([3, 1]).embeds, narrow.embeds[[3, 1]])
    same(embed_dataset(encoder, dataset, tower=True, cache_dir=tmp_path), wide)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    watch.stop_after = float("inf")
    embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path)
    watch.stop_after = 0
    with pytest.raises(KeyboardInterrupt):  # tokens cannot be had from unit rows
        embed_dataset(encoder, make_dataset(5), tower=True, cache_dir=tmp_path)


def test_what_the_key_covers(encoder, make_dataset, model_dir, tmp_path):
    dataset = make_dataset(5)
    other = make_dataset(5, seed=2).select_columns("image").rename_column("image", "other")
    two = datasets.concatenate_datasets([dataset, other], axis=1)
    tuned = DualEncoder.from_pretrained(model_dir("clip"))
    peft.get_peft_model(tuned.model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tables = [
        embed_dataset(encoder, dataset, cache_dir=tmp_path),
        embed_dataset(tuned, dataset, cache_dir=tmp_path),
        embed_dataset(DualEncoder.from_pretrained(model_dir("clip", 1)), dataset, cache_dir=tmp_path),
        embed_dataset(encoder, dataset.select([4, 3, 2, 1, 0]), cache_dir=tmp_path),
        embed_dataset(encoder, make_dataset(5, seed=1), cache_dir=tmp_path),
        embed_dataset(encoder, make_dataset(5, names=("a", "b")), cache_dir=tmp_path),
        embed_dataset(encoder, two, cache_dir=tmp_path, image_column="image"),
        embed_dataset(encoder, two, cache_dir=tmp_path, image_column="other"),
    ]
    assert len(tables) == len(os.listdir(tmp_path))
    assert not torch.allclose(tables[0].embeds, tables[1].embeds, atol=1e-2)
    torch.testing.assert_close(tables[3].embeds, tables[0].embeds.flip(0), atol=1e-6, rtol=0)
    assert not torch.allclose(tables[-1].embeds, tables[-2].embeds, atol=1e-2)


def test_an_interrupted_run_goes_on_where_it_stopped(encoder, make_dataset, watch, tmp_path):
    dataset = make_dataset(11)
    watch.stop_after = 9
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(encoder, dataset, cache_dir=tmp_path, batch_size=2)
    (parts,) = tmp_path.iterdir()
    assert sorted(os.listdir(parts)) == ["000000.safetensors", "000001.safetensors"]
    watch.stop_after = float("inf")
    watch.images = 0
    table = embed_dataset(encoder, dataset, cache_dir=tmp_path, batch_size=2)
    assert watch() == 3  # rows 8, 9, 10: the part that was under way
    same(table, embed_dataset(encoder, dataset, cache_dir=tmp_path / "fresh"))


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(bytes(data))


def empty(path: Path):
    path.write_bytes(b"")


def foreign(path: Path):
    save_file({"embeds": torch.zeros(4, 16)}, path)


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign, os.remove])
def test_a_damaged_part_is_made_again(encoder, make_dataset, watch, tmp_path, damage):
    dataset = make_dataset(11)
    expected = embed_dataset(encoder, dataset, cache_dir=tmp_path / "fresh")
    watch.images, watch.stop_after = 0, 8
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(encoder, dataset, cache_dir=tmp_path)
    damage(next(tmp_path.glob("*.parts")) / "000000.safetensors")
    watch.images, watch.stop_after = 0, float("inf")
    same(embed_dataset(encoder, dataset, cache_dir=tmp_path), expected)
    assert watch() == 4 + 3


def flip_one(path: Path):
    """A bit in the middle, and the file's times as they were."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def without_digest(path: Path):
    """As it was written before there were digests."""
    path.write_bytes(path.read_bytes()[:-32])


@pytest.mark.parametrize("damage", [cut, empty, foreign, flip, flip_one, without_digest])
def test_a_damaged_table_is_made_again(encoder, make_dataset, tmp_path, damage, caplog):
    table = embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path)
    labels, embeds = table.labels.clone(), table.embeds.clone()
    del table
    damage(next(tmp_path.glob("*.npy")))
    again = embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path)
    assert "damaged" in caplog.text
    assert torch.equal(again.labels, labels) and torch.equal(again.embeds, embeds)


@pytest.mark.parametrize("tower", [False, True])
def test_a_damaged_table_of_the_tower_is_made_again(encoder, make_dataset, tmp_path, tower, caplog):
    wide = embed_dataset(encoder, make_dataset(5), tower=True, cache_dir=tmp_path).embeds.clone()
    flip_one(next(tmp_path.glob("*.npy")))
    again = embed_dataset(encoder, make_dataset(5), tower=tower, cache_dir=tmp_path).embeds
    assert "damaged" in caplog.text and torch.allclose(again, wide[:, : again.shape[1]], atol=1e-6)


def paths(files):
    return datasets.Dataset.from_dict({"image": list(map(str, files))})


def undecoded(files):
    return paths(files).cast_column("image", datasets.Image()).cast_column("image", datasets.Image(decode=False))


def decoded(files):
    return paths(files).cast_column("image", datasets.Image())


def some_of_them(files):
    return decoded(files).select([3, 0, 1]).shuffle(seed=0)


@pytest.mark.parametrize("column", [paths, decoded, some_of_them])
def test_a_file_that_was_replaced_under_its_name(encoder, make_images, tmp_path, column):
    """Also by one of the same size that is as old: the new picture is embedded, and one that is back is known."""
    files, pictures = [tmp_path / f"{number}.bmp" for number in range(4)], make_images(5)
    for file, picture in zip(files, pictures, strict=False):
        picture.save(file)
    first = embed_dataset(encoder, column(files), cache_dir=tmp_path / "cache")
    old, times = files[0].read_bytes(), files[0].stat()
    for content in (pictures[4], old):
        files[0].write_bytes(content) if content is old else content.save(files[0])
        os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))
        assert files[0].stat().st_size == times.st_size
        found = embed_dataset(encoder, column(files), cache_dir=tmp_path / "cache")
        fresh = embed_dataset(encoder, column(files), cache_dir=tmp_path / "new" / str(content is old))
        assert torch.equal(found.embeds, fresh.embeds)
        assert torch.allclose(found.embeds, first.embeds, atol=1e-3) == (content is old)
        assert (found.dataset_fingerprint == first.dataset_fingerprint) == (content is old)  # logits go by it, too
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_a_file_that_is_replaced_meanwhile(encoder, make_images, tmp_path):
    """Its new content must not stand for the old one."""
    files, pictures = [tmp_path / f"{number}.bmp" for number in range(6)], make_images(7)
    for file, picture in zip(files, pictures, strict=False):
        picture.save(file)

    def replaced(module, args, kwargs):
        pictures[6].save(files[5])

    before = files[5].read_bytes()
    hook = encoder.model.vision_model.register_forward_pre_hook(replaced, with_kwargs=True)
    with pytest.raises(ValueError, match="pictures were changed while they were embedded: start again"):
        embed_dataset(encoder, decoded(files), cache_dir=tmp_path / "cache", batch_size=2)
    hook.remove()
    assert not (tmp_path / "cache").exists()  # nor was it there before
    files[5].write_bytes(before)
    found = embed_dataset(encoder, decoded(files), cache_dir=tmp_path / "cache")
    assert torch.equal(found.embeds, embed_dataset(encoder, decoded(files), cache_dir=tmp_path / "fresh").embeds)


def test_a_picture_that_is_stored_is_known_by_the_fingerprint(make_dataset, tmp_path):
    """Nothing is read: a large data set would take minutes."""
    dataset = make_dataset(5)
    assert embeddings.content_fingerprint(dataset, "image") == dataset._fingerprint
    gone = undecoded([tmp_path / "gone.png"])
    assert embeddings.content_fingerprint(gone, "image") not in ("", gone._fingerprint)


def test_what_a_killed_run_left_goes(encoder, make_dataset, tmp_path):
    """It was killed when the table was there already, or while parts were made."""
    table = embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    for leftover in (path.with_suffix(".parts"), tmp_path / f".{path.name}.{'a' * 32}.tmp"):
        leftover.mkdir()
    same(embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path), table)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_no_crash(encoder, make_dataset, tmp_path, monkeypatch):
    """Writing through a mapping would end the process."""
    real = embeddings.load_file

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings, "load_file", full)
    with pytest.raises(OSError, match=r"\.npy cannot be written: No space left on device\.$"):
        embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".parts"]
    monkeypatch.setattr(embeddings, "load_file", real)
    assert len(embed_dataset(encoder, make_dataset(5), cache_dir=tmp_path)) == 5


# Several processes


def _in_two_processes(folder, dataset, cache, keyword):
    encoder = DualEncoder.from_pretrained(folder)
    seen = []
    encoder.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    table = embed_dataset(encoder, dataset, cache_dir=cache, **keyword)
    tensors = {"embeds": table.embeds, "labels": table.labels}
    save_file(tensors, Path(cache, f"copy-{os.getpid()}-{sum(seen)}"), {"dataset": table.dataset_fingerprint})


def test_two_processes_make_the_same_table(encoder, make_dataset, model_dir, tmp_path):
    dataset = make_dataset(14)
    expected = embed_dataset(encoder, dataset, cache_dir=tmp_path / "one")
    arguments = (model_dir("clip"), dataset, tmp_path / "two", {"batch_size": 3})
    # This process may already count as a single one; the two must not inherit that.
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=arguments, num_processes=2)
    copies = sorted((tmp_path / "two").glob("copy-*"))
    # Parts of 4, 4, 4, 2 rows in turn: 8 images for one process, 6 for the other.
    assert sorted(path.name.rsplit("-", 1)[1] for path in copies) == ["6", "8"]
    for copy in copies:
        same(FeatureTable(**load_file(copy), class_names=expected.class_names), expected)
    assert len(list((tmp_path / "two").iterdir())) == 3


def _reads_its_files(files, folder):
    embeddings.PART_ROWS, read, own = 4, [], embeddings.file_digest
    embeddings.file_digest = lambda name: read.append(name) or own(name)
    found = embeddings.content_fingerprint(decoded(files), "image", PartialState(cpu=True))
    Path(folder, f"{len(read)}.txt").write_text(found)


def test_two_processes_share_the_reading_of_files(make_images, tmp_path):
    files = [tmp_path / f"{number}.bmp" for number in range(11)]
    for file, picture in zip(files, make_images(11), strict=True):
        picture.save(file)
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_reads_its_files, args=(files, tmp_path), num_processes=2)
    alone = embeddings.content_fingerprint(decoded(files), "image")
    # Blocks of 4, 4, 3 files in turn.
    assert {path.name: path.read_text() for path in tmp_path.glob("*.txt")} == {"7.txt": alone, "4.txt": alone}


def test_two_runs_of_the_same_job_do_not_harm_each_other(encoder, make_dataset, model_dir, tmp_path):
    dataset, other, tables = make_dataset(11), DualEncoder.from_pretrained(model_dir("clip")), []

    def finish_first(module, args, kwargs):
        if not tables:
            tables.append(embed_dataset(other, dataset, cache_dir=tmp_path))

    encoder.model.vision_model.register_forward_pre_hook(finish_first, with_kwargs=True)
    same(embed_dataset(encoder, dataset, cache_dir=tmp_path), tables[0])


# Errors


def test_empty_dataset(encoder, make_dataset, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        embed_dataset(encoder, make_dataset(3).select([]), cache_dir=tmp_path)


def test_arguments_are_checked(encoder, make_dataset, tmp_path):
    for wrong in (datasets.DatasetDict(train=make_dataset(3)), make_dataset(3).to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"one split of a dataset, not a {type(wrong).__name__}"):
            embed_dataset(encoder, wrong, cache_dir=tmp_path)


def test_labels_must_be_indices(encoder, make_dataset, tmp_path):
    words = make_dataset(3).remove_columns("label").add_column("label", ["cat", "dog", "cat"])
    with pytest.raises(ValueError, match=r"'label' holds 'cat'.*class_encode_column\('label'\)"):
        embed_dataset(encoder, words, cache_dir=tmp_path)
    table = embed_dataset(encoder, words.class_encode_column("label"), cache_dir=tmp_path)
    assert table.class_names == ["cat", "dog"] and table.labels.tolist() == [0, 1, 0]


def test_an_unreadable_picture_is_named_by_its_row(encoder, make_dataset, tmp_path):
    rows = list(make_dataset(7).cast_column("image", datasets.Image(decode=False)))
    rows[5]["image"] = {"bytes": b"no picture", "path": None}
    broken = datasets.Dataset.from_list(rows, features=make_dataset(1).features)
    with pytest.raises(ValueError, match="row 5 cannot be read"):
        embed_dataset(encoder, broken, cache_dir=tmp_path)
    # What came before is kept; without the row the run succeeds.
    assert len(embed_dataset(encoder, broken.select([0, 1, 2, 3, 4, 6]), cache_dir=tmp_path)) == 6


def test_pictures_that_are_no_pictures(encoder, tmp_path):
    dataset = datasets.Dataset.from_dict({"image": ["missing.jpg"]})
    with pytest.raises(ValueError, match=r"the image in row 0 cannot be read \(missing.jpg\): No such file"):
        embed_dataset(encoder, dataset, cache_dir=tmp_path)


def test_numbers_that_are_not_finite_are_named_by_their_row(encoder, make_dataset, tmp_path):
    state = {"calls": 0}

    def poison(module, args, output):
        state["calls"] += 1
        if state["calls"] == 3:  # batches of 2: rows 4 and 5
            output = output.clone()
            output[1, 0] = float("nan")
        return output

    encoder.model.visual_projection.register_forward_hook(poison)
    with pytest.raises(ValueError, match="embedding of row 5 is not finite"):
        embed_dataset(encoder, make_dataset(7), cache_dir=tmp_path, batch_size=2)


# FeatureTable by itself


@given(rows=st.integers(0, 9), batch_size=st.integers(1, 12), data=st.data())
def test_blocks_and_selections(rows, batch_size, data):
    embeds = torch.arange(rows * 2, dtype=torch.float16).reshape(rows, 2)
    table = FeatureTable(embeds, range(rows), [str(i) for i in range(rows)])
    blocks = list(table.batches(batch_size))
    assert all(len(block) <= batch_size and block.dtype == torch.float32 for block in blocks)
    assert torch.equal(torch.cat([*blocks, torch.empty(0, 2)]), embeds.float())
    indices = data.draw(st.lists(st.integers(0, rows - 1), max_size=12) if rows else st.just([]))
    part = table.select(indices)
    assert torch.equal(part.embeds, embeds.float()[indices]) and part.labels.tolist() == indices


def test_tables_are_checked():
    with pytest.raises(ValueError, match=r"\(2,\) labels for 3 rows"):
        FeatureTable(torch.zeros(3, 2), [0, 1])
    with pytest.raises(ValueError, match="label 2 has no name: there are 2"):
        FeatureTable(torch.zeros(1, 2), [2], ["a", "b"])
    with pytest.raises(ValueError, match="must be"):
        FeatureTable(torch.zeros(3))


def test_a_bar_is_for_a_terminal_only(make_dataset, model_dir, tmp_path):
    """In a file it would be hundreds of lines that nobody reads."""
    make_dataset(6).save_to_disk(tmp_path / "images")
    code = (
        "import sys, datasets, hf_transmiter as ht\n"
        "weak, images = ht.DualEncoder.from_pretrained(sys.argv[1]), datasets.load_from_disk(sys.argv[2])\n"
        "ht.embed_dataset(weak, images, cache_dir=sys.argv[3])"
    )
    shown = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "0"}  # the other tests want none
    for terminal in (True, False):
        arguments = [str(model_dir("clip")), str(tmp_path / "images"), str(tmp_path / f"features-{terminal}")]
        reader, writer = pty.openpty() if terminal else os.pipe()
        if terminal:
            termios.tcsetwinsize(writer, (24, 80))
        subprocess.run([sys.executable, "-c", code, *arguments], stderr=writer, env=shown, check=True)
        os.close(writer)
        said = b""
        with suppress(OSError):  # a terminal that is closed
            while part := os.read(reader, 65536):
                said += part
        os.close(reader)
        assert (b"img/s" in said) == terminal


def test_copies_of_pictures_are_known(encoder, make_images, tmp_path):
    for place, names in (("one", "ab"), ("other", "ab"), ("swapped", "ba")):
        (tmp_path / place).mkdir()
        for name, image in zip(names, make_images(2), strict=True):
            image.save(tmp_path / place / f"{name}.png")
    found = {}
    for place in ("one", "other", "swapped"):
        paths = [str(tmp_path / place / f"{name}.png") for name in "ab"]
        columns = load_images(str(tmp_path / place)), datasets.Dataset.from_dict({"image": paths})
        tables = [embed_dataset(encoder, images, cache_dir=tmp_path / "cache") for images in columns]
        found[place] = [table.dataset_fingerprint for table in tables]
    assert found["one"] == found["other"] and not set(found["one"]) & set(found["swapped"])
    grey = load_images(str(tmp_path / "one")).cast_column("image", datasets.Image(mode="L"))
    assert embed_dataset(encoder, grey, cache_dir=tmp_path / "cache").dataset_fingerprint not in found["one"]


def test_no_place_for_the_cache(encoder, make_dataset, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError("no permission: /shared/assets")

    monkeypatch.setattr(embeddings, "cached_assets_path", refused)
    with pytest.raises(
        OSError, match=r"^there is no place for embeddings \(no perm.*\): pass cache_dir, or set HF_ASS"
    ):
        embed_dataset(encoder, make_dataset(3))
    assert len(embed_dataset(encoder, make_dataset(3), cache_dir=tmp_path / "cache")) == 3
