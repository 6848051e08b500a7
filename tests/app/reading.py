"""What a page of the app says, and what the models say themselves."""

from hf_transmiter.cli.app_page import TITLES, TOP_K


def shown(page) -> dict[str, list[tuple[str, str]]]:
    """What the page says: per model, names and percentages."""
    found = {}
    for name in TITLES:
        rows = page.query_selector_all(f"#{name} .confidence-set")
        parts = ((row.query_selector(".text"), row.query_selector(".confidence")) for row in rows)
        found[name] = [(label.inner_text(), share.inner_text()) for label, share in parts]
    return found


def expected(classifiers, picture) -> dict[str, list[tuple[str, str]]]:
    answers = {name: model.predict(picture, top_k=TOP_K)[0] for name, model in classifiers.items()}
    return {name: [(row["label"], f"{100 * row['score']:.0f}%") for row in rows] for name, rows in answers.items()}


def upload(page, path):
    page.set_input_files("input[type=file]", path)


def wait_for(page, answers):
    """Until the first model's answers are there; of gradio's, whose percentages are whole."""
    texts = [f"{name} {share}" for name, share in answers["weak"]]
    page.wait_for_function(
        """texts => { const rows = [...document.querySelectorAll('#weak .label')].map(
             row => row.querySelector('.text').innerText + ' ' + row.querySelector('.confidence').innerText);
             return rows.join() === texts.join(); }""",
        arg=texts,
    )
