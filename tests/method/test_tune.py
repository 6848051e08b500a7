"""Few-shot tuning: what is learnt, what stays, and that the product is an ordinary adapter."""

import copy
import json

import datasets
import pytest
import tiny_models
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method import tune as tuning
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.saved import load_teacher
from hf_transmiter.method.teacher import teacher_class_vectors
from hf_transmiter.method.tune import adapter_settings, tune
from hf_transmiter.sandbox import load_dataset, model_path
from hf_transmiter.settings import METHODS, TuningConfig, split_tuning
from hf_transmiter.training import batches
from hf_transmiter.tuners import CoOpConfig, TransMiterConfig, inject, save_adapter


NAMES = ["cat", "dog", "car"]
BOTH = ("lora", "coop")
MOVE_IMAGES = ("lora", "ivlp", "maple", "promptsrc")
ADAMW = {"optimizer": "adamw", "schedule": "cosine", "warmup": 0.05, "weight_decay": 1e-3}


def quick(method="lora", **kwargs):
    defaults = {"shots": 4, "epochs": 6, "batch_size": 6, "lr": 1e-2, **ADAMW}
    return split_tuning({**defaults, "method": method, **kwargs})


@pytest.fixture
def run(tmp_path):
    def run(weak, dataset, how, **kwargs):
        tuned = tune(weak, dataset, **how, progress=False, cache_dir=tmp_path / "features", **kwargs)
        assert tuned.anchors.templates == templates(how["adapter"]["method"])
        return tuned.encoder

    return run


def templates(method):
    return ("a photo of a {}.",) if method == "lora" else ("{}.",)


def scores(encoder, dataset, method, cache_dir):
    """Logits of a tuned (or, with method "lora", of the weak) model, and the labels."""
    table = embed_dataset(encoder, dataset, progress=False, cache_dir=cache_dir)
    return AnchorClassifier(encoder, Anchors(tuple(NAMES), (), templates(method))).classify(table.embeds), table.labels


