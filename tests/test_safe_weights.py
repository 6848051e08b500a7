"""Tests of `hf_transmiter.safe_weights`: of a model of the Hub that has only pickles, the conversion of the Hub's own
converter is taken; where there is none it is refused with a remedy."""

import logging
from pathlib import Path

import huggingface_hub.constants
import local_hub_routes
import pytest
from huggingface_hub import HfApi
from local_hub_routes import API, ROUTES, Handler

from hf_transmiter.backbone import DualEncoder
from hf_transmiter.catalog import load_encoder
from hf_transmiter.preparing import prepare
from hf_transmiter.safe_weights import converted_revision, no_safetensors


CONVERTER = "hf_converter"  # token of the user SFconvertbot
REFUSED = "no model.safetensors, and pytorch_model.bin is not read"


@pytest.fixture
def files(model_dir):
    return {path.name: path.read_bytes() for path in Path(model_dir("clip")).iterdir()}


@pytest.fixture
def old(hub, files):
    """``old("bob/name")``: a model with pickles only."""

    def make(name: str) -> bytes:
        hub.write(name, {**files, "model.safetensors": b"", "pytorch_model.bin": b"pickled"})
        del hub.repos[name].files("main")["model.safetensors"]
        return files["model.safetensors"]

    return make


def propose(name: str, token: str, content: bytes, file: str = "model.safetensors") -> str:
    """Returns: the pull request."""
    made = HfApi(token=token).upload_file(
        path_or_fileobj=content, path_in_repo=file, repo_id=name, create_pr=True, commit_message=f"Adding {file}"
    )
    return made.pr_revision


@pytest.fixture
def unplug(hub, monkeypatch):
    """``unplug()``: no network from here on."""

    def now():
        hub.log.clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    return now


def test_the_converters_proposal_is_taken(hub, old, unplug, caplog):
    weights = old("bob/converted")
    propose("bob/converted", hub.other_token, b"not read")
    assert propose("bob/converted", CONVERTER, weights) == "refs/pr/2"
    propose("bob/converted", CONVERTER, b"later, but no weights", "notes.txt")
    propose("bob/converted", hub.token, b"not read")
    commit = hub.repos["bob/converted"].find("refs/pr/2")
    with caplog.at_level(logging.WARNING, "hf_transmiter"):
        encoder = DualEncoder.from_pretrained("bob/converted")
        again = load_encoder("bob/converted")
    assert encoder.revision == again.revision == commit
    assert [message for message in caplog.messages if "converter" in message] == [
        "bob/converted has no safetensors on its main branch; taking those of the Hub's converter, refs/pr/2: "
        "pin bob/converted@refs/pr/2"
    ]
    assert not hub.requests("GET", "/commits/")  # what transformers asks before it has pickles converted
    read = hub.requests("GET", "/resolve/.*(preprocessor|tokenizer)")
    assert read and all(f"/resolve/{commit}/" in path for path in read)  # the processor is of the same commit
    pinned = DualEncoder.from_pretrained("bob/converted", revision=commit)
    assert pinned.revision == commit and pinned.fingerprint == encoder.fingerprint
    # A revision is taken as it is.
    with pytest.raises(OSError, match=REFUSED):
        load_encoder(f"bob/converted@{hub.repos['bob/converted'].find('main')}")
    unplug()
    for revision in (None, commit):
        encoder = DualEncoder.from_pretrained("bob/converted", revision=revision)
        assert encoder.revision == commit and encoder.fingerprint == pinned.fingerprint
    assert not hub.log


def test_local_files_only(hub, old):
    weights = old("bob/local")
    propose("bob/local", CONVERTER, weights)
    with pytest.raises(OSError):
        DualEncoder.from_pretrained("bob/local", local_files_only=True)
    found = DualEncoder.from_pretrained("bob/local").revision
    hub.log.clear()
    assert DualEncoder.from_pretrained("bob/local", local_files_only=True).revision == found
    assert not hub.log
    hub.new_machine()
    assert converted_revision("bob/local", local_files_only=True) is None


