"""Transfer: every way of carrying an adapter over, between models of different families, and what it refuses."""

import copy
import logging
from dataclasses import replace
from importlib import metadata

import pytest
import tiny_models
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.table import FeatureTable
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.method.extract import extract
from hf_transmiter.method.stored_logits import CalibrationPack
from hf_transmiter.method.transfer import interpolate, transfer
from hf_transmiter.settings import ExtractionConfig, TransferConfig
from hf_transmiter.tuners import TransMiterConfig


NAMES = ("cat", "dog", "car")
ANCHORS = Anchors(NAMES, ("tree", "ship", "big tree", "red dog", "old car"))
WORDS = Anchors(
    (), tuple(f"{a} {b}" for a in ("red", "blue", "old", "big") for b in ("cat", "dog", "tree", "ship", "car"))
)
CARRY = TransferConfig(refit=False)


@pytest.fixture(scope="module")
def weak(model_dir):
    return DualEncoder.from_pretrained(model_dir("clip"))


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """Another CLIP, half as wide again."""
    return DualEncoder.from_pretrained(tiny_models.save("clip", tmp_path_factory.mktemp("strong"), seed=1, width=24))


@pytest.fixture(scope="module")
def dataset(make_dataset):
    return make_dataset(110)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"cache_dir": tmp_path_factory.mktemp("features"), "progress": False}


@pytest.fixture(scope="module")
def adapters(weak, dataset, cache):
    """By form: extracted from a teacher that tells the classes apart."""
    table = embed_dataset(weak, dataset, **cache)
    teacher = weak.logits(table.embeds, weak.embed_names(NAMES)) + 4 * torch.nn.functional.one_hot(table.labels, 3)
    gradient = ExtractionConfig(solver="gradient", epochs=5, batch_size=16, lr=5e-3)
    distilled = ExtractionConfig(solver="discriminant")
    return {
        "image": extract(weak, teacher, dataset, config=ExtractionConfig(solver="image_map"), **cache),
        "words": extract(weak, teacher, dataset, config=distilled, **cache),
        "mlp": extract(weak, teacher, dataset, anchors=ANCHORS, config=gradient, **cache),
    }


def tensors(classifier):
    return classifier.transmiter.tensors("default")


def own_vectors(weak, seed=0):
    """An adapter whose class vectors are the teacher's own, as prompt methods give them."""
    change = 0.3 * torch.randn(3, weak.embed_dim, generator=torch.Generator().manual_seed(seed))
    teacher = AnchorClassifier(weak, Anchors(NAMES)).add_adapter(
        TransMiterConfig(class_names=list(NAMES), form="linear")
    )
    tensors(teacher)["class_vectors"].copy_(normalize(weak.embed_names(NAMES) + change, dim=1))
    return extract(weak, teacher)


# From a model to itself


def test_class_vectors_from_a_model_to_itself_stay(weak, adapters, dataset, cache):
    for adapter in (own_vectors(weak), adapters["words"]):
        bridge = Bridge.build(weak, weak, dataset, **cache)
        q = bridge.matrix.double()
        torch.testing.assert_close(q @ q, q, atol=1e-5, rtol=0)  # a projection on what the images span
        text, given = weak.embed_names(NAMES), tensors(adapter)["class_vectors"]
        moved = transfer(adapter, weak, bridge=bridge, config=CARRY)
        centred, mean = (given - bridge.mean_weak) @ bridge.matrix.T, bridge.mean_weak
        delta = normalize(text + (given - text) @ bridge.matrix.T, dim=1)
        full = normalize(mean + centred, dim=1)
        both = adapter.adapter_config.provenance.get("own_class_vectors")
        expected = normalize(full + delta, dim=1) if both else delta
        torch.testing.assert_close(tensors(moved)["class_vectors"], expected, atol=1e-4, rtol=0)
    complete = replace(bridge, matrix=torch.eye(16), scale=1.0)
    moved = transfer(own_vectors(weak), weak, bridge=complete, config=CARRY)
    expected = tensors(own_vectors(weak))["class_vectors"]
    torch.testing.assert_close(tensors(moved)["class_vectors"], expected, atol=1e-5, rtol=0)


