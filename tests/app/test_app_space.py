"""The exported Space, run as the Hub would run it: its own files and the models' ids, nothing else."""

import demo_folder
from reading import expected, shown, upload, wait_for

from hf_transmiter.hub import push_folder
from hf_transmiter.panels import demo_sources, load_panels
from hf_transmiter.sandbox import load_dataset
from hf_transmiter.space import GRADIO_VERSION, export_space


def test_a_space_answers_as_the_models_it_was_made_of(hub, serve, page, demo, tmp_path):
    sources, _ = demo_sources(demo)
    for name, folder in sources.items():
        push_folder(folder, f"alice/{name}", commit_message="first")
    space = export_space(tmp_path / "space", {name: f"alice/{name}" for name in sources}, examples="sandbox:print")
    served = serve(
        str(space / "app.py"), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), HF_TOKEN=""
    )
    picture = tmp_path / "picture.png"
    load_dataset(demo_folder.TASK, "test")[3]["image"].save(picture)
    answers = expected({name: panel.classifier for name, panel in load_panels(**sources).items()}, picture)
    page.goto(served.url)
    page.wait_for_selector("#answers .note")
    upload(page, picture)
    wait_for(page, answers)
    assert shown(page) == answers and list(answers) == ["weak", "tuned", "strong", "upgraded"]
    assert "sandbox:weak with alice/teacher" in page.inner_text("#answers")


def test_the_space_runs_the_gradio_that_is_tested():
    import gradio

    assert gradio.__version__ == GRADIO_VERSION
