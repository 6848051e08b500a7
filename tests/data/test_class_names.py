"""Whose name in the data is whose in the task: by spelling, never by position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_transmiter.data.class_names import match_names, read_class_file
from hf_transmiter.hub.checks import did_you_mean, nearest, simplified


NAMES = ("apply eye makeup", "indoor church", "707-320", "C", "C++", "猫")


@given(st.permutations(range(len(NAMES))))
def test_any_order_of_the_data(order):
    assert match_names([NAMES[i] for i in order], NAMES) == order


def test_other_spellings():
    aliases, left_out = {"/c/church/indoor": "indoor church", "7": "707-320"}, ("BACKGROUND_Google",)
    found = ["ApplyEyeMakeup", "/c/church/indoor", "Background google", "Indoor_Church".lower(), "7", "707 320"]
    assert [match_names([name], NAMES, aliases, left_out)[0] for name in found] == [0, 1, -1, 1, 2, 2]
    assert simplified("Apply_Eye-Makeup!") == "applyeyemakeup" and simplified("猫 2") == "猫2"
    with pytest.raises(ValueError, match=r"matches the data's 'c\+'"):  # C, or C++?
        match_names(["c+"], NAMES)


def test_names_without_latin_letters_are_not_one_name():
    for found, other in (("😀", "😡"), ("❤️", "☀️"), ("+", "-"), ("कि", "की"), ("กา", "กี"), ("=", "!=")):
        assert match_names([other, found], [found, other]) == [1, 0]
        with pytest.raises(ValueError, match="no name among the 1 of the task matches"):
            match_names([found], [other])
    assert match_names(["cafe\u0301 au lait", "BAR"], ["bar", "caf\u00e9-au-lait"]) == [1, 0]  # two ways to write é
    assert match_names([" + "], ["+"]) == [0]


def test_numbers_are_positions_only_where_nothing_has_a_name():
    assert match_names(["0", "1", "10", "2"], [f"class {i}" for i in range(11)]) == [0, 1, 10, 2]
    assert match_names(["0", "1"], ["1", "0"]) == [1, 0]  # the names of MNIST
    with pytest.raises(ValueError, match="'2' of the data is no position among 2 names"):
        match_names(["0", "2"], ["cat", "dog"])
    with pytest.raises(ValueError, match="matches the data's '1'"):
        match_names(["cat", "1"], ["cat", "dog"])


def test_what_matches_nothing_is_named_with_what_is_near():
    with pytest.raises(
        ValueError, match=r"among the 6 of the task matches the data's 'aply eye makeup' \(nearest: 'app"
    ):
        match_names(["aply eye makeup"], NAMES)
    many = [f"unheard of {i}" for i in range(8)]
    with pytest.raises(ValueError, match="'unheard of 4' and 3 more"):
        match_names(many, NAMES)
    assert nearest("stanford cars", ["stanford_cars", "dtd"]) == ["stanford_cars"] and nearest("zzz", ["dtd"]) == []
    assert did_you_mean("carr", ["cat", "car"]) == "did you mean 'car' or 'cat'?"
    assert did_you_mean("zzz", {"cat": 1, "car": 2}) == "there are cat, car."


def test_files_of_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("# birds\ncrane bird\tcrane\n\nconstruction crane\tcrane2\tderrick\n", encoding="utf-8")
    names, aliases = read_class_file(path)
    assert names == ("crane bird", "construction crane")
    assert aliases == {"crane": "crane bird", "crane2": "construction crane", "derrick": "construction crane"}
    path.write_text("crane bird\tcrane\nconstruction crane\tcrane\n")
    with pytest.raises(ValueError, match="'crane' stands beside 'crane bird' and 'construction crane'"):
        read_class_file(path)
    path.write_text("\n# nothing\n")
    with pytest.raises(ValueError, match="there is no class name"):
        read_class_file(path)