def test_a_published_adapter_from_a_model_to_itself_stays(weak, adapters, dataset, cache):
    adapter = adapters["mlp"]
    moved = transfer(adapter, weak, dataset, **cache)
    for key, tensor in tensors(adapter).items():
        torch.testing.assert_close(tensors(moved)[key], tensor, atol=1e-5, rtol=0)
    x = embed_dataset(weak, dataset, **cache).embeds
    torch.testing.assert_close(moved.classify(x), adapter.classify(x), atol=1e-3, rtol=1e-4)


# Every way


def test_with_a_bridge_file_and_no_image(weak, strong, adapters, cache, tmp_path):
    Bridge.build(weak, strong, anchors=WORDS).save(tmp_path / "bridge.safetensors")
    bridge = Bridge.load(tmp_path / "bridge.safetensors")
    adapter = adapters["words"]
    moved = transfer(adapter, strong, bridge=bridge)
    text = [model.embed_names(NAMES) for model in (weak, strong)]
    carried = bridge.carry_class_vectors(tensors(adapter)["class_vectors"], *text)
    torch.testing.assert_close(tensors(moved)["class_vectors"], carried["delta"], atol=1e-5, rtol=0)
    assert moved.encoder is strong and moved.class_names == NAMES and moved.adapter_config.embed_dim == 24
    assert not tensors(moved)["bias"].any()
    facts = moved.adapter_config.provenance
    assert facts["step"] == "transfer" and facts["extracted"] == adapter.adapter_config.provenance
    assert facts["strong"] == {"name": strong.name_or_path, "revision": None, "fingerprint": strong.fingerprint}
    assert facts["bridge"]["source"] == "text" and facts["bridge"]["num_pairs"] == 20 and "refit_on" not in facts


