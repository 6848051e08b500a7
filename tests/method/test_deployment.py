"""Models in use: by several threads, under `Trainer`, exported."""

import copy
import doctest
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_transmiter import AnchorClassifier, Anchors, DualEncoder, TransMiterForImageClassification
from hf_transmiter.tuners import CoCoOpConfig, ContCoOpConfig, CoOpConfig, IVLPConfig, TransMiterConfig, prompts


NAMES = ("cat", "dog", "car")
FORMS = {
    "mlp": {"form": "mlp", "auxiliary_names": ["tree", "ship"]},
    "words": {"form": "linear"},
    "pictures": {"form": "linear", "image_side": 16},
    "tower": {"form": "linear", "image_side": 48, "text_side": 64},
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def adapted(encoder):
    """``adapted(form)``: a classifier with an adapter that answers unlike its model."""

    def make(form):
        config = TransMiterConfig(class_names=list(NAMES), **FORMS[form])
        classifier = AnchorClassifier(encoder, Anchors(NAMES)).add_adapter(config)
        generator = torch.Generator().manual_seed(0)
        for part, tensor in classifier.transmiter.tensors("default").items():
            if part not in ("anchors", "basis"):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        return classifier

    return make


def same(left, right):
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


# Threads


def together(jobs, count=4):
    """What each of several threads gets of all the jobs, each of which begins with another one."""

    def work(first):
        order = [(first + i) % len(jobs) for i in range(len(jobs))]
        found = {i: jobs[i]() for i in order}
        return [found[i] for i in range(len(jobs))]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def check(jobs):
    expected = [job() for job in jobs]
    for found in together(jobs):
        for left, right in zip(found, expected, strict=True):
            if isinstance(right, list):
                assert [[one["label"] for one in row] for row in left] == [[o["label"] for o in row] for row in right]
                left, right = ([one["score"] for row in rows for one in row] for rows in (left, right))
                assert left == pytest.approx(right, abs=1e-5)
            else:
                same(left, right)


@forms
def test_classifiers(form, adapted, make_images, restless):
    classifier = adapted(form)
    classifier_of_images = TransMiterForImageClassification.from_classifier(classifier)
    open_names = classifier.open_vocabulary
    jobs = []
    for i in range(4):
        images, pixels = make_images(1 + i, seed=i), classifier.encoder.preprocess(make_images(1 + i, seed=i))
        names = [NAMES[1:], NAMES[::-1], NAMES, ("ship", "cat") if open_names else NAMES[:2]][i]
        jobs.append(lambda images=images, names=names: classifier.predict(images, top_k=2, class_names=names))
        jobs.append(lambda images=images: classifier.predict(images, top_k=3, batch_size=2))
        jobs.append(lambda pixels=pixels: classifier_of_images(pixels).logits)
    check(jobs)


@pytest.mark.parametrize(
    "config",
    [
        None,
        CoOpConfig(n_ctx=2),
        CoCoOpConfig(n_ctx=4),
        ContCoOpConfig(n_ctx=4),
        IVLPConfig(text_depth=2, vision_depth=2),
    ],
    ids=lambda config: "zero-shot" if config is None else config.peft_type.value,
)
def test_encoders(config, encoder, make_images, restless):
    """Embeddings, and zero-shot answers about other names in each thread; also where the model trains."""
    if config is not None:
        encoder = DualEncoder(get_peft_model(encoder.model, copy.deepcopy(config)), encoder.processor)
    lora_dropout = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    if config is None:
        encoder = DualEncoder(get_peft_model(encoder.model, lora_dropout).train(), encoder.processor)
    jobs, classifier = [], AnchorClassifier(encoder, Anchors(NAMES, (), ("{}.",)))
    for i in range(4):
        images, texts = make_images(1 + i, seed=i), [f"{name}." for name in NAMES[: 1 + i % 3]]
        names = [("cat", "ship"), NAMES, ("a small tree",), NAMES[::-1]][i]
        jobs.append(lambda images=images: encoder.embed_images(images, batch_size=2))
        jobs.append(lambda texts=texts: encoder.embed_texts(texts))
        jobs.append(lambda images=images, names=names: classifier.predict(images, class_names=names))
    check(jobs)
    if config is None:
        assert all(module.training for module in encoder.model.modules())  # as it was


# Trainer


def rows(encoder, dataset):
    pixels = encoder.preprocess(dataset["image"])
    return [{"pixel_values": one, "labels": label} for one, label in zip(pixels, dataset["label"], strict=True)]


def arguments(folder, **options):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), save_strategy="epoch", **{**settings, **quiet, **options})


def accuracy(answers):
    return {"accuracy": float((answers.predictions.argmax(1) == answers.label_ids).mean())}


