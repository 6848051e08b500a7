"""Tests of `hf_transmiter.hub` against a Hub on this machine, over HTTP."""


from hf_transmiter.hub import fetch, push_folder


def test_round_trip(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Hi\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.safetensors").write_bytes(b"x" * 1000)
    info = push_folder(tmp_path, "alice/cats", commit_message="first")
    assert hub.titles("alice/cats") == ["first"]
    hub.new_machine()
    assert fetch("alice/cats", "sub/a.safetensors").read_bytes() == b"x" * 1000
    assert fetch("alice/cats", "none") is None
    push_folder(tmp_path, "alice/cats", commit_message="second")
    assert hub.titles("alice/cats") == ["first"]
