"""Writing in one step: what is there while, after and instead of it, and who may write where."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_transmiter.hub import files
from hf_transmiter.hub.files import beside, claim, fill_folder, replace_file, replace_folder, write_json


def fill(folder: Path):
    (folder / "new.txt").write_text("new")
    (folder / "inside").mkdir()
    (folder / "inside" / "new.txt").write_text("new")


def tree(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


NEW = {"inside/new.txt": "new", "new.txt": "new"}


@pytest.fixture(params=["exchange", "three steps"])
def either_way(request, monkeypatch):
    """With and without the call that swaps two folders."""
    if request.param == "three steps":
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())


# In one step


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_there_at_once(tmp_path, there):
    path = tmp_path / "deep" / "out"
    if there:
        path.mkdir(parents=True)

    def watched(folder):
        fill(folder)
        assert folder.name == "out" and (list(path.iterdir()) == [] if there else not path.exists())

    replace_folder(path, watched)
    assert tree(tmp_path / "deep") == {f"out/{name}": text for name, text in NEW.items()}


def test_what_is_replaced_goes_and_what_arrived_stays(tmp_path, either_way, caplog):
    """In the middle of the work, and a folder and a link as well."""
    path = tmp_path / "out"
    (path / "figures").mkdir(parents=True)
    for name in ("old.txt", "new.txt", "figures/old.png"):
        (path / name).write_text("old")
    there = files.entries(path)
    assert there == {"old.txt", "new.txt", "figures", "figures/old.png"}

    def write(folder):
        fill(folder)
        (path / "figures" / "mine.png").write_text("mine")
        (path / "inside").mkdir()
        (path / "inside" / "mine.txt").write_text("mine")
        (path / "empty").mkdir()
        (path / "thesis.txt").write_text("mine")
        (path / "photos").mkdir()
        (path / "photos" / "cat.jpg").write_text("cat")
        (path / "link").symlink_to("photos")

    replace_folder(path, write, there)
    mine = {"figures/mine.png": "mine", "inside/mine.txt": "mine", "thesis.txt": "mine", "photos/cat.jpg": "cat"}
    assert tree(path) == {**NEW, **mine} and (path / "empty").is_dir()
    assert os.readlink(path / "link") == "photos"
    assert "are kept: empty, figures/mine.png, inside, link, photos." in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["new.txt", "inside", "inside/new.txt", "new.txt/mine"])
def test_what_arrived_under_a_name_that_was_written_stays(tmp_path, name):
    path = tmp_path / "out"

    def write(folder):
        fill(folder)
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text("mine")

    with pytest.raises(
        FileExistsError, match=rf"out/{name.removesuffix('/mine')} arrived while .* the result is in .*out-2\."
    ):
        replace_folder(path, write)
    assert tree(path) == {name: "mine"} and tree(tmp_path / "out-2") == NEW
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out-2"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    disk, path = tmp_path / "disk" / "big", tmp_path / "out"
    disk.mkdir(parents=True)
    path.symlink_to(disk)
    replace_folder(path, fill)
    assert path.is_symlink() and tree(disk) == NEW
    assert [entry.name for entry in disk.parent.iterdir()] == ["big"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_the_usual_ones(tmp_path, umask):
    """safetensors gives its files to their owner alone."""
    before = os.umask(umask)
    try:
        (tmp_path / "usual").mkdir()
        (tmp_path / "usual" / "file").touch()
        replace_file(tmp_path / "a" / "a.safetensors", lambda path: save_file({"a": torch.zeros(1)}, path))
        replace_folder(tmp_path / "b", lambda path: save_file({"a": torch.zeros(1)}, path / "a.safetensors"))
        fill_folder(tmp_path / "usual", lambda path: save_file({"a": torch.zeros(1)}, path / "a.safetensors"))
        write_json(tmp_path / "a" / "a.json", [])
    finally:
        os.umask(before)
    usual = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "usual", tmp_path / "usual" / "file")]
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == usual[path.is_file()], path


def test_threads_have_temporaries_of_their_own(tmp_path):
    """The same process writes one file from eight threads at once."""
    start, faults = threading.Barrier(8), []

    def work(text):
        start.wait()
        for _ in range(20):
            try:
                replace_file(tmp_path / "file", lambda path: path.write_text(text * 1000))
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    text = (tmp_path / "file").read_text()
    assert not faults and text == text[0] * 1000 and len(list(tmp_path.iterdir())) == 1


def no_space(*_):
    raise OSError(28, "No space left on device", "/somewhere/hidden")


def test_a_full_disk(tmp_path):
    """By libraries that raise what they like, one sentence names the place, and nothing is left."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def half(folder):
        fill(folder)
        replace_file(folder / "more", no_space)

    for write in (lambda: replace_file(tmp_path / "file", no_space), lambda: replace_folder(tmp_path / "out", half)):
        with pytest.raises(OSError, match=r"/(file|out/more) cannot be written: No space left on device\.$"):
            write()
    assert tree(tmp_path) == {"file": "old", "out/old": "old"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        with pytest.raises(OSError, match=r"disk/a cannot be written: .*No space left on device"):
            replace_file(disk / "a", lambda path: save_file({"a": torch.zeros(10**6)}, path))
        with pytest.raises(OSError, match="cannot be written: No space left on device"):
            replace_folder(disk / "out", lambda path: (path / "a").write_bytes(bytes(10**6)))
        assert list(disk.iterdir()) == []
        fill_folder(disk, fill)  # a mount point can be filled
        assert tree(disk) == NEW
    finally:
        subprocess.run(["umount", disk], check=True)


# Whose place it is


def test_a_place_is_one_runs(tmp_path):
    """Of threads, of processes, and by a link or another spelling of the same place."""
    path, link = tmp_path / "new" / "out", tmp_path / "link"
    link.symlink_to(tmp_path / "new", target_is_directory=True)
    code = "import sys\nfrom hf_transmiter.hub.files import claim\nwith claim(sys.argv[1]): pass"
    with claim(path):
        for other in (path, tmp_path / "new" / ".." / "new" / "out", link / "out"):
            with pytest.raises(BlockingIOError, match="another run is writing to .*out: wait for its end, or choose"):
                claim(other).__enter__()
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert "BlockingIOError: another run is writing to" in other.stderr
        with claim(tmp_path / "new" / "out2"):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]  # and the folder that was made for it went
    with claim(path):
        replace_folder(path, fill)
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]