def test_a_strangers_proposal_is_not_taken(hub, old, unplug, monkeypatch):
    def all_of_them(handler, body, id):
        handler.query.pop("author")
        return Handler.discussions(handler, body, id)

    weights = old("bob/strange")
    ref = propose("bob/strange", hub.token, weights)
    asked = f"if you trust it, take bob/strange@{ref}.$"
    with pytest.raises(OSError, match=asked):
        DualEncoder.from_pretrained("bob/strange")
    monkeypatch.setattr(local_hub_routes, "ROUTES", (("GET", f"{API}/discussions", all_of_them), *ROUTES))
    with pytest.raises(OSError, match=asked):
        DualEncoder.from_pretrained("bob/strange")
    assert len(hub.requests("GET", "/discussions")) == 2
    load_encoder(f"bob/strange@{ref}")  # in the cache from here on, and a stranger's still
    unplug()
    assert load_encoder(f"bob/strange@{ref}").revision == hub.repos["bob/strange"].find(ref)
    with pytest.raises(OSError, match="bob/strange"):
        DualEncoder.from_pretrained("bob/strange")


def test_prepare_fetches_the_conversion(hub, old, unplug):
    weights = old("bob/prepared")
    propose("bob/prepared", CONVERTER, weights)
    commit = hub.repos["bob/prepared"].find("refs/pr/1")
    (row,) = prepare(["bob/prepared"], progress=False)
    assert (row.status, row.revision) == ("fetched", commit), row.remark
    unplug()
    (row,) = prepare(["bob/prepared"], progress=False)
    assert (row.status, row.revision) == ("there", commit), row.remark
    assert load_encoder("bob/prepared").revision == commit
    assert not hub.log


def test_nothing_is_asked_where_there_are_safetensors(hub, files):
    hub.write("bob/new", {**files, "pytorch_model.bin": b"pickled"})
    propose("bob/new", CONVERTER, b"not read")
    hub.log.clear()
    encoder = DualEncoder.from_pretrained("bob/new")
    assert encoder.revision == hub.repos["bob/new"].find("main")
    assert not hub.requests("GET", "/discussions|/refs$|/commits/")
    assert converted_revision("bob/new") is None and not hub.requests("GET", "/discussions")


@pytest.mark.parametrize("path", ["/api/models/bob/broken", "/discussions", "/resolve/refs.*pr"])
def test_the_hub_does_not_answer(hub, old, path):
    propose("bob/broken", CONVERTER, old("bob/broken"))
    for what in (503, "drop", "corrupt"):
        hub.faults.clear()
        hub.fault("GET", path, what, times=100)
        hub.fault("HEAD", path, what if what == 503 else 500, times=100)
        assert converted_revision("bob/broken") is None
    hub.faults.clear()
    assert converted_revision("bob/broken") == "refs/pr/1"


def test_pickles_only(hub, files):
    weights = files.pop("model.safetensors")
    hub.write("bob/old", {**files, "pytorch_model.bin": b"pickled"})
    with pytest.raises(OSError, match="no model.safetensors, and pytorch_model.bin is not read.*Ask its owner"):
        DualEncoder.from_pretrained("bob/old")
    assert not hub.requests("GET", "pytorch_model.bin")
    # Proposed by somebody: named, and taken when it is asked for.
    for number, file in enumerate(("notes.txt", "model.safetensors"), 1):
        proposal = {"path_or_fileobj": weights, "path_in_repo": file, "repo_id": "bob/old", "create_pr": True}
        assert HfApi(token=hub.other_token).upload_file(**proposal).pr_num == number
    with pytest.raises(OSError, match="if you trust it, take bob/old@refs/pr/2.$"):
        load_encoder("bob/old")
    encoder = load_encoder("bob/old@refs/pr/2")
    assert encoder.revision == hub.repos["bob/old"].find("refs/pr/2")


def test_something_else_is_wrong(hub, files):
    hub.write("bob/whole", files)
    hub.write("bob/empty", {"config.json": files["config.json"]})
    for name in ("bob/whole", "bob/empty", "bob/none", "sandbox:weak"):
        assert no_safetensors(name) is None
    with pytest.raises(OSError, match="./nowhere"):
        DualEncoder.from_pretrained("./nowhere")
    with pytest.raises(OSError, match="bob/empty"):
        DualEncoder.from_pretrained("bob/empty")
    hub.write("bob/old", {"pytorch_model.bin": b"pickled"})
    hub.fault("GET", "bob/old", 503, times=100)
    assert no_safetensors("bob/old") is None