@pytest.mark.parametrize("method", METHODS)
def test_learns_and_leaves_the_weak_model_alone(encoder, make_dataset, run, tmp_path, method):
    dataset = make_dataset(30)
    before, fingerprint = copy.deepcopy(encoder.model.state_dict()), encoder.fingerprint
    tuned = run(encoder, dataset, quick(method, shots=10, epochs=20, keep_near=0.0, augment=None))
    assert encoder.fingerprint == fingerprint and not encoder.model.text_model._forward_pre_hooks
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.model.state_dict().items())
    assert not any(p.requires_grad for p in tuned.model.parameters()) and not tuned.model.training
    losses = []
    for model, name in ((encoder, "lora"), (tuned, method)):
        z, labels = scores(model, dataset, name, tmp_path)
        losses.append(torch.nn.functional.cross_entropy(z, labels).item())
    assert losses[1] < 0.7 * losses[0]
    kept = {key.replace(".base_layer", ""): value for key, value in tuned.model.state_dict().items()}
    assert all(torch.equal(kept[key], value) for key, value in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_on_its_own_side(encoder, make_dataset, run, make_images, method):
    images, dataset = make_images(3), make_dataset(12)
    tuned = run(encoder, dataset, quick(method, epochs=3))
    same_images = torch.allclose(tuned.embed_images(images), encoder.embed_images(images), atol=1e-4)
    assert same_images == (method not in MOVE_IMAGES)
    names = tuned.embed_names(NAMES, templates(method))
    assert torch.allclose(names, encoder.embed_names(NAMES), atol=1e-4) == (method == "lora")
    # A prompt's class vectors belong to the weak model's own embeddings, unless each image has its own.
    vectors = teacher_class_vectors(tuned, encoder, NAMES, templates(method))
    assert (vectors is None) == (method in (*MOVE_IMAGES, "cocoop"))


def test_settings_left_open_are_the_published_ones():
    def shown(method, *fields, **kwargs):
        config = TuningConfig(**kwargs).of(method)
        return tuple(getattr(config, field) for field in fields)

    recipe = ("optimizer", "schedule", "lr", "weight_decay", "batch_size", "epochs")
    assert shown("coop", *recipe) == ("sgd", "epochs", 2e-3, 5e-4, 32, 200)
    assert [shown("coop", "epochs", shots=shots)[0] for shots in (1, 2, 4, 8)] == [50, 100, 100, 200]
    assert shown("kgcoop", *recipe, "pull", "keep_near") == ("sgd", "epochs", 2e-3, 5e-4, 128, 100, "cosine", 8.0)
    assert shown("prograd", "batch_size", "pull", "keep_near") == (32, "kl", 1.0)
    assert shown("cocoop", *recipe) == ("sgd", "epochs", 2e-3, 5e-4, 1, 10)
    assert shown("ivlp", *recipe, "augment") == ("sgd", "epochs", 2.5e-3, 5e-4, 4, 20, "crop")
    assert shown("maple", *recipe) == ("sgd", "epochs", 3.5e-3, 5e-4, 4, 5)
    assert shown("promptsrc", *recipe, "pull") == ("sgd", "epochs", 2.5e-3, 5e-4, 4, 20, "promptsrc")
    assert shown("promptsrc", "gaussian_mean", "gaussian_std") == (15, 1)
    assert shown("coop", "keep_near", "gaussian_mean", "augment") == (0.0, None, "none")
    assert shown("lora", *recipe, "keep_near") == ("adamw", "cosine", 2e-4, 1e-3, 64, 20, 0.1)
    assert shown("coop", "lr", "epochs", lr=0.1, epochs=3) == (0.1, 3)
    assert shown("prograd", "project") == (True,) and shown("coop", "project") == (False,)
    assert shown("loha", *recipe) == shown("lora", *recipe)
    assert shown("lora", "schedule", "warmup", schedule="epochs") == ("epochs", 0.0)
    for method, config in (("promptsrc", TuningConfig(shots=2)), ("lora", TuningConfig(schedule="epochs"))):
        assert config.of(method).of(method) == config.of(method)  # a saved model is tuned again as it was
    assert TuningConfig(shots=2).epochs is None


def test_depths_follow_the_towers(encoder, make_dataset, run):
    for method, fields in (("ivlp", ("text_depth", "vision_depth")), ("maple", ("depth",))):
        adapter = run(encoder, make_dataset(6), quick(method, epochs=1, shots=2)).model.peft_config["default"]
        assert all(getattr(adapter, field) == 2 for field in fields)
    shallow = quick("ivlp", epochs=1, shots=2, vision_depth=0)
    tuned = run(encoder, make_dataset(6), shallow)
    assert tuned.model.peft_config["default"].vision_depth == 0
    assert teacher_class_vectors(tuned, encoder, NAMES, ("{}.",)) is not None


def test_an_adapter_by_name_by_options_and_as_a_configuration(encoder, make_dataset, run):
    config = TuningConfig(shots=2, epochs=1)

    def found(adapter):
        return tune(encoder, make_dataset(12), adapter, config=config, progress=False)

    several = [{"method": "coop", "position": "middle", "class_specific": True}]
    several += [CoOpConfig(init_phrase="a photo of a", position="middle", class_specific=True, class_names=NAMES)]
    first, second = map(found, several)
    adapter = first.encoder.model.peft_config["default"]
    assert (adapter.position, adapter.class_specific, adapter.n_ctx) == ("middle", True, 4)
    assert torch.equal(first.text_embeds, second.text_embeds)
    assert first.facts.settings == second.facts.settings
    # What is saved makes the same again, and so does a configuration that differs from the method's usual one.
    for adapter in ("coop", CoOpConfig(n_ctx=3), LoraConfig(r=2, target_modules=["q_proj"]), "loha"):
        tuned = found(adapter)
        again = found(split_tuning(json.loads(json.dumps(tuned.facts.settings)))["adapter"])
        assert torch.equal(tuned.text_embeds, again.text_embeds) and tuned.facts.settings == again.facts.settings
    assert adapter_settings(CoOpConfig(n_ctx=3)) == {"method": "coop", "n_ctx": 3, "init_phrase": None}
    assert adapter_settings("lora") == adapter_settings({}) == {"method": "lora", "r": 8, "lora_alpha": 16}
    lora = adapter_settings(LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "q_proj"]))
    assert lora == {
        "method": "lora", "r": 2, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip


def test_an_adapter_is_told_apart_from_another_one(encoder, make_dataset, tmp_path, caplog):
    """By the checkpoint of an interrupted run, and whatever its method's case, classes and tokens are."""
    data, config = make_dataset(12), TuningConfig(shots=2, epochs=2)
    checkpoint, calls = tmp_path / "run.safetensors", []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:  # the second epoch
            raise KeyboardInterrupt
        return losses(*args)

    losses = tuning.losses
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuning, "losses", stop)
        tune(encoder, data, "coop", config=config, checkpoint=checkpoint, progress=False)
    front = {"method": "coop", "position": "front"}
    tune(encoder, data, front, config=config, checkpoint=checkpoint, progress=False)
    assert "is of another run (other adapter): training begins anew" in caplog.text and not checkpoint.exists()
    assert adapter_settings("CoOp") == adapter_settings({"method": "COOP"}) == adapter_settings("coop")
    assert adapter_settings({"target_modules": {"v_proj", "q_proj"}})["target_modules"] == ["q_proj", "v_proj"]
    learnt = CoOpConfig(init_phrase="a photo of a", init_token_ids=[1, 2, 3, 4], class_names=["moon", "sun"])
    assert adapter_settings(learnt) == {"method": "coop", "n_ctx": 4, "init_phrase": "a photo of a"}
    adapter = tune(encoder, data, learnt, config=config, progress=False).encoder.model.peft_config["default"]
    assert adapter.class_names == NAMES
    with pytest.raises(ValueError, match="options of an adapter are saved as JSON"):
        adapter_settings({"rank_pattern": {"q_proj": torch.tensor(4)}})


