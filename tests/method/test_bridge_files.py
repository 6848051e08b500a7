"""Bridges as files, folders and repositories: what is written is read, and nothing else is taken for a bridge."""

import dataclasses
import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_transmiter import AnchorClassifier, Anchors, Bridge, DualEncoder, TransMiterConfig, transfer
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.moments import CrossMoment


WEAK, STRONG, LAST = (ModelId(name, None, name[0] * 64) for name in ("weak", "strong", "last"))


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bridge_of(strong, weak, space="embedding", models=(WEAK, STRONG), **kwargs):
    moment = CrossMoment.zeros(strong.shape[1], weak.shape[1])
    moment.update(strong, weak)
    return Bridge.from_moment(moment, *models, space=space, **kwargs)


def anchors(k):
    return Anchors((), tuple(f"name {i}" for i in range(k)))


def composed():
    """Through a wider model, whose rows are read in other directions than they are written in."""
    first = bridge_of(rows(40, 9), rows(40, 4, 1))
    found = first.compose(bridge_of(rows(40, 5, 2), rows(40, 9, 3), models=(STRONG, LAST)))
    singular = torch.linalg.svdvals(found.matrix)
    assert torch.minimum(singular, (1 - singular).abs()).max() > 0.1  # not semi-orthogonal
    return found


def some_bridge(kind):
    if kind == "composed":
        return composed()
    names = anchors(6) if kind == "logit" else None
    bridge = bridge_of(rows(40, 6), rows(40, 6, 1), kind, anchors=names, beta=3.0)
    return dataclasses.replace(bridge, dataset="mteb/dtd (train)", held_out=0.25, versions={"torch": "2.13"})


def assert_same(left, right):
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name


@pytest.fixture
def rewrite(tmp_path):
    """`rewrite(bridge, tensors={}, **facts)`: its file with tensors and facts changed; "drop" leaves one out."""

    def make(bridge, tensors=None, **changes):
        path = tmp_path / "changed.safetensors"
        bridge.save(path, overwrite=True)
        stored = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        facts = {**json.loads(metadata["bridge"]), **changes}
        metadata["bridge"] = json.dumps({key: value for key, value in facts.items() if value != "drop"})
        save_file({**stored, **(tensors or {})}, path, metadata=metadata)
        return path

    return make


# Files


@pytest.mark.parametrize("kind", ["logit", "embedding", "composed"])
def test_save_and_load(tmp_path, kind):
    bridge, path = some_bridge(kind), tmp_path / "new" / "bridge.safetensors"
    bridge.save(path)
    assert_same(Bridge.load(path), bridge)
    assert [file.name for file in path.parent.iterdir()] == ["bridge.safetensors"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        bridge.save(path)
    bridge.save(path, overwrite=True)


def test_files_without_the_later_facts(rewrite):
    later = dict.fromkeys(("dataset", "held_out", "scale_back", "through", "versions"), "drop")
    bridge = some_bridge("embedding")
    found = Bridge.load(rewrite(bridge, **later))
    assert (found.dataset, found.held_out, found.through, found.versions) == (None, None, (), {})
    assert torch.equal(found.matrix, bridge.matrix) and found.scale == bridge.scale
    with pytest.raises(ValueError, match="without the factor of the way back: build it again"):
        found.invert()
    logit = Bridge.load(rewrite(some_bridge("logit"), **later))
    assert logit.invert().scale == 1  # in logit space it is known


def test_half_precision_is_still_a_bridge(rewrite):
    bridge = some_bridge("embedding")
    path = rewrite(bridge, {"matrix": bridge.matrix.bfloat16()})
    assert Bridge.load(path).matrix.dtype == torch.float32


def test_broken_files(tmp_path, rewrite):
    path = tmp_path / "bridge.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Bridge.load(path)
    save_file({"matrix": torch.eye(2)}, path)
    with pytest.raises(ValueError, match="is not a bridge; write one with Bridge.save"):
        Bridge.load(path)
    bridge = bridge_of(rows(40, 6), rows(40, 4, 1))
    for tensors, message in (
        ({"matrix": 2 * bridge.matrix}, "not orthogonal; the file was changed or damaged"),
        ({"matrix": bridge.matrix / 0}, "matrix of .* hold NaN"),
        ({"mean_weak": torch.zeros(5)}, r"mean_weak must have the shape \(4\), it has \(5,\)"),
        ({"surprise": torch.zeros(5)}, "holds the unknown"),
        ({"matrix": torch.zeros(6, 4, dtype=torch.int8)}, "matrix has the dtype I8"),
    ):
        with pytest.raises(ValueError, match=message):
            Bridge.load(rewrite(bridge, tensors))


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": "drop"},
        {"surprise": 1},
        {"scale": None},
        {"scale_back": [1.0]},
        {"alignment": "high"},
        {"held_out": True},
        {"space": "time"},
        {"source": "rumour"},
        {"strong": {}},
        {"weak": 3},
        {"anchors": 3},
        {"anchors": {"task": ["cat", "cat"]}},
        {"through": "middle"},
        {"versions": {"torch": {}}},
        {"dataset": 3},
    ],
    ids=str,
)
def test_wrong_facts(rewrite, changes):
    with pytest.raises(ValueError, match="Write a bridge with Bridge.save|Anchor names must differ"):
        Bridge.load(rewrite(some_bridge("embedding"), **changes))


