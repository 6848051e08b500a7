"""Tests of `hf_transmiter.hub.repo` against a Hub on this machine, over HTTP."""

import logging
import subprocess
import sys

import huggingface_hub.constants
import pytest
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled
from local_hub import dataset_files

from hf_transmiter.hub.repo import fetch, hub_errors, push_folder, read_json


REPO = "alice/cats"
CARD = b"---\nlicense: mit\n---\n# Cats\n"
FILES = {
    "README.md": CARD,
    "settings.json": b'{"beta": 1}',
    "weights.safetensors": bytes(range(256)) * 16,
    "transfers/big.safetensors": b"big" * 1000,
}


@pytest.fixture
def folder(tmp_path):
    """``folder(files)``: a folder that holds just these."""
    count = 0

    def write(files):
        nonlocal count
        count += 1
        for name, content in files.items():
            path = tmp_path / str(count) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / str(count)

    return write


def there(hub, repo_id=REPO, revision="main"):
    """Files of the repository, without the one that the Hub made."""
    return {name: content for name, content in hub.files(repo_id, revision).items() if name != ".gitattributes"}


def sentence(raised) -> str:
    """The message, which must be one line with an end."""
    text = str(raised.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_push_list_load_update_and_load_by_revision(hub, folder):
    first = push_folder(folder(FILES), REPO, commit_message="first")
    assert there(hub) == FILES
    assert set(HfApi().list_repo_files(REPO)) == {*FILES, ".gitattributes"}
    hub.new_machine()
    assert {name: fetch(REPO, name).read_bytes() for name in FILES} == FILES
    assert read_json(REPO, "settings.json") == {"beta": 1}
    assert fetch(REPO, "big.safetensors", subfolder="transfers").read_bytes() == FILES["transfers/big.safetensors"]

    second = push_folder(folder({"settings.json": b'{"beta": 2}'}), REPO, commit_message="second")
    assert there(hub) == {**FILES, "settings.json": b'{"beta": 2}'}
    assert hub.titles(REPO) == ["second", "first"]
    assert first.oid != second.oid
    assert read_json(REPO, "settings.json") == {"beta": 2}
    for pinned in ({"source": f"{REPO}@{first.oid}"}, {"source": REPO, "revision": first.oid}):
        assert read_json(pinned.pop("source"), "settings.json", **pinned) == {"beta": 1}
    HfApi().create_tag(REPO, tag="v1", revision=first.oid)
    HfApi().create_branch(REPO, branch="next")
    push = HfApi().list_repo_refs(REPO)
    assert ([b.name for b in push.branches], [t.name for t in push.tags]) == (["main", "next"], ["v1"])
    assert read_json(f"{REPO}@v1", "settings.json") == {"beta": 1}
    assert read_json(f"{REPO}@next", "settings.json") == {"beta": 2}


def test_a_push_is_one_commit(hub, folder):
    """Of hundreds of files too, which huggingface_hub's own upload of folders may split."""
    push_folder(folder({f"{i}.txt": b"%d" % i for i in range(300)}), REPO, commit_message="many")
    assert hub.titles(REPO) == ["many"]
    assert len(hub.requests("POST", "/commit/")) == 1


def test_a_push_changes_nothing_else(hub, folder):
    hub.write(REPO, {**FILES, "notes.txt": b"mine"}, "first")
    push_folder(folder({"new.txt": b"new"}), REPO, commit_message="second")
    assert there(hub) == {**FILES, "notes.txt": b"mine", "new.txt": b"new"}
    assert hub.requests("PUT") == []


def test_what_is_there_already_is_not_sent_again(hub, folder):
    push_folder(folder(FILES), REPO, commit_message="first")
    again = push_folder(folder(FILES), REPO, commit_message="second")
    assert hub.titles(REPO) == ["first"]
    assert again.oid == HfApi().model_info(REPO).sha
    assert len(hub.requests("PUT")) == 2


def test_delete(hub, folder):
    hub.write(REPO, {"transfers/a.bin": b"a", "transfers/b.bin": b"b", "scores.json": b"[]", "notes.txt": b"mine"})
    new = {"transfers/b.bin": b"new", "weights.bin": b"w"}
    push_folder(
        folder(new),
        REPO,
        commit_message="new weights",
        delete=["transfers/a.bin", "transfers/b.bin", "scores.json", "absent.bin"],
    )
    assert there(hub) == {**new, "notes.txt": b"mine"}
    assert hub.titles(REPO) == ["new weights", "by hand"]


def test_nothing_to_push(hub, tmp_path):
    for nothing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="nothing to push"):
            push_folder(nothing, REPO, commit_message="x")
    assert hub.log == []