def test_dropout_is_for_training(encoder, make_dataset, make_images):
    config, adapter = TuningConfig(shots=4, epochs=2, lr=1e-2), LoraConfig(r=2, lora_dropout=0.5)
    tuned = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        tuned.append(tune(encoder, make_dataset(12), adapter, config=config, progress=False).encoder)
    pixels = encoder.preprocess(make_images(3))
    said = [model.model.get_image_features(pixel_values=pixels).pooler_output for model in (*tuned, tuned[0])]
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
    plain = tune(encoder, make_dataset(12), LoraConfig(r=2), config=config, progress=False).encoder
    assert not torch.equal(plain.embed_pixels(pixels), tuned[0].embed_pixels(pixels))


def test_adapters_that_cannot_be_tuned(encoder, make_dataset):
    for adapter, said in (
        (
            "tipadapter",
            "must be one of lora, coop, .*, or another of PEFT that changes layers, got 'tipadapter'",
        ),
        ("prefix_tuning", "method must be one of .* got 'prefix_tuning'"),
        (TransMiterConfig(class_names=NAMES), "method must be one of .* got 'transmiter'"),
        ({"method": "coop", "depth": 3}, "neither CoOpConfig nor TuningConfig has an option 'depth'"),
        ({"method": "coop", "rank": 4}, "neither CoOpConfig nor TuningConfig has an option 'rank'"),
        ({"method": "coop", "epochs": 4}, r"epochs is how to train, not what: pass config=TuningConfig\(epochs="),
        ({"n_ctx": 8}, "neither LoraConfig nor TuningConfig has an option 'n_ctx'"),
    ):
        with pytest.raises(ValueError, match=said):
            tune(encoder, make_dataset(6), adapter, progress=False)
    with pytest.raises(TypeError, match="a method, a mapping or a PeftConfig, not a int"):
        tune(encoder, make_dataset(6), 8, progress=False)