def test_the_claim_of_a_killed_run_is_none(tmp_path):
    code = (
        "import os, sys\nfrom hf_transmiter.hub.files import claim\nwith claim(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -9
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.hf-transmiter.lock"]
    with claim(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_cleared_by_the_next_claim(tmp_path):
    """Those of this place only: others may be at work."""
    path, ending = tmp_path / "out", "0123456789abcdef0123456789abcdef.tmp"
    (path / "cells").mkdir(parents=True)
    left = [beside(path, ending), path / f".a.json.{ending}", path / "cells" / f".b.json.{ending}"]
    left += [tmp_path / f".out.checkpoint.safetensors.{ending}", path / ".b.safetensors.4711.tmp"]
    other = [tmp_path / f".out2.{ending}", tmp_path / ".out.checkpoint.safetensors", tmp_path / ".out.tmp"]
    held = path / "cells" / f".c.{ending}"
    (path / ".c.safetensors.4711.tmp").write_text("half")  # an earlier version had files
    for folder in (*left, *other):
        folder.mkdir()
        (folder / "half").write_text("half")
    with claim(path / "cells" / "c"):
        held.mkdir()
        with claim(path):
            pass
        assert not [folder for folder in left if folder.exists()] and [p.name for p in path.iterdir()] == ["cells"]
        assert not [folder for folder in (*other, held) if not folder.exists()]


def test_an_exchange_that_was_cut_short_is_undone(tmp_path, monkeypatch):
    """Without the call that swaps folders a kill may come between two steps."""
    path, real, steps = tmp_path / "out", os.replace, []
    replace_folder(path, fill)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())

    def stopped(*args):
        steps.append(args)
        if len(steps) == 3:  # the first says that something is there
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(path, lambda folder: (folder / "newer.txt").write_text("newer"), replaces=files.entries(path))
    monkeypatch.setattr(os, "replace", real)
    assert not path.exists()
    with claim(path):
        assert tree(path) == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_filesystem_without_locks(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with caplog.at_level(logging.INFO), claim(tmp_path / "out"), claim(tmp_path / "out"):
        replace_folder(tmp_path / "out", fill)
    assert "filesystem without locks: other runs are not kept out" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def dangling(folder):
    (folder / "out").symlink_to(folder / "gone" / "far")
    return folder / "out"


def below_a_file(folder):
    (folder / "file").write_text("mine")
    return folder / "file" / "out"


def long(folder):
    return folder / ("x" * 256)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (dangling, "it is a link to .*gone/far, which is not there"),
        (below_a_file, "there is a file where a folder must be"),
        (long, "File name too long"),
        (lambda folder: Path("/proc/out"), "No such file or directory"),
    ],
    ids=["dangling", "below a file", "long", "no files there"],
)
def test_unusable_places(tmp_path, make, why):
    path = make(tmp_path)
    with pytest.raises(OSError, match=f"cannot be written: ({why})"):
        claim(path).__enter__()
    assert not [entry for entry in tmp_path.rglob("*") if entry.name.endswith((".lock", ".tmp"))]


@pytest.mark.parametrize("length", [100, 101, 200, 255])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_long_names(tmp_path, length, letter):
    """As long as the filesystem allows; hidden names are longer than that."""
    path = tmp_path / (letter * (length // len(letter.encode())))
    with claim(path):
        replace_folder(path, fill)
        replace_file(path.with_name(path.name[:-1] + "z"), lambda file: file.write_text("text"))
        assert tree(path) == NEW
    assert len(list(tmp_path.iterdir())) == 2


def test_who_may_fill_a_folder_but_not_replace_it(tmp_path, monkeypatch):
    """Its parent is another user's: claims and checkpoints go inside."""
    path = tmp_path / "mine"
    path.mkdir()
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    assert files.is_fixed(path) and beside(path, files.LOCK).parent == path
    with claim(path):
        fill_folder(path, fill)
        with pytest.raises(BlockingIOError):
            claim(path).__enter__()
    assert tree(path) == NEW
    shutil.rmtree(path)