def test_a_private_repository(hub, folder):
    push_folder(folder(FILES), REPO, commit_message="first", private=True)
    assert fetch(REPO, "README.md").read_bytes() == CARD
    for token, option in ((None, {}), (hub.other_token, {}), (hub.token, {"token": False})):
        hub.new_machine(token)
        with pytest.raises(OSError, match="no repository 'alice/cats' .* that you may see") as raised:
            fetch(REPO, "README.md", **option)
        assert "hf auth login" in sentence(raised)
    assert fetch(REPO, "README.md", token=hub.token).read_bytes() == CARD


@pytest.mark.parametrize("token, status", [(None, "Invalid username"), ("hf_wrong", "Invalid credentials")])
def test_a_wrong_token(hub, folder, token, status):
    hub.write(REPO, FILES)
    hub.new_machine(token)
    for repo in (REPO, "alice/new"):
        with pytest.raises(OSError, match=f"answers 401 for {repo} .{status}") as raised:
            push_folder(folder({"new.txt": b"new"}), repo, commit_message="x")
        assert "hf auth login" in sentence(raised)
    assert there(hub) == FILES
    assert list(hub.repos) == [REPO]
    if token is None:  # everybody may read, but not with a token that is none
        assert fetch(REPO, "README.md").read_bytes() == CARD
    else:
        with pytest.raises(OSError, match="answers 401 .* pass a valid `token`"):
            fetch(REPO, "README.md")


def test_repositories_of_others(hub, folder):
    hub.write("bob/cats", FILES)
    for repo in ("bob/cats", "bob/new"):
        with pytest.raises(OSError, match=f"answers 403 for {repo} .*create_pr=True") as raised:
            push_folder(folder({"new.txt": b"new"}), repo, commit_message="mine")
        sentence(raised)
    assert there(hub, "bob/cats") == FILES
    info = push_folder(folder({"new.txt": b"new"}), "bob/cats", commit_message="a proposal", create_pr=True)
    assert there(hub, "bob/cats") == FILES
    assert hub.titles("bob/cats") == ["by hand"]
    assert (info.pr_revision, info.pr_num) == ("refs/pr/1", 1)
    assert fetch("bob/cats", "new.txt") is None
    assert fetch("bob/cats", "new.txt", revision="refs/pr/1").read_bytes() == b"new"
    push_folder(folder({"new.txt": b"newer"}), "bob/cats", commit_message="another", create_pr=True)
    assert there(hub, "bob/cats", "refs/pr/1") == {**FILES, "new.txt": b"new"}
    assert there(hub, "bob/cats", "refs/pr/2") == {**FILES, "new.txt": b"newer"}


def test_a_proposal_to_oneself(hub, folder):
    push_folder(folder(FILES), REPO, commit_message="first")
    push_folder(folder({"README.md": b"# New\n"}), REPO, commit_message="second", create_pr=True)
    assert there(hub) == FILES
    assert there(hub, revision="refs/pr/1")["README.md"] == b"# New\n"


def test_a_gated_repository(hub):
    hub.write("bob/cats", FILES)
    hub.gated.add("bob/cats")
    with pytest.raises(OSError, match="bob/cats is gated: ask for access"):
        fetch("bob/cats", "README.md")


def test_what_is_not_there(hub):
    hub.write(REPO, FILES)
    assert fetch(REPO, "absent.json") is None
    assert read_json(REPO, "absent.json") is None
    assert fetch(REPO, "README.md", subfolder="transfers") is None
    with pytest.raises(OSError, match="There is no repository 'alice/dogs' on the Hub") as raised:
        fetch("alice/dogs", "README.md")
    sentence(raised)
    for revision in ("v9", "0" * 40):
        with pytest.raises(OSError, match=f"alice/cats has no such branch, tag or commit.*{revision}"):
            fetch(REPO, "README.md", revision=revision)


def test_a_card_the_hub_does_not_accept(hub, folder):
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push_folder(folder({**FILES, "README.md": b"---\nlicense: [mit\n---\n"}), REPO, commit_message="x")
    assert there(hub) == {}


LOST = [
    *[("POST", "/api/repos/create"), ("POST", "/validate-yaml"), ("POST", "/preupload/"), ("POST", "/objects/batch")],
    *[("PUT", "/_lfs/"), ("POST", "/_lfs_verify"), ("POST", "/commit/")],
]