def test_the_matrix_must_be_one_of_its_kind(rewrite):
    """Logit space: orthogonal and over the anchors. A composed bridge may shrink rows, but not stretch them; without
    the names it was composed through it counts as built, and may do neither."""
    logit, product = some_bridge("logit"), composed()
    flat = logit.matrix.clone()
    flat[0] = 0
    with pytest.raises(ValueError, match="is not orthogonal"):
        Bridge.load(rewrite(logit, {"matrix": flat}))
    with pytest.raises(ValueError, match="does not fit the anchors"):
        Bridge.load(rewrite(logit, anchors=anchors(5).to_dict()))
    with pytest.raises(ValueError, match="is not orthogonal"):
        Bridge.load(rewrite(product, through=[]))
    with pytest.raises(ValueError, match="is no product of bridges"):
        Bridge.load(rewrite(product, {"matrix": product.matrix * 1.1 / torch.linalg.matrix_norm(product.matrix, 2)}))


# Folders


def test_a_folder_with_a_card(tmp_path):
    bridge, folder = some_bridge("embedding"), tmp_path / "new" / "bridge"
    bridge.save_pretrained(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "bridge.safetensors"]
    card = (folder / "README.md").read_text()
    assert "mteb/dtd" in card and "0.25" in card and "40 pairs" in card
    with pytest.raises(FileExistsError, match="overwrite=True"):
        bridge.save_pretrained(folder)
    bridge.save_pretrained(folder, overwrite=True)
    (tmp_path / "above").mkdir()
    for place, options in ((folder, {}), (str(folder), {}), (folder.parent, {"subfolder": "bridge"})):
        assert_same(Bridge.from_pretrained(place, **options), bridge)
    assert_same(Bridge.from_pretrained(folder / "bridge.safetensors"), bridge)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no bridge.safetensors in"):
        Bridge.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Bridge.from_pretrained(tmp_path / "bridge.safetensors")
    with pytest.raises(FileNotFoundError, match="neither a local path nor a Hub id"):
        Bridge.from_pretrained("./bridge")


# The Hub


@pytest.fixture(scope="module")
def pair():
    return [DualEncoder.from_pretrained(f"sandbox:{name}") for name in ("weak", "strong")]


def test_an_upgrade_without_images_on_another_machine(hub, pair, make_images):
    """Adapter and bridge from the Hub: to the bit what they are where they were made."""
    weak, strong = pair
    names, pixels = Anchors(("red disc", "blue ring", "green star")), strong.preprocess(make_images(4))
    adapter = AnchorClassifier(weak, names).add_adapter(TransMiterConfig.for_anchors(names, form="linear"))
    vectors = adapter.transmiter.tensors("default")["class_vectors"]
    vectors.add_(0.3 * torch.randn(vectors.shape))
    bridge = Bridge.build(weak, strong, anchors=anchors(120))
    local = transfer(adapter, strong, bridge=bridge)(pixel_values=pixels).logits_per_image
    adapter.push_to_hub("alice/adapter")
    commit = bridge.push_to_hub("alice/bridge")
    assert hub.titles("alice/bridge")[0] == "Upload bridge with hf_transmiter"
    assert len(hub.requests("POST", "/api/models/alice/bridge/commit/")) == 1

    hub.new_machine()
    fetched = Bridge.from_pretrained("alice/bridge")
    assert_same(fetched, bridge)
    upgraded = transfer(AnchorClassifier.from_pretrained("alice/adapter"), strong, bridge=fetched)
    assert torch.equal(upgraded(pixel_values=pixels).logits_per_image, local)

    # Once in the cache it needs no network; a revision is a revision, however it is written.
    assert_same(Bridge.from_pretrained("alice/bridge", local_files_only=True), bridge)
    other = Bridge.build(weak, strong, anchors=anchors(60))
    other.push_to_hub("alice/bridge", commit_message="Fewer names")
    assert hub.titles("alice/bridge")[0] == "Fewer names"
    assert_same(Bridge.from_pretrained("alice/bridge"), other)
    assert_same(Bridge.from_pretrained("alice/bridge", revision=commit.oid), bridge)
    assert_same(Bridge.from_pretrained(f"alice/bridge@{commit.oid}"), bridge)


def test_a_card_by_people_and_local_models(hub, model_dir):
    folder = model_dir("clip")
    encoder = DualEncoder.from_pretrained(folder)
    bridge = Bridge.build(encoder, encoder, anchors=anchors(120))
    bridge.push_to_hub("alice/bridge")
    stored = hub.files("alice/bridge")
    # No path of this machine is told to anybody; the models are known by their weights.
    assert not [name for name, content in stored.items() if folder.encode() in content]
    Bridge.from_pretrained("alice/bridge").weak.check(encoder, "weak")
    assert bridge.weak.name == folder
    card = ModelCard(stored["README.md"].decode())
    card.data.license = "mit"
    hub.write("alice/bridge", {"README.md": str(card).encode()})
    bridge.push_to_hub("alice/bridge")
    assert ModelCard(hub.files("alice/bridge")["README.md"].decode()).data.license == "mit"


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(OSError, match="alice/none"):
        Bridge.from_pretrained("alice/none")
    hub.write("alice/empty", {"README.md": b"# Nothing"})
    with pytest.raises(FileNotFoundError, match="no bridge.safetensors in 'alice/empty'"):
        Bridge.from_pretrained("alice/empty")
    hub.write("alice/odd", {"bridge.safetensors": b"not safetensors at all"})
    with pytest.raises(ValueError, match="damaged or not a bridge"):
        Bridge.from_pretrained("alice/odd")
