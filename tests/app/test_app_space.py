"""The Space of the README, run as the Hub would run it: its own files and the models' ids, nothing else."""

import re
from pathlib import Path

import demo_folder
from reading import expected, shown, upload, wait_for

import hf_transmiter
from hf_transmiter.cli.app_page import load_models
from hf_transmiter.hub.repo import push_folder
from hf_transmiter.sandbox import load_dataset


README = (Path(hf_transmiter.__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_space_answers_as_the_models_it_was_made_of(hub, serve, page, sources, tmp_path):
    (snippet,) = re.findall(r"^```py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names = {"tuned": "textures-b32", "upgraded": "textures-l14"}
    for name, folder in sources.items():
        assert f'"me/{names[name]}"' in snippet
        push_folder(folder, f"alice/{names[name]}", commit_message="first")
    (tmp_path / "app.py").write_text(snippet.replace("me/", "alice/"))
    served = serve(
        str(tmp_path / "app.py"), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), HF_TOKEN=""
    )
    picture = tmp_path / "picture.png"
    load_dataset(demo_folder.TASK, "test")[3]["image"].save(picture)
    answers = expected(load_models(**sources), picture)
    page.goto(served.url)
    page.wait_for_selector("#upgraded")
    upload(page, picture)
    wait_for(page, answers)
    assert shown(page) == answers and list(answers) == ["weak", "tuned", "strong", "upgraded"]