@pytest.mark.parametrize("towers", ["text", "both"])
@pytest.mark.parametrize("several", [False, True])
def test_lora_in_the_text_tower(encoder, make_dataset, tmp_path, towers, several):
    """What people write for language models, `target_modules=["q_proj", "v_proj"]`, reaches both towers."""
    modules = ["q_proj", "v_proj"] if towers == "both" else r"text_model\..*(q_proj|v_proj)"
    config = TuningConfig(shots=10, epochs=20, lr=1e-2, batch_size=6, keep_near=0.0)
    templates = ("a photo of a {}.", "a drawing of a {}.")[: 1 + several]
    options = {"templates": templates, "progress": False, "cache_dir": tmp_path / "features"}
    adapter, data = LoraConfig(r=4, target_modules=modules), make_dataset(30)
    tuned = tune(encoder, data, adapter, config=config, **options)
    layers = [name for name, module in tuned.encoder.model.named_modules() if isinstance(module, LoraLayer)]
    assert {name.split("_")[0] for name in layers} == ({"text", "vision"} if towers == "both" else {"text"})
    pixels = encoder.preprocess(data["image"])
    moved = not torch.equal(tuned.encoder.embed_pixels(pixels), encoder.embed_pixels(pixels))
    assert moved == (towers == "both") and tuned.anchors.templates == templates
    assert tuned.facts.settings["augment"] == ("shift" if moved else "none")
    assert not torch.allclose(tuned.text_embeds, encoder.embed_names(NAMES, templates), atol=1e-2)
    losses = []
    for classifier in (AnchorClassifier(encoder, Anchors(tuple(NAMES), (), templates)), tuned):
        z = classifier.classify(classifier.encoder.embed_pixels(pixels))
        losses.append(torch.nn.functional.cross_entropy(z, torch.tensor(data["label"])).item())
    assert losses[1] < 0.7 * losses[0]
    tuned.save_pretrained(tmp_path / "tuned")
    loaded = load_teacher(str(tmp_path / "tuned"), encoder)
    assert torch.allclose(loaded.text_embeds, tuned.text_embeds, atol=1e-5)
    # What the text tower learnt is class vectors, which are carried over without an image.
    assert (teacher_class_vectors(loaded, encoder, NAMES, templates) is None) == (towers == "both")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "lora"])
def test_the_saved_adapter_knows_its_classes(encoder, make_dataset, run, tmp_path, make_images, method):
    dataset = make_dataset(12)
    tuned = run(encoder, dataset, quick(method, epochs=1))
    save_adapter(tuned.model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder.name_or_path), str(tmp_path / "adapter"))
    pixels = encoder.preprocess(make_images(3))
    expected = AnchorClassifier(tuned, Anchors(tuple(NAMES), (), ("{}.",)))(pixels).logits_per_image
    assert torch.allclose(loaded(pixel_values=pixels).logits_per_image, expected, atol=1e-4)
    facts = loaded.peft_config["default"].provenance
    assert facts["num_images"] == 12 and facts["settings"]["method"] == method
    assert facts["dataset_fingerprint"] == dataset._fingerprint


def test_many_classes_in_parts(encoder, make_dataset, run):
    whole, parts = (
        run(encoder, make_dataset(12), quick("contcoop", text_batch_size=size)).embed_names(NAMES, ("{}.",))
        for size in (256, 2)
    )
    assert torch.allclose(whole, parts, atol=1e-5)


def test_embedded_once_or_in_every_step(encoder, make_dataset, run, monkeypatch):
    cached = run(encoder, make_dataset(12), quick("coop")).embed_names(NAMES, ("{}.",))
    monkeypatch.setattr(tuning, "_moves_images", lambda tuned: True)
    again = run(encoder, make_dataset(12), quick("coop")).embed_names(NAMES, ("{}.",))
    assert torch.allclose(cached, again, atol=1e-5)