def test_with_a_published_bridge_file(weak, strong, adapters, dataset, cache, tmp_path):
    Bridge.build(weak, strong, dataset, space="logit", anchors=ANCHORS, **cache).save(tmp_path / "bridge")
    bridge = Bridge.load(tmp_path / "bridge")
    by_file = transfer(adapters["mlp"], strong, bridge=bridge)
    by_images = transfer(adapters["mlp"], strong, dataset, **cache)
    torch.testing.assert_close(tensors(by_file)["basis"], tensors(by_images)["basis"], atol=1e-5, rtol=0)
    basis = tensors(by_file)["basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)
    for key in ("norm.weight", "up.weight", "up.bias", "down.weight", "down.bias"):
        assert torch.equal(tensors(by_file)[key], tensors(adapters["mlp"])[key])
    torch.testing.assert_close(tensors(by_file)["anchors"], strong.embed_names(ANCHORS.names))
    # The same bridge carries class vectors, by its anchors.
    moved = transfer(adapters["words"], strong, bridge=bridge)
    texts = [model.embed_names(ANCHORS.names) for model in (weak, strong)]
    text = [t[:3] for t in texts]
    carried = bridge.carry_class_vectors(tensors(adapters["words"])["class_vectors"], *text, texts)
    torch.testing.assert_close(tensors(moved)["class_vectors"], carried["delta"], atol=1e-4, rtol=0)


def test_beta_reaches_the_bridge(strong, adapters, dataset, cache):
    for config, beta in ((TransferConfig(beta=3.0), 3.0), (TransferConfig(beta_per_image=0.5), 55.0)):
        moved = transfer(adapters["mlp"], strong, dataset, config=config, **cache)
        assert moved.adapter_config.provenance["bridge"]["beta"] == pytest.approx(beta)


def test_from_text_alone(weak, strong, monkeypatch):
    monkeypatch.setattr(Anchors, "universal", lambda: WORDS)  # 1,024 names take long
    moved = transfer(own_vectors(weak), strong)
    assert moved.adapter_config.provenance["bridge"]["source"] == "text"
    built = Bridge.build(weak, strong, anchors=WORDS, names=Anchors(NAMES))
    expected = transfer(own_vectors(weak), strong, bridge=built)
    torch.testing.assert_close(tensors(moved)["class_vectors"], tensors(expected)["class_vectors"])


def test_an_image_side_over_a_bridge(weak, strong, adapters):
    """Q A Qᵀ and Q b: the strong embedding is changed as the weak one that it is turned into would be."""
    bridge, adapter = Bridge.build(weak, strong, anchors=WORDS), adapters["image"]
    moved = transfer(adapter, strong, bridge=bridge)
    given, q = tensors(adapter), bridge.matrix
    torch.testing.assert_close(tensors(moved)["image_map"], q @ given["image_map"] @ q.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tensors(moved)["image_shift"], q @ given["image_shift"], atol=1e-5, rtol=1e-4)
    assert set(tensors(moved)) == {"anchors", "image_map", "image_shift"} and moved.open_vocabulary
    facts = moved.adapter_config.provenance
    assert facts["parts"] == "image" and "what pictures look like, and is carried over as it is" in facts["because"]
    with pytest.raises(ValueError, match="an image side lives in embedding space: build the bridge with space="):
        bridge_of_logits = replace(bridge, space="logit", matrix=torch.eye(3))
        transfer(adapter, strong, bridge=bridge_of_logits)


def test_own_class_vectors_travel_whole(weak, strong, dataset, cache):
    """Vectors that the teacher had go by the mean of both transports, distilled ones by their change alone."""
    adapter, bridge = own_vectors(weak), Bridge.build(weak, strong, dataset, **cache)
    moved = transfer(adapter, strong, bridge=bridge)
    text = [model.embed_names(NAMES) for model in (weak, strong)]
    carried = bridge.carry_class_vectors(tensors(adapter)["class_vectors"], *text)
    expected = normalize(carried["full"] + carried["delta"], dim=1)
    torch.testing.assert_close(tensors(moved)["class_vectors"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["image", "words"])
def test_refit_with_the_calibration_pack(weak, strong, adapters, dataset, cache, kind):
    """It runs the strong model on the images, and neither the tuned nor, with a bridge, the weak one."""
    adapter, bridge = adapters[kind], Bridge.build(weak, strong, dataset, **cache)
    plain = transfer(adapter, strong, dataset, bridge=bridge, config=CARRY, **cache)
    fitted = transfer(adapter, strong, dataset, bridge=bridge, **cache)
    facts = fitted.adapter_config.provenance
    assert (
        facts["refit_on"] == 110 and facts["parts"] == "both" and "a text side for the class names" in facts["because"]
    )
    assert facts["held_out_kl"] < facts["held_out_kl_zero_shot"] and 0 <= facts["held_out_agreement"] <= 100
    assert fitted.reads_tower and fitted.open_vocabulary == (kind == "image")
    tables = [embed_dataset(strong, dataset, tower=each.reads_tower, **cache) for each in (plain, fitted)]
    accuracy = [
        float((c.classify(t.embeds).argmax(1) == t.labels).float().mean())
        for c, t in zip((plain, fitted), tables, strict=True)
    ]
    assert accuracy[1] > accuracy[0] and accuracy[1] > 0.9
    told = transfer(adapter, strong, dataset, bridge=bridge, teacher=adapter.calibration, **cache)
    for key, tensor in tensors(fitted).items():
        torch.testing.assert_close(tensors(told)[key], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["image", "words"])
def test_parts_can_be_asked_for(strong, adapters, dataset, cache, kind):
    for parts, found in (("image", {"image_map", "image_shift"}), ("text", {"class_vectors", "bias"})):
        moved = transfer(adapters[kind], strong, dataset, config=TransferConfig(parts=parts), **cache)
        words = {"class_vectors", "bias"} if kind == "words" else set()  # the image side was fitted to these
        assert set(tensors(moved)) == {"anchors", *found, *words}
        assert moved.adapter_config.provenance["parts"] == ("both" if words and parts == "image" else parts)
        if parts == "text":
            assert tensors(moved)["class_vectors"].shape == (3, 24) and not moved.open_vocabulary
    with pytest.raises(ValueError, match="parts must be one of both, image, text, got 'all'"):
        TransferConfig(parts="all")
    with pytest.raises(ValueError, match="a transfer without a refit does not read parts, even: leave"):
        TransferConfig(refit=False, parts="image", even=True)


def test_unseen_classes_get_the_image_side_alone(strong, adapters, dataset, cache):
    moved = transfer(adapters["image"], strong, dataset, seen_classes=NAMES[:2], **cache)
    facts = moved.adapter_config.provenance
    assert facts["parts"] == "image" and "not all classes were seen for a text side" in facts["because"]
    with pytest.raises(ValueError, match="text side would not know the classes .* ask for parts='image'"):
        config = TransferConfig(parts="both")
        transfer(adapters["image"], strong, dataset, seen_classes=NAMES[:2], config=config, **cache)


def test_few_images_are_no_reason_for_a_refit(strong, adapters, dataset, cache):
    few = dataset.select(range(99))
    moved = transfer(adapters["words"], strong, few, **cache)
    assert "refit_on" not in moved.adapter_config.provenance and moved.adapter_config.provenance["parts"] == "text"
    with pytest.raises(ValueError, match="a refit needs at least 100 images, got 99: pass more, or leave it out"):
        transfer(adapters["words"], strong, few, config=TransferConfig(refit=True), **cache)


def test_words_are_not_refitted_to_few_of_the_classes(strong, adapters, dataset, cache, caplog):
    said = 6.0 * torch.nn.functional.one_hot(torch.zeros(110, dtype=torch.long), 3)
    pack = CalibrationPack(said, NAMES, weak_logits=torch.zeros(110, 3))
    with caplog.at_level(logging.WARNING, "hf_transmiter"):
        moved = transfer(adapters["words"], strong, dataset, teacher=pack, **cache)
    facts = moved.adapter_config.provenance
    assert (
        facts["parts"] == "text"
        and not facts["tried"]["even"]
        and "refit_on" not in facts
        and facts["tried"]["coverage"] < 0.5
    )
    assert "hold few of the classes, and a refit would teach nothing about the others" in caplog.text
    config = TransferConfig(parts="image")
    forced = transfer(adapters["words"], strong, dataset, teacher=pack, config=config, **cache)
    assert forced.adapter_config.provenance["refit_on"] == 110
    pictures = transfer(adapters["image"], strong, dataset, teacher=pack, config=config, **cache)
    assert pictures.adapter_config.provenance["parts"] == "image"
    assert "the image side was asked for alone" in pictures.adapter_config.provenance["because"]


def test_what_the_images_are(strong, adapters, dataset, cache, tmp_path):
    adapter = adapters["words"]
    named = transfer(adapter, strong, dataset, dataset_name="me/pets", **cache)
    assert named.adapter_config.provenance["dataset"] == "me/pets"
    assert "dataset" not in transfer(adapter, strong, dataset, **cache).adapter_config.provenance
    bridge = Bridge.build(adapter.encoder, strong, anchors=WORDS)
    assert "dataset" not in transfer(adapter, strong, bridge=bridge, dataset_name="me/pets").adapter_config.provenance
    named.save_pretrained(tmp_path)
    assert "me/pets" in (tmp_path / "README.md").read_text()


def test_other_images_than_the_packs(weak, strong, adapters, make_dataset, cache, caplog):
    """The adapter stands in for its teacher."""
    for other in (make_dataset(110, seed=5), make_dataset(105)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_transmiter"):
            moved = transfer(adapters["words"], strong, other, **cache)
        assert "calibration pack belongs to other images" in caplog.text and "pass teacher= or" in caplog.text
        assert moved.adapter_config.provenance["refit_on"] == len(other)
    bare = copy.copy(adapters["words"])
    bare.calibration = None
    caplog.clear()
    again = transfer(bare, strong, other, **cache)
    assert "calibration" not in caplog.text
    bare.set_classes(NAMES[:2])  # what it is asked for just now is of no matter
    told = transfer(bare, strong, other, **cache)
    bare.set_classes(NAMES)
    for key, tensor in tensors(again).items():
        assert torch.equal(tensor, tensors(moved)[key]) and torch.equal(tensor, tensors(told)[key])


@pytest.mark.parametrize("form", ["image", "words", "mlp"])
@pytest.mark.parametrize("family", ["siglip", "align", "vision-text-dual-encoder"])
def test_across_families(model_dir, adapters, dataset, cache, family, form, tmp_path):
    other = DualEncoder.from_pretrained(model_dir(family))
    moved = transfer(adapters[form], other, dataset, **cache)
    x = embed_dataset(other, dataset, tower=moved.reads_tower, **cache).embeds
    logits = moved.classify(x)
    assert logits.shape == (110, 3) and torch.isfinite(logits).all()
    pixels = other.preprocess(dataset[:4]["image"])
    torch.testing.assert_close(moved(pixels).logits_per_image, logits[:4], atol=1e-4, rtol=1e-4)
    # What was saved works on the bare transformers model.
    moved.save_pretrained(tmp_path)
    raw = PeftModel.from_pretrained(copy.deepcopy(other.model), str(tmp_path))
    torch.testing.assert_close(raw(pixel_values=pixels).logits_per_image, logits[:4], atol=1e-4, rtol=1e-4)
    back = AnchorClassifier.from_pretrained(tmp_path)
    assert torch.allclose(back(pixels).logits_per_image, logits[:4], atol=1e-4)
    assert back.adapter_config.provenance == moved.adapter_config.provenance
    assert moved.adapter_config.provenance["versions"]["torch"] == metadata.version("torch")
    # And back from there.
    again = transfer(back, adapters[form].encoder, dataset, **cache)
    assert again.encoder is adapters[form].encoder and again.class_names == NAMES


# Classes that tuning never saw


def test_unseen_classes_keep_a_share_of_zero_shot(weak, strong):
    adapter, bridge = own_vectors(weak), Bridge.build(weak, strong, anchors=WORDS)
    full = transfer(adapter, strong, bridge=bridge)
    text = strong.embed_names(NAMES)
    for seen, config, weight in (
        (NAMES, None, 0.0),
        (("cat",), None, 1 / 2),
        (("cat",), TransferConfig(zero_shot_weight=0.25), 0.25),
        (None, TransferConfig(zero_shot_weight=1.0), 1.0),
    ):
        moved = transfer(adapter, strong, bridge=bridge, seen_classes=seen, config=config)
        expected = normalize((1 - weight) * tensors(full)["class_vectors"] + weight * text, dim=1)
        torch.testing.assert_close(tensors(moved)["class_vectors"], expected, atol=1e-5, rtol=0)
        assert moved.adapter_config.provenance["zero_shot_weight"] == weight
    with pytest.raises(ValueError, match=r"seen_classes holds names the adapter does not know: \['tree'\]"):
        transfer(adapter, strong, bridge=bridge, seen_classes=["cat", "tree"])
    with pytest.raises(ValueError, match="zero_shot_weight must lie between 0 and 1, got 1.5"):
        TransferConfig(zero_shot_weight=1.5)
    with pytest.raises(ValueError, match="a bridge with beta_per_image does not read beta: leave"):
        TransferConfig(beta=1.0, beta_per_image=2.0)
    with pytest.raises(ValueError, match="a transfer over a finished bridge does not read beta: leave"):
        transfer(adapter, strong, bridge=bridge, config=TransferConfig(beta=1.0))
    with pytest.raises(ValueError, match="a bridge in embedding space does not read beta: leave"):
        transfer(adapter, strong, config=TransferConfig(beta=1.0))
    with pytest.raises(ValueError, match="a refit is of a linear adapter, to unlabelled images: pass images"):
        transfer(adapter, strong, bridge=bridge, config=TransferConfig(refit=True))


def test_interpolate():
    a, b, zero = (normalize(torch.randn(4, 6), dim=1) for _ in range(3))
    torch.testing.assert_close(interpolate({"full": a}, zero, 0.0), a)
    torch.testing.assert_close(interpolate({"full": a, "delta": b}, zero, 1.0), zero)
    torch.testing.assert_close(interpolate({"full": a, "delta": a}, zero, 0.3), normalize(0.7 * a + 0.3 * zero, dim=1))


# Refused


def test_refused(weak, strong, model_dir, adapters, make_dataset, dataset, cache):
    adapter = adapters["words"]
    with pytest.raises(ValueError, match="no adapter to transfer: pass what extract returned, or load a saved one"):
        transfer(AnchorClassifier(weak, ANCHORS), strong)
    bridge = Bridge.build(weak, strong, anchors=WORDS)
    with pytest.raises(ValueError, match="built for the strong model .* load that model, or build a bridge for this"):
        transfer(adapter, DualEncoder.from_pretrained(model_dir("siglip")), bridge=bridge)
    with pytest.raises(ValueError, match="built for the weak model"):
        transfer(adapter, strong, bridge=Bridge.build(strong, strong, anchors=WORDS))
    with pytest.raises(ValueError, match=r"matrix is .* the models' widths are \d+ and \d+: take a bridge of this"):
        transfer(adapter, strong, bridge=replace(bridge, matrix=bridge.matrix[:, 1:]))
    with pytest.raises(ValueError, match="needs unlabelled images or a logit-space bridge: pass one of them"):
        transfer(adapters["mlp"], strong)
    with pytest.raises(ValueError, match="reads logits: build the bridge with space='logit'"):
        transfer(adapters["mlp"], strong, bridge=bridge)
    other = Bridge.build(weak, strong, dataset, space="logit", anchors=Anchors(NAMES, ("tree",)), **cache)
    with pytest.raises(ValueError, match="two sets of anchors differ"):
        transfer(adapters["mlp"], strong, bridge=other)
    for teacher, message in (
        (torch.zeros(109, 3), r"must be \(110, 3\)"),
        (torch.full((110, 3), float("nan")), "hold NaN"),
        (CalibrationPack(torch.zeros(110, 3), NAMES, "other"), "belong to 110 other images"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(adapter, strong, dataset, bridge=bridge, teacher=teacher, **cache)
    with pytest.raises(ValueError, match="dataset is empty"):
        transfer(adapter, strong, dataset.select([]), **cache)
    mixed = copy.copy(adapter)
    mixed.calibration = replace(adapter.calibration, class_names=NAMES[::-1])
    with pytest.raises(ValueError, match="class names are not the adapter's: attach the pack saved with it"):
        transfer(mixed, strong, dataset, bridge=bridge, **cache)


# Several processes


def _transfer(weak, strong, adapter, dataset, cache, accelerator=None):
    encoders = [DualEncoder.from_pretrained(folder) for folder in (weak, strong)]
    moved = transfer(
        AnchorClassifier.from_pretrained(adapter, encoders[0]),
        encoders[1],
        dataset,
        cache_dir=cache,
        progress=False,
        accelerator=accelerator,
    )
    return {key: tensor.contiguous() for key, tensor in tensors(moved).items()}


def _in_two_processes(path, *arguments):
    batches = FeatureTable.batches
    FeatureTable.batches = lambda self, size: batches(self, 7)  # both processes get blocks
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = _transfer(*arguments, path / "cache", accelerator)
    save_file(found, path / f"{accelerator.process_index}.safetensors")


def test_two_processes_find_what_one_does(weak, strong, adapters, dataset, cache, tmp_path):
    adapters["image"].save_pretrained(tmp_path / "adapter")
    arguments = (weak.name_or_path, strong.name_or_path, tmp_path / "adapter", dataset)
    expected = _transfer(*arguments, cache["cache_dir"])
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(_in_two_processes, args=(tmp_path, *arguments), num_processes=2)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-3)
