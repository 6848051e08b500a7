"""What a page of the app says, and what the models say themselves."""

from hf_transmiter.panels import TOP_K


def shown(page) -> dict[str, list[tuple[str, str]]]:
    """What the page says: per model, names and percentages."""
    found = {}
    for section in page.query_selector_all("#answers section"):
        rows = section.query_selector_all("li")
        texts = [(row.query_selector(".name").inner_text(), row.query_selector(".share").inner_text()) for row in rows]
        found[section.get_attribute("data-model")] = texts
    return found


def expected(classifiers, picture) -> dict[str, list[tuple[str, str]]]:
    answers = {name: model.predict(picture, top_k=TOP_K)[0] for name, model in classifiers.items()}
    return {name: [(row["label"], f"{100 * row['score']:.1f}%") for row in rows] for name, rows in answers.items()}


def upload(page, path):
    page.set_input_files("input[type=file]", path)


def wait_for(page, answers):
    page.wait_for_function(
        "text => document.querySelector('#answers li .share')?.textContent === text", arg=answers["weak"][0][1]
    )