def test_augmented_views(encoder, make_dataset, run, monkeypatch):
    seen, embed = [], DualEncoder.embed_pixels

    def counting(self, pixels):
        seen.append(len(pixels))
        return embed(self, pixels)

    outcomes = {}
    for views in (0, 3):
        config = quick("coop", augment="shift", views=views)
        run(encoder, make_dataset(12), config)  # embeds the pictures as they are, once for all
        monkeypatch.setattr(DualEncoder, "embed_pixels", counting)
        outcomes[views] = run(encoder, make_dataset(12), config).embed_names(NAMES, ("{}.",))
        monkeypatch.setattr(DualEncoder, "embed_pixels", embed)
        assert sum(seen) == (3 * 12 if views else 6 * 12)
        seen.clear()
    assert not torch.allclose(outcomes[0], outcomes[3], atol=1e-6)


def test_bfloat16_towers(encoder, make_dataset, run, tmp_path):
    dataset = make_dataset(30)
    losses = []
    for method in ("coop", "maple"):
        config = quick(method, shots=10, epochs=10, keep_near=0.0, precision="bfloat16")
        tuned = run(encoder, dataset, config)
        assert {p.dtype for p in tuned.model.parameters()} == {torch.float32}
        z, labels = scores(tuned, dataset, method, tmp_path)
        losses.append(torch.nn.functional.cross_entropy(z, labels).item())
    z, labels = scores(encoder, dataset, "lora", tmp_path)
    assert max(losses) < 0.8 * torch.nn.functional.cross_entropy(z, labels).item()


@pytest.mark.parametrize("method", METHODS)
def test_saved_as_any_adapter(encoder, make_dataset, run, tmp_path, make_images, method):
    tuned = run(encoder, make_dataset(12), quick(method))
    save_adapter(tuned.model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder.name_or_path), str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].base_model_name_or_path == encoder.name_or_path
    loaded = DualEncoder(loaded)
    assert torch.equal(loaded.embed_images(make_images(3)), tuned.embed_images(make_images(3)))
    assert torch.equal(loaded.embed_names(NAMES, ("{}.",)), tuned.embed_names(NAMES, ("{}.",)))


@pytest.mark.parametrize("method", BOTH)
def test_the_seed_decides(encoder, make_dataset, run, make_images, method):
    dataset, images = make_dataset(30), make_images(3)
    own = {"init_phrase": None, "n_ctx": 4} if method == "coop" else {}

    def outcome(seed):
        tuned = run(encoder, dataset, quick(method, seed=seed, **own))
        return torch.cat([tuned.embed_images(images), tuned.embed_names(NAMES, ("{}.",))])

    first = outcome(1)
    torch.manual_seed(123)
    assert torch.equal(outcome(1), first)
    assert not torch.allclose(outcome(2), first, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "coop", "prograd", "promptsrc"])
def test_interrupted_run_resumes(encoder, make_dataset, run, tmp_path, make_images, monkeypatch, method):
    dataset, images = make_dataset(12), make_images(3)
    whole = run(encoder, dataset, quick(method))
    loss, calls = tuning.losses, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(tuning, "losses", interrupted)
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(encoder, dataset, quick(method), checkpoint=checkpoint)
    calls.clear()
    calls.extend([None] * 8)  # past the interruption
    resumed = run(encoder, dataset, quick(method), checkpoint=checkpoint)
    assert len(calls) - 8 == 2 * (6 - 3) and not checkpoint.exists()
    assert torch.equal(resumed.embed_images(images), whole.embed_images(images))
    assert torch.equal(resumed.embed_names(NAMES, ("{}.",)), whole.embed_names(NAMES, ("{}.",)))


