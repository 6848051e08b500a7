import gzip
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_transmiter
from hf_transmiter.data.vocabulary import load_vocabulary, name_key


FOLDER = Path(hf_transmiter.__file__).parent / "assets" / "vocabulary"
BUILD = Path(__file__).parents[1] / "making" / "vocabulary.py"


def test_common_nouns_are_clean():
    names = load_vocabulary("common-nouns")
    lines = [line for line in (FOLDER / "common-nouns.txt").read_text().splitlines() if line[0] != "#"]
    assert names == lines == sorted(lines) and len(names) == 4000
    assert all(re.fullmatch(r"[a-z]+('s|s')?( [a-z]+)?", name) for name in names)
    assert {"golden retriever", "teapot", "mushroom", "airplane", "pizza", "volcano"} <= set(names)
    assert not {"doctor", "gypsy moth", "entity", "can", "rape"} & set(names)


def test_licences_travel_with_the_names():
    notice = (FOLDER / "NOTICE").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    assert "Copyright 2019 Ross Wightman, Apache License 2.0" in " ".join(notice.split())


def test_file_with_comments_blank_lines_and_repetitions(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeff# birds\nowl\n\n  Barn Owl \r\nbarn_owl\n # end\nOwl\n".encode())
    assert load_vocabulary(path) == load_vocabulary(str(path)) == ["owl", "Barn Owl"]


def test_lists_may_hold_names_that_look_like_comments():
    assert load_vocabulary(["#hashtag", "b", "B"]) == ["#hashtag", "b"]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1))
def test_duplicates_go_and_order_stays(names):
    loaded = load_vocabulary(names)
    assert load_vocabulary(loaded) == loaded
    keys = [name_key(name) for name in names]
    assert [name_key(name) for name in loaded] == list(dict.fromkeys(keys))


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match='No vocabulary "nouns".*"common-nouns"'):
        load_vocabulary("nouns")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="empty.txt holds no name"):
        load_vocabulary(empty)
    with pytest.raises(ValueError, match="vocabulary list holds no name"):
        load_vocabulary([])
    with pytest.raises(TypeError, match="must be strings, got 3"):
        load_vocabulary(["a", 3])


@pytest.fixture
def packages(tmp_path):
    """Two small packages in the layout of the real ones; the first is a wheel, the second a folder."""
    rows = {
        "n02000001": ("pug, pug-dog", "small dog"),
        "n02000002": ("Maltese dog", "a proper name"),
        "n02000003": ("zorilla", "in ImageNet-1k, so its rare word does not matter"),
        "n02000004": ("zyzzyva", "a rare word"),
        "n03000001": ("tea pot", "pot for tea"),
        "n03000002": ("teapot", "the same in one word"),
        "n03000003": ("pot of tea", "three words"),
        "n03000004": ("butler", "a person in the artefact range"),
        "n03000005": ("tea", "not in the cleaned lists"),
        "n10000001": ("dog", "outside the categories"),
        "n03000006": ("pot dog", "a pair of words"),
    }
    build = runpy.run_path(str(BUILD))
    # Every name excluded by hand must be a candidate.
    for i, name in enumerate([*build["UNCLEAR"].split(), *build["HURTFUL"].split(", ")]):
        rows[f"n04{i:06d}"] = (name, "to be excluded")
    info = "timm/data/_info/"
    wheel = tmp_path / "timm.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(info + "imagenet_synset_to_lemma.txt", "".join(f"{k}\t{v[0]}\n" for k, v in rows.items()))
        file.writestr(info + "imagenet_synset_to_definition.txt", "".join(f"{k}\t{v[1]}\n" for k, v in rows.items()))
        file.writestr(info + "imagenet_synsets.txt", "n02000003\n")
        listed = "\n".join(synset for synset in rows if synset != "n03000005")
        file.writestr(info + "imagenet12k_synsets.txt", "\n".join(rows))
        file.writestr(info + "imagenet21k_miil_w21_synsets.txt", listed)
    names = [lemmas.split(",")[0].replace("'s", "") for lemmas, _ in rows.values()]
    words = {word for name in names for word in name.split(" ")} - {"zorilla", "zyzzyva"}
    merges = "".join(f"{word[:-1]} {word[-1]}</w>\n" for word in sorted(words))
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"header\n" + merges.encode()))
    return wheel, tmp_path


def run_build(*arguments):
    command = [sys.executable, str(BUILD), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_build_applies_its_rules(packages, tmp_path):
    output = tmp_path / "names.txt"
    assert run_build(*packages, "--size", 4, "--output", output).returncode == 0
    assert load_vocabulary(output) == ["pot dog", "pug", "teapot", "zorilla"]
    written = output.read_bytes()
    assert "unchanged" in run_build(*packages, "--size", 4, "--output", output).stdout
    # Names of ImageNet-1k go before single words, and these before pairs.
    other = run_build(*packages, "--size", 3, "--output", output)
    assert other.returncode == 1 and "--overwrite" in other.stderr and output.read_bytes() == written
    assert run_build(*packages, "--size", 3, "--output", output, "--overwrite").returncode == 0
    assert load_vocabulary(output) == ["pug", "teapot", "zorilla"]
    too_many = run_build(*packages, "--size", 5, "--output", output)
    assert too_many.returncode == 1 and "Only 4 names pass the rules" in too_many.stderr


def test_build_without_its_inputs(tmp_path):
    missing = run_build(tmp_path / "timm.whl", tmp_path)
    assert missing.returncode == 1 and "timm.whl" in missing.stderr and "Traceback" not in missing.stderr


def test_build_help_shows_a_command():
    assert "python tests/making/vocabulary.py wheels/" in run_build("--help").stdout


def test_build_writes_what_is_shipped():
    assert runpy.run_path(str(BUILD))["OUTPUT"] == FOLDER / "common-nouns.txt"