@forms
def test_trainer_on_a_classifier_as_loaded(form, adapted, make_dataset, tmp_path):
    classifier = adapted(form)
    classifier.save_pretrained(tmp_path / "adapter")
    examples = rows(classifier.encoder, make_dataset())
    model = TransMiterForImageClassification.from_pretrained(tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted and all(name.startswith("transmiter.") and "anchors" not in name for name in wanted)
    data = {"train_dataset": examples, "eval_dataset": examples, "compute_metrics": accuracy}
    trainer = Trainer(model, arguments(tmp_path / "run"), **data)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == wanted
    assert last["eval_loss"] != first["eval_loss"] and 0 <= last["eval_accuracy"] <= 1
    if form != "mlp":
        assert last["eval_loss"] < first["eval_loss"]
    trainer.save_model(str(tmp_path / "classifier"))
    loaded = TransMiterForImageClassification.from_pretrained(tmp_path / "classifier")
    pixels = torch.stack([one["pixel_values"] for one in examples])
    same(loaded(pixels).logits, model.eval()(pixels).logits)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == wanted
    # From a checkpoint, with the gradients of two half batches: the same model.
    again = TransMiterForImageClassification.from_pretrained(tmp_path / "adapter")
    settings = arguments(tmp_path / "halves", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    Trainer(again, settings, **data).train()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=2e-2, rtol=2e-2)
    checkpoint = sorted((tmp_path / "run").glob("checkpoint-*"))[0]
    third = Trainer(TransMiterForImageClassification.from_pretrained(tmp_path / "adapter"), trainer.args, **data)
    third.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in third.model.state_dict().items():
        same(tensor, model.state_dict()[name])


def recipe(text, first, **names):
    """Runs the examples of a docstring from that with the words `first` on; the names there are afterwards."""
    examples = [example.source for example in doctest.DocTestParser().get_examples(text)]
    start = next(i for i, source in enumerate(examples) if first in source)
    names |= {"torch": torch, "Trainer": Trainer, "TrainingArguments": TrainingArguments}
    for source in examples[start:]:
        exec(source, names)
    return names


def test_the_recipe_of_the_classifier(adapted, make_dataset, tmp_path, monkeypatch):
    adapted("pictures").save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    model = TransMiterForImageClassification.from_pretrained("adapter")
    text = TransMiterForImageClassification.__doc__
    made = recipe(text, "def prepare", model=model, labelled=make_dataset())
    found = TransMiterForImageClassification.from_pretrained("classifier")
    batch = made["prepare"](make_dataset()[:2])
    same(found(batch["pixel_values"]).logits, model.eval()(batch["pixel_values"]).logits)


def test_the_recipe_of_prompts(encoder, make_dataset, tmp_path, monkeypatch):
    def prepare(batch):
        return {"pixel_values": encoder.preprocess(batch["image"]), "labels": batch["label"]}

    monkeypatch.chdir(tmp_path)
    names = {"clip": encoder.model, "labelled": make_dataset(), "prepare": prepare}
    recipe(prompts.__doc__, "class PromptTrainer", get_peft_model=get_peft_model, CoOpConfig=CoOpConfig, **names)
    assert (tmp_path / "my-prompt" / "adapter_model.safetensors").is_file()


PromptTrainer = recipe(prompts.__doc__.split(">>> model")[0], "class PromptTrainer")["PromptTrainer"]


@pytest.mark.parametrize("kind", [CoOpConfig, CoCoOpConfig, ContCoOpConfig, IVLPConfig])
def test_trainer_on_prompts(kind, encoder, model_dir, make_dataset, tmp_path):
    depths = {"text_depth": 2, "vision_depth": 2} if kind is IVLPConfig else {}
    model = get_peft_model(encoder.model, kind(n_ctx=4, class_names=list(NAMES), **depths))
    examples = rows(encoder, make_dataset())
    settings = arguments(tmp_path, remove_unused_columns=False, label_names=["labels"])
    data = {"train_dataset": examples, "eval_dataset": examples, "compute_metrics": accuracy}
    trainer = PromptTrainer(model, settings, **data)
    first = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first["eval_loss"]
    trainer.save_model()
    loaded = PeftModel.from_pretrained(DualEncoder.from_pretrained(model_dir("clip")).model, str(tmp_path))
    pixels = torch.stack([one["pixel_values"] for one in examples])
    same(loaded(pixel_values=pixels).logits_per_image, model.eval()(pixel_values=pixels).logits_per_image)


# Export


@forms
def test_export_of_the_image_classifier(form, adapted, make_images):
    classifier = adapted(form)
    model = TransMiterForImageClassification.from_classifier(classifier)
    pixels = classifier.encoder.preprocess(make_images(5))
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    given = {"pixel_values": pixels[:2]}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    for some in (pixels[:2], pixels, pixels[:1]):
        same(program(pixel_values=some)["logits"], model(some).logits)