def test_pixels_that_do_not_fit_in_memory(encoder, make_dataset, run, make_images, monkeypatch):
    dataset = make_dataset(12)
    kept = run(encoder, dataset, quick()).embed_images(make_images(3))
    monkeypatch.setattr(batches, "PIXEL_MEMORY", 0)
    assert torch.equal(run(encoder, dataset, quick()).embed_images(make_images(3)), kept)


@pytest.mark.parametrize("method", BOTH)
def test_keep_near(encoder, make_dataset, run, tmp_path, method):
    dataset = make_dataset(12)
    zero_shot = scores(encoder, dataset, "lora", tmp_path)[0].log_softmax(1)
    moved = []
    for strength in (0.0, 10.0, 1000.0):
        z, _ = scores(run(encoder, dataset, quick(method, keep_near=strength)), dataset, method, tmp_path)
        moved.append((zero_shot.exp() * (zero_shot - z.log_softmax(1))).sum(1).mean().item())
    assert moved[0] > 1.5 * moved[1] > 2 * moved[2], moved


def test_shots(encoder, make_dataset, run, monkeypatch, caplog):
    seen = []
    fit = tuning.fit

    def recording(parameters, step, num_examples, *args, **kwargs):
        seen.append(num_examples)
        return fit(parameters, step, num_examples, *args, **kwargs)

    monkeypatch.setattr(tuning, "fit", recording)
    run(encoder, make_dataset(30), quick(shots=2, epochs=1))
    assert not caplog.records
    run(encoder, make_dataset(11), quick(shots=4, epochs=1))
    assert seen == [6, 11]
    assert "1 classes have fewer than 4 images" in caplog.text


def _in_two_processes(folder, dataset, how, out):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    weak = DualEncoder.from_pretrained(folder)
    options = {"accelerator": accelerator, "progress": False, "cache_dir": out / "features"}
    tuned = tune(weak, dataset, **how, **options).encoder
    assert accelerator.num_processes == 2
    texts = tuned.embed_names(NAMES, ("{}.",))
    save_file({"texts": texts}, out / f"{accelerator.process_index}.safetensors")


@pytest.mark.parametrize("method", ["coop", "prograd", "contcoop"])
def test_two_processes_tune_one_model(encoder, make_dataset, run, tmp_path, method):
    """With augmentation: what happens to a picture does not depend on who works on it."""
    dataset, config = make_dataset(12), quick(method, augment="shift" if method == "coop" else None)
    expected = run(encoder, dataset, config).embed_names(NAMES, ("{}.",))
    out = tmp_path / "two"
    out.mkdir()
    # This process may already count as a single one; the two must not inherit that.
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=(encoder.name_or_path, dataset, config, out), num_processes=2)
    for process in range(2):
        texts = load_file(out / f"{process}.safetensors")["texts"]
        assert torch.allclose(texts, expected, atol=1e-3)


@pytest.mark.parametrize("family", [family for family in tiny_models.FAMILIES if family != "align"])
def test_lora_reaches_every_block_of_every_vision_transformer(model_dir, make_dataset, run, family):
    encoder = DualEncoder.from_pretrained(model_dir(family))
    tuned = run(encoder, make_dataset(6), quick(epochs=1, shots=2))
    layers = [(name, m) for name, m in tuned.model.named_modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 12 and all("layers" in name and "vision_model" in name for name, _ in layers)
    assert all(layer.lora_B["default"].weight.abs().sum() > 0 for _, layer in layers)


@pytest.mark.parametrize("family", ["siglip", "altclip"])
def test_coop_of_other_families(model_dir, make_dataset, run, family):
    encoder = DualEncoder.from_pretrained(model_dir(family))
    tuned = run(encoder, make_dataset(6), quick("coop", epochs=1, shots=2))
    assert not torch.allclose(tuned.embed_names(NAMES, ("{}.",)), encoder.embed_names(NAMES), atol=1e-4)


def test_names_may_be_given(encoder, make_dataset, run):
    dataset = make_dataset(12).cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match="does not name its classes: pass class_names"):
        run(encoder, dataset, quick())
    tuned = run(encoder, dataset, quick("coop"), class_names=NAMES)
    named = run(encoder, make_dataset(12), quick("coop"))
    assert torch.equal(tuned.embed_names(NAMES, ("{}.",)), named.embed_names(NAMES, ("{}.",)))


