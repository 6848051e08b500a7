"""Tests of `hf_transmiter.dataset_cache`: a Hub dataset at the version that was asked for, without the Hub too."""

import huggingface_hub.constants
import pytest
from datasets import config
from local_hub import dataset_files

from hf_transmiter.catalog import list_splits, load_images
from hf_transmiter.dataset_cache import hub_builder


@pytest.fixture
def unplug(hub, monkeypatch):
    """``unplug()``: no network from here on; any request fails the test."""

    def now():
        hub.log.clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)

    yield now
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        assert not hub.log


@pytest.fixture
def versions(hub, make_dataset):
    """Two commits of bob/OddPets: 4 training pictures, then 6."""
    return [hub.add_dataset("bob/OddPets", dataset_files({"train": make_dataset(count)})) for count in (4, 6)]


def test_offline_the_same_version_as_online(versions, unplug):
    """The newest in the cache is not the one that was asked for."""
    sources = {"bob/OddPets": 6, f"bob/OddPets@{versions[1]}": 6, f"bob/OddPets@{versions[0]}": 4}
    online = {source: load_images(source) for source in sources}
    unplug()
    for source, count in sources.items():
        offline = load_images(source)
        assert len(offline) == len(online[source]) == count
        assert offline._fingerprint == online[source]._fingerprint  # calibration packs and embeddings stay valid
        assert offline.features == online[source].features
        assert offline[0]["image"].tobytes() == online[source][0]["image"].tobytes()
        assert list_splits(source) == ["train"]


def test_a_branch_is_what_it_was_when_it_was_read(hub, versions, make_dataset, unplug):
    load_images("bob/OddPets")
    newest = hub.add_dataset("bob/OddPets", dataset_files({"train": make_dataset(9)}))
    load_images(f"bob/OddPets@{newest}")
    unplug()
    assert len(load_images("bob/OddPets")) == len(load_images("bob/OddPets@main")) == 6


def test_what_is_not_in_the_cache_is_an_error_that_names_it(versions, unplug):
    load_images(f"bob/OddPets@{versions[0]}")
    unplug()
    with pytest.raises(ConnectionError, match=f"'bob/OddPets@{versions[1]}' is not in the cache.*prepare --dataset"):
        load_images(f"bob/OddPets@{versions[1]}")
    with pytest.raises(ConnectionError, match=f"only default at {versions[0]}"):
        load_images("bob/OddPets@next")
    with pytest.raises(ConnectionError, match="'bob/others' is not in the cache"):
        load_images("bob/others")
    with pytest.raises(ConnectionError, match=r"'bob/OddPets', subset 'extra', is not in the cache"):
        hub_builder("bob/OddPets", "extra")
    # Only the Arrow files were copied: what "bob/OddPets" meant is not known, the one version there is will do.
    assert len(load_images("bob/OddPets")) == 4


def test_a_folder_of_that_name_is_not_of_the_hub(make_dataset, tmp_path, unplug):
    """`datasets` keeps what it read from the folder pets under its bare name."""
    (tmp_path / "pets").mkdir()
    make_dataset(4).to_parquet(tmp_path / "pets" / "train.parquet")
    assert len(load_images(str(tmp_path / "pets"))) == 4
    unplug()
    with pytest.raises(ConnectionError, match="'pets' is not in the cache"):
        load_images("pets")


def test_subsets(hub, make_dataset, unplug):
    files = {}
    cards = {name: dataset_files({"train": make_dataset(count)}, name) for name, count in {"a": 3, "b": 5}.items()}
    for parts in cards.values():
        files |= parts
    entries = [f"- config_name: {name}\n  data_files: {name}/train-*\n" for name in cards]
    files["README.md"] = f"---\nconfigs:\n{''.join(entries)}---\n".encode()
    hub.add_dataset("bob/two", files)
    for name, count in {"a": 3, "b": 5}.items():
        assert len(load_images("bob/two", subset=name)) == count
    unplug()
    for name, count in {"a": 3, "b": 5}.items():
        assert len(load_images("bob/two", subset=name)) == count
    with pytest.raises(ValueError, match="several subsets in the cache; name one: a, b"):
        load_images("bob/two")


def test_a_hub_that_is_down(hub, versions, make_dataset):
    """Not declared offline, but nobody answers: the version that was asked for, or an error."""
    newest = hub.add_dataset("bob/OddPets", dataset_files({"train": make_dataset(9)}))
    for version in versions:
        load_images(f"bob/OddPets@{version}")
    hub.fault("HEAD", "other", "no answer", times=1000)
    with pytest.raises(ConnectionError, match="'bob/other' is not in the cache"):
        load_images("bob/other")
    hub.fault("HEAD", "", 503, times=1000)
    hub.fault("GET", "", 503, times=1000)
    assert len(load_images(f"bob/OddPets@{versions[0]}")) == 4
    with pytest.raises(ConnectionError, match=f"{newest}' is not in the cache"):
        load_images(f"bob/OddPets@{newest}")