@pytest.mark.parametrize("what", ["drop", 503])
@pytest.mark.parametrize("method, path", LOST)
def test_the_connection_is_lost_while_pushing(hub, folder, method, path, what):
    """Wherever it happens: a clear error, a repository as it was; the next push sends the rest."""
    push_folder(folder({"README.md": b"# Old\n"}), REPO, commit_message="first")
    hub.fault(method, path, what, times=10**6)
    with pytest.raises(OSError, match="try again") as raised:
        push_folder(folder(FILES), REPO, commit_message="second")
    sentence(raised)
    assert there(hub) == {"README.md": b"# Old\n"}
    assert hub.titles(REPO) == ["first"]
    hub.faults.clear()
    push_folder(folder(FILES), REPO, commit_message="second")
    assert there(hub) == FILES
    assert hub.titles(REPO) == ["second", "first"]


def test_one_lost_connection_does_not_stop_an_upload(hub, folder):
    hub.fault("PUT", "/_lfs/", "drop", times=2)
    hub.fault("POST", "/preupload/", 503)
    push_folder(folder(FILES), REPO, commit_message="first")
    assert there(hub) == FILES
    assert hub.titles(REPO) == ["first"]


def test_an_answer_that_is_lost_makes_no_second_commit(hub, folder):
    hub.fault("POST", "/commit/", "no answer")
    with pytest.raises(OSError, match="connection to the Hub failed"):
        push_folder(folder(FILES), REPO, commit_message="first")
    push_folder(folder(FILES), REPO, commit_message="first")
    assert there(hub) == FILES
    assert hub.titles(REPO) == ["first"]


def test_somebody_else_was_faster(hub):
    hub.write(REPO, FILES)
    old = HfApi().model_info(REPO).sha
    hub.write(REPO, {"new.txt": b"new"})
    with pytest.raises(OSError, match="answers 412 .* somebody else has changed it") as raised, hub_errors(REPO):
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="new.txt", repo_id=REPO, parent_commit=old)
    sentence(raised)
    assert hub.files(REPO)["new.txt"] == b"new"


def test_a_damaged_download(hub):
    """One wrong bit. huggingface_hub compares sizes only (2.4); when that changes, our check may go."""
    hub.write(REPO, FILES)
    name = "weights.safetensors"
    hub.fault("GET", name, "corrupt", times=2)
    with open(hf_hub_download(REPO, name), "rb") as file:
        assert file.read() != FILES[name]
    with pytest.raises(OSError, match="weights.safetensors of alice/cats arrived damaged.* try again") as raised:
        fetch(REPO, name)  # in the cache already
    sentence(raised)
    with pytest.raises(OSError, match="arrived damaged"):
        fetch(REPO, name)  # asked for again
    assert fetch(REPO, name).read_bytes() == FILES[name]
    assert fetch(REPO, name, local_files_only=True).read_bytes() == FILES[name]


def test_a_download_that_is_too_short(hub):
    hub.write(REPO, FILES)
    hub.fault("GET", "weights.safetensors", "truncate")
    with pytest.raises(OSError, match="should be of size 4096 but has size 2048"):
        fetch(REPO, "weights.safetensors")
    assert fetch(REPO, "weights.safetensors").read_bytes() == FILES["weights.safetensors"]


def test_a_download_that_breaks_off_goes_on(hub):
    hub.write(REPO, FILES)
    hub.fault("GET", "weights.safetensors", "drop")
    assert fetch(REPO, "weights.safetensors").read_bytes() == FILES["weights.safetensors"]
    assert len(hub.requests("GET", "weights.safetensors")) == 2


def test_a_hub_that_is_down(hub):
    hub.write(REPO, FILES)
    hub.fault("HEAD", "/resolve/", 503, times=2)
    assert fetch(REPO, "README.md").read_bytes() == CARD  # asked again until it answers
    hub.fault("HEAD", "/resolve/", 503, times=10**6)
    assert fetch(REPO, "README.md").read_bytes() == CARD  # in the cache
    with pytest.raises(OSError, match="settings.json of 'alice/cats' .* answers 503 .* try again later") as raised:
        fetch(REPO, "settings.json")
    sentence(raised)
    hub.faults.clear()
    hub.fault("GET", "/resolve/", 500, times=10**6)
    with pytest.raises(OSError, match="answers 500 for alice/cats"):
        fetch(REPO, "settings.json")