def test_bad_input(encoder, make_dataset, run, tmp_path):
    dataset = make_dataset(12)
    for bad in ({"keep_near": -1.0}, {"pull": "l3"}, {"precision": "float16"}):
        with pytest.raises(ValueError, match="must"):
            TuningConfig(**bad)
    for bad, said in (
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": -1e-3}, "lr must be above 0, got -0.001"),
    ):
        with pytest.raises(ValueError, match=said):
            TuningConfig(**bad)
    for bad, said in (
        ({"views": 2, "augment": "none"}, "without augmentation there are no views"),
        ({"schedule": "epochs", "warmup": 0.1}, "schedule 'epochs' does not read warmup"),
        ({"gaussian_mean": 2.0}, "gaussian_mean and gaussian_std must both be given"),
        ({"method": "coop", "project": True}, "project follows the pull, which has no weight"),
        ({"views": 2}, "here the image tower is tuned: leave views out"),
    ):
        with pytest.raises(ValueError, match=said):
            run(encoder, dataset, quick(**bad))
    with pytest.raises(ValueError, match="one split of a dataset, not a DatasetDict"):
        run(encoder, datasets.DatasetDict(train=dataset), quick())
    for bare, how in (
        (dataset.remove_columns("label"), "of folders, one per class and at least two"),
        (dataset.rename_column("label", "kind").cast_column("kind", datasets.Value("int64")), "one of kind"),
    ):
        with pytest.raises(ValueError, match=rf"tuning needs labels: .*{how}\.$"):
            run(encoder, bare, quick())
    with pytest.raises(ValueError, match="1 of 4 classes have no image, first 'tree'"):
        run(encoder, dataset, quick(), class_names=[*NAMES, "tree"])
    with pytest.raises(
        ValueError, match=r"the dataset's class 'car' is not among the classifier's names \(cat, dog\)"
    ):
        run(encoder, dataset, quick(), class_names=NAMES[:2])
    with pytest.raises(ValueError, match="must differ"):
        run(encoder, dataset, quick(), class_names=["cat", "cat", "dog"])
    words = dataset.remove_columns("label").add_column("label", ["cat"] * 12)
    with pytest.raises(ValueError, match="holds 'cat', not class indices"):
        run(encoder, words, quick(), class_names=NAMES)
    with pytest.raises(ValueError, match=r"'the old big red car and ship and tree\.' has 16 tokens.* room for 12"):
        long = ["cat", "the_old_big_red_car_and_ship_and_tree", "dog"]
        run(encoder, dataset.cast_column("label", datasets.Value("int64")), quick("coop"), class_names=long)
    inject(encoder.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters already"):
        run(encoder, dataset, quick())


@pytest.mark.parametrize("method, domain, lift", [("lora", "print", 20), ("coop", "jargon", 10)])
def test_sandbox_task(run, tmp_path, method, domain, lift):
    weak = DualEncoder.from_pretrained(model_path("weak"))
    # Another seed's validation split is a small pool to draw from, quicker to render than the training split.
    pool, validation, hits = load_dataset(domain, "validation", seed=1), load_dataset(domain, "validation"), []
    tuned = run(weak, pool, quick(method, batch_size=64, keep_near=0.1))
    names = validation.features["label"].names
    for encoder, prompts in ((weak, templates("lora")), (tuned, templates(method))):
        table = embed_dataset(encoder, validation, progress=False, cache_dir=tmp_path)
        z = encoder.logits(table.embeds, encoder.embed_names(names, prompts))
        hits.append(100 * (z.argmax(1) == table.labels).float().mean().item())
    assert hits[1] > hits[0] + lift, hits
