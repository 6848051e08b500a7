import multiprocessing
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from hf_transmiter.data import pixels
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.images import stored_pictures
from hf_transmiter.data.pixels import pixel_batches, usual_workers


ALONE = SimpleNamespace(num_processes=1)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tower", [False, True])
def test_workers_change_nothing(encoder, make_dataset, workers, tower, tmp_path):
    dataset = make_dataset(11)
    own = {"batch_size": 3, "tower": tower}
    alone = embed_dataset(encoder, dataset, num_workers=0, cache_dir=tmp_path / "alone", **own)
    helped = embed_dataset(encoder, dataset, num_workers=workers, cache_dir=tmp_path / "helped", **own)
    assert torch.equal(helped.embeds, alone.embeds) and torch.equal(helped.labels, alone.labels)


def test_workers_do_what_is_left(encoder, make_dataset, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_transmiter.data.embeddings.PART_ROWS", 4)
    dataset, seen = make_dataset(11), []
    expected = embed_dataset(encoder, dataset, cache_dir=tmp_path / "alone").embeds

    def interrupt(module, args, kwargs):
        seen.append(len(kwargs["pixel_values"]))
        if len(seen) == 4:
            raise KeyboardInterrupt

    hook = encoder.model.vision_model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(encoder, dataset, batch_size=2, num_workers=2, cache_dir=tmp_path / "helped")
    assert not multiprocessing.active_children()  # what was prepared for nothing is gone
    seen.append(0)
    again = embed_dataset(encoder, dataset, batch_size=2, num_workers=2, cache_dir=tmp_path / "helped")
    hook.remove()
    assert seen[5:] == [2, 2, 2, 1]  # the first part was there
    torch.testing.assert_close(again.embeds, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_is_named_by_its_row(encoder, make_dataset, workers, tmp_path):
    pictures = list(stored_pictures(make_dataset(7), "image")["image"])
    pictures[5] = {"path": "holiday/sea.jpg", "bytes": b"nothing"}
    broken = Dataset.from_dict({"image": pictures}).cast(make_dataset(1).remove_columns("label").features)
    with pytest.raises(ValueError, match="image in row 5 cannot be read .holiday/sea.jpg.: cannot identify") as error:
        embed_dataset(encoder, broken, batch_size=2, num_workers=workers, cache_dir=tmp_path)
    assert "skip_unreadable=True" in str(error.value)


def test_random_numbers_of_the_caller_are_left_alone(encoder, make_dataset, tmp_path):
    state = torch.get_rng_state()
    embed_dataset(encoder, make_dataset(5), num_workers=1, cache_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_worker_gets_the_model(encoder, make_dataset):
    work = pixels._Pixels(encoder.pixel_processor, stored_pictures(make_dataset(1), "image"))
    copy = pickle.loads(pickle.dumps(work))  # how platforms that do not fork hand it over
    assert torch.equal(copy[range(1)], encoder.preprocess(make_dataset(1)["image"]))
    assert len(pickle.dumps(work)) < 50_000 < sum(p.numel() * 4 for p in encoder.model.parameters())


def test_a_worker_that_is_killed(encoder, make_dataset, monkeypatch):
    batches = [range(k, k + 1) for k in range(6)]
    monkeypatch.setattr(pixels, "to_pixels", lambda *_: os.kill(os.getpid(), 9))  # as for lack of memory
    with pytest.raises(OSError, match="lack of .shared. memory: pass fewer, num_workers=1 .--num-workers."):
        list(pixel_batches(encoder, stored_pictures(make_dataset(6), "image"), batches, 2))


@pytest.mark.parametrize("most", [2, 3])
def test_batches_that_do_not_fit_get_smaller(encoder, make_dataset, most, tmp_path):
    seen = []

    def small(module, args, kwargs):
        seen.append(len(kwargs["pixel_values"]))
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    expected = embed_dataset(encoder, make_dataset(11), cache_dir=tmp_path / "large")
    encoder.model.vision_model.register_forward_pre_hook(small, with_kwargs=True)
    table = embed_dataset(encoder, make_dataset(11), batch_size=8, cache_dir=tmp_path / "small")
    assert seen == [8, 4, *[2] * 5, 1]
    torch.testing.assert_close(table.embeds, expected.embeds, atol=1e-6, rtol=0)


def test_autocast_is_close_and_kept_apart(encoder, make_dataset, tmp_path):
    exact = embed_dataset(encoder, make_dataset(11), tower=True, cache_dir=tmp_path).embeds
    fast = embed_dataset(encoder, make_dataset(11), tower=True, precision="bfloat16", cache_dir=tmp_path).embeds
    assert fast.dtype == torch.float32 and len(list(tmp_path.iterdir())) == 2
    d = encoder.embed_dim
    torch.testing.assert_close(fast[:, :d].norm(dim=1), torch.ones(11), atol=1e-6, rtol=0)
    assert 1e-7 < (1 - (fast[:, :d] * exact[:, :d]).sum(1)).max() < 1e-3
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'fp16'"):
        embed_dataset(encoder, make_dataset(3), precision="fp16", cache_dir=tmp_path)


# How many


def plenty(monkeypatch, cores: int, shared: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=shared, f_frsize=1))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def batches_of(count: int, size: int = 64) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@pytest.mark.parametrize("cores, workers", [(1, 0), (2, 2), (6, 6), (64, 8)])
def test_as_many_as_there_are_cores(encoder, monkeypatch, cores, workers):
    plenty(monkeypatch, cores, 2**40)
    assert usual_workers(encoder, batches_of(1024), ALONE) == workers
    assert usual_workers(encoder, batches_of(1023), ALONE) == 0


def test_processes_share_the_cores_of_their_machine(encoder, monkeypatch):
    plenty(monkeypatch, 8, 2**40)
    assert usual_workers(encoder, batches_of(2048), SimpleNamespace(num_processes=2)) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the other is on another machine
    assert usual_workers(encoder, batches_of(2048), SimpleNamespace(num_processes=2)) == 8


def test_no_more_than_shared_memory_holds(encoder, monkeypatch):
    batch = 3 * 4 * encoder.image_size**2 * 64
    for shared, workers in ((2 * 3 * 4 * batch, 4), (2 * 3 * 2 * batch - 1, 0), (0, 0)):
        plenty(monkeypatch, 8, shared)
        assert usual_workers(encoder, batches_of(2048), ALONE) == workers


def test_a_process_that_may_have_no_children(encoder, make_dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(multiprocessing.process._current_process, "_config", {"daemon": True})
    assert len(embed_dataset(encoder, make_dataset(11), num_workers=2, cache_dir=tmp_path)) == 11