def test_a_pinned_revision_in_the_cache_needs_no_hub(hub):
    commit = hub.write(REPO, FILES)
    fetch(REPO, "weights.safetensors", revision=commit)
    hub.log.clear()
    assert fetch(f"{REPO}@{commit}", "weights.safetensors").read_bytes() == FILES["weights.safetensors"]
    assert hub.log == []


def test_no_network(hub, monkeypatch, caplog):
    """Not declared: nobody listens at the Hub's address."""
    hub.write(REPO, FILES)
    fetch(REPO, "README.md")
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert fetch(REPO, "README.md").read_bytes() == CARD
    with caplog.at_level(logging.WARNING, "hf_transmiter.hub.repo"):
        assert fetch(REPO, "settings.json") is None
    assert "counts as not there: The connection to the Hub failed" in caplog.text
    with pytest.raises(OSError, match="neither in a folder here nor in the cache: The connection to the Hub failed"):
        fetch("alice/dogs", "README.md")


def test_offline_after_caching(hub, tmp_path):
    """In a process of its own, as HF_HUB_OFFLINE is read when huggingface_hub is imported."""
    code = """
from hf_transmiter.hub.repo import fetch, push_folder, read_json
print(read_json("alice/cats", "settings.json"), fetch("alice/cats", "absent.json"))
print(fetch("alice/cats", "README.md"))
for call in (lambda: fetch("alice/dogs", "README.md"), lambda: push_folder(FOLDER, "alice/cats", commit_message="x")):
    try:
        call()
    except OSError as error:
        print(error)
"""
    hub.write(REPO, FILES)
    (tmp_path / "README.md").write_bytes(CARD)
    assert read_json(REPO, "settings.json") == {"beta": 1}
    assert fetch(REPO, "absent.json") is None
    hub.log.clear()
    options = {"env": hub.environment(offline=True), "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", code.replace("FOLDER", repr(str(tmp_path)))], **options)
    assert result.returncode == 0, result.stderr
    first, second, unknown, push = result.stdout.splitlines()
    assert (first, second) == ("{'beta': 1} None", "None")
    assert "README.md of alice/cats is not in the cache and counts as not there: offline" in result.stderr
    assert "absent.json" not in result.stderr  # known not to be there
    assert "README.md of 'alice/dogs' is neither in a folder here nor in the cache: offline" in unknown
    assert "offline mode is enabled" in push
    assert hub.log == []


def test_local_files_only(hub):
    hub.write(REPO, FILES)
    with pytest.raises(OSError, match="nor in the cache: offline"):
        fetch(REPO, "README.md", local_files_only=True)
    fetch(REPO, "README.md")
    hub.log.clear()
    assert fetch(REPO, "README.md", local_files_only=True).read_bytes() == CARD
    assert hub.log == []


def test_own_cache_dir(hub, tmp_path):
    hub.write(REPO, FILES)
    assert fetch(REPO, "README.md", cache_dir=tmp_path / "cache").is_relative_to(tmp_path / "cache")


def test_folders_need_no_hub(hub, folder):
    local = folder(FILES)
    assert fetch(local, "README.md") == local / "README.md"
    assert fetch(str(local), "big.safetensors", subfolder="transfers").read_bytes() == b"big" * 1000
    assert fetch(local, "absent.json") is None
    for impossible in ("./absent", "a/b/c", "~/x"):
        with pytest.raises(FileNotFoundError, match="neither a local path nor a Hub id"):
            fetch(impossible, "README.md")
    assert hub.log == []


def test_other_tests_are_offline():
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info(REPO)


def test_datasets_on_the_hub_of_the_tests(hub, make_dataset):
    """Read by `datasets` at a commit, and written by it."""
    pictures = make_dataset(6)
    pictures.push_to_hub("alice/pets")
    first = HfApi().dataset_info("alice/pets").sha
    newer = hub.add_dataset("alice/pets", dataset_files({"train": make_dataset(4), "test": make_dataset(3)}))
    hub.write("alice/pets", {"README.md": b"# A model of the same name\n"})
    hub.new_machine(token=None)
    for revision, sizes in ((first, {"train": 6}), (newer, {"train": 4, "test": 3})):
        found = load_dataset("alice/pets", revision=revision)
        assert {name: len(split) for name, split in found.items()} == sizes
        assert found["train"].features == pictures.features
    assert load_dataset("alice/pets", split="test")[0]["image"].tobytes() == pictures[0]["image"].tobytes()
    with pytest.raises(DatasetNotFoundError):
        load_dataset("alice/nothing")
