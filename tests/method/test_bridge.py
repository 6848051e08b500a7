"""Bridges: what the map of a pair of models is, what it carries, and that a file of one is checked."""

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hf_transmiter import sandbox
from hf_transmiter.algebra import polar, standardise
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.moments import CrossMoment


WEAK, STRONG = ModelId("weak", None, "w" * 64), ModelId("strong", None, "s" * 64)
seeds = st.integers(0, 2**31)


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(rows(d, d, seed))[0]


def moment_of(strong, weak):
    moment = CrossMoment.zeros(strong.shape[1], weak.shape[1])
    moment.update(strong, weak)
    return moment


def bridge_of(strong, weak, space, **kwargs):
    return Bridge.from_moment(moment_of(strong, weak), WEAK, STRONG, space=space, **kwargs)


def anchors(k):
    return Anchors((), tuple(f"name {i}" for i in range(k)))


# Logit space


@given(seeds, st.integers(3, 8))
def test_from_a_model_to_itself_is_the_identity_in_logit_space(seed, k):
    z = standardise(rows(6 * k, k, seed))[0]
    bridge = bridge_of(z, z, "logit", beta=1.0)
    torch.testing.assert_close(bridge.matrix, torch.eye(k), atol=1e-5, rtol=0)
    assert bridge.alignment == pytest.approx(1, abs=1e-6) and bridge.scale == 1 and bridge.num_pairs == 6 * k
    basis = rotation(k, seed + 1).float()
    torch.testing.assert_close(bridge.carry_basis(basis), basis, atol=1e-5, rtol=0)


@given(seeds, st.integers(3, 8))
def test_a_planted_rotation_is_recovered_in_logit_space(seed, k):
    weak, planted = rows(8 * k, k, seed), rotation(k, seed + 1)
    bridge = bridge_of(weak @ planted.T, weak, "logit", beta=0.0)
    torch.testing.assert_close(bridge.matrix.double(), planted, atol=1e-5, rtol=0)  # z_strong P = z_weak
    assert bridge.alignment == pytest.approx(1, abs=1e-6)


@given(seeds, st.floats(0.1, 500))
def test_the_map_is_the_best_of_its_objective(seed, beta):
    strong, weak = rows(40, 5, seed), rows(40, 5, seed + 1)
    found = bridge_of(strong, weak, "logit", beta=beta).matrix.double()

    def objective(p):
        return (strong @ p - weak).square().sum() + beta * (p - torch.eye(5)).square().sum()

    for other in (torch.eye(5, dtype=torch.float64), rotation(5, seed + 2), found @ rotation(5, seed + 3)):
        assert objective(found) <= objective(other) + 1e-4


def test_beta_keeps_directions_without_evidence_in_place():
    """Standardised logits have rank K - 1 at most (rows sum to zero), fewer with few images. Without a pull towards
    the identity the map of the null space is arbitrary; with it, it is the identity there."""
    z = rows(4, 8)
    z = z - z.mean(1, keepdim=True)
    basis = torch.linalg.svd(z, full_matrices=True)[2]
    null = basis[4:].T  # (8, 4): what no image says anything about
    # Each of the two singular bases may turn on its own inside the null space of the moment.
    moment, turn = z.T @ z, null @ rotation(4, 3) @ null.T
    arbitrary = polar(moment) @ (torch.eye(8, dtype=torch.float64) - null @ null.T + turn)
    assert (z @ arbitrary - z).abs().max() < 1e-9  # just as good without beta
    assert (arbitrary @ null - null).abs().max() > 0.1  # and not the identity
    for beta in (1e-3, 1.0, 500.0):
        kept = bridge_of(z, z, "logit", beta=beta).matrix
        torch.testing.assert_close(kept, torch.eye(8), atol=1e-5, rtol=0)
    planted = torch.eye(8, dtype=torch.float64) + basis[:4].T @ (rotation(4, 5) - torch.eye(4)) @ basis[:4]
    moved = bridge_of(z @ planted.T, z, "logit", beta=1e-3).matrix.double()
    torch.testing.assert_close(moved @ null, null, atol=1e-5, rtol=0)
    torch.testing.assert_close(z @ planted.T @ moved, z, atol=1e-2, rtol=0)


def test_an_infinite_beta_is_no_basis_change(tmp_path):
    strong, weak = rows(40, 6), rows(40, 6, 1)
    held_out = moment_of(strong[::4], weak[::4])
    bridge = bridge_of(strong, weak, "logit", beta=float("inf"), held_out=held_out)
    assert torch.equal(bridge.matrix, torch.eye(6))
    basis = rows(6, 6, 2).float()
    assert torch.equal(bridge.carry_basis(basis), basis)
    nearly = bridge_of(strong, weak, "logit", beta=1e12)  # the limit of what finite ones give
    torch.testing.assert_close(bridge.matrix, nearly.matrix, atol=1e-6, rtol=0)
    assert bridge.alignment == pytest.approx(nearly.alignment) and bridge.held_out == pytest.approx(
        held_out.alignment(torch.eye(6))
    )
    bridge.save(tmp_path / "bridge.safetensors")
    assert torch.equal(Bridge.load(tmp_path / "bridge.safetensors").matrix, bridge.matrix)
    for beta in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="beta must be 0 or more"):
            bridge_of(strong, weak, "logit", beta=beta)


@pytest.mark.parametrize("beta", [0.0, 1.0, 500.0])
def test_a_wide_basis_is_carried_as_published(beta):
    """The published step rotates hidden units: polar(H_strongᵀ H_weak + β I) with H = z Wᵀ, and reads Ŵᵀ W. For W
    (D, K) with orthonormal columns that is W Pᵀ, also for D > K."""
    strong, weak = (standardise(rows(60, 7, seed))[0] for seed in (1, 2))
    strong = weak + 0.5 * strong
    for width in (7, 12):
        basis = torch.linalg.qr(rows(width, 7, 3))[0]
        hidden = (strong @ basis.T).T @ (weak @ basis.T) + beta * torch.eye(width, dtype=torch.float64)
        # Columns outside the span of W are never reached; polar needs the tolerance where they are without evidence.
        published = polar(hidden, 1e-9).T @ basis
        bridge = bridge_of(strong, weak, "logit", beta=beta)
        ours = bridge.carry_basis(basis.float()).double()
        # Rows of z sum to zero: without beta the direction of all ones is nobody's.
        centred = torch.eye(7, dtype=torch.float64) - 1 / 7
        projection = centred if beta == 0 else torch.eye(7, dtype=torch.float64)
        torch.testing.assert_close(ours @ projection, published @ projection, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.T @ ours, torch.eye(7, dtype=torch.float64), atol=1e-5, rtol=0)


@given(st.permutations(range(6)), seeds)
def test_permuting_the_anchors_permutes_the_map(order, seed):
    strong, weak = rows(40, 6, seed), rows(40, 6, seed + 1)
    basis = rotation(6, seed + 2).float()
    plain, permuted = (
        bridge_of(s, w, "logit", beta=3.0) for s, w in ((strong, weak), (strong[:, order], weak[:, order]))
    )
    torch.testing.assert_close(permuted.matrix, plain.matrix[order][:, order], atol=1e-5, rtol=0)
    # So the carried basis reads the permuted logits as the plain one reads the plain ones.
    torch.testing.assert_close(
        permuted.carry_basis(basis[:, order]), plain.carry_basis(basis)[:, order], atol=1e-5, rtol=0
    )


def test_carrying_a_basis_is_applying_the_map():
    strong, weak = rows(40, 6), rows(40, 6, 1)
    bridge, basis = bridge_of(strong, weak, "logit"), rotation(6, 2).float()
    z = rows(5, 6, 3).float()
    torch.testing.assert_close(z @ bridge.carry_basis(basis).T, z @ bridge.matrix @ basis.T, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="the basis reads 5 anchors, the bridge has 6"):
        bridge.carry_basis(basis[:, :5])
    with pytest.raises(ValueError, match="space='logit'"):
        bridge_of(strong, weak, "embedding").carry_basis(basis)


# Embedding space


@given(seeds, st.integers(2, 6), st.integers(0, 3), st.floats(0.3, 3))
def test_a_planted_similarity_is_recovered_in_embedding_space(seed, d, extra, scale):
    weak, turn = rows(12 * d, d, seed), rotation(d + extra, seed + 1)[:, :d]
    strong = 2 + scale * weak @ turn.T
    bridge = bridge_of(strong, weak, "embedding")
    torch.testing.assert_close(bridge.matrix.double(), turn, atol=1e-5, rtol=0)
    assert bridge.scale == pytest.approx(scale, rel=1e-5) and bridge.alignment == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(bridge.mean_strong.double(), strong.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(bridge.mean_weak.double(), weak.mean(0), atol=1e-5, rtol=0)
    # Class vectors go the way the embeddings went.
    tuned = rows(3, d, seed + 2).float()
    full = bridge.carry_class_vectors(tuned, rows(3, d).float(), torch.zeros(3, d + extra))["full"]
    expected = normalize(2 + scale * tuned @ turn.T.float(), dim=1)
    torch.testing.assert_close(full, expected, atol=1e-4, rtol=0)


def test_from_a_model_to_itself_class_vectors_stay():
    x = normalize(rows(50, 6), dim=1)
    tuned, text = normalize(rows(3, 6, 1), dim=1).float(), normalize(rows(3, 6, 2), dim=1).float()
    bridge = bridge_of(x, x, "embedding")
    torch.testing.assert_close(bridge.matrix, torch.eye(6), atol=1e-5, rtol=0)
    assert bridge.scale == pytest.approx(1, abs=1e-6)
    carried = bridge.carry_class_vectors(tuned, text, text)
    assert set(carried) == {"full", "delta"}
    for vectors in carried.values():
        torch.testing.assert_close(vectors, tuned, atol=1e-5, rtol=0)
    z = rows(50, 8, 3)
    texts = [rows(8, 6, 4).float()] * 2
    (delta,) = bridge_of(z, z, "logit").carry_class_vectors(tuned, text, text, texts).values()
    torch.testing.assert_close(delta, tuned, atol=1e-4, rtol=0)


def test_with_fewer_pairs_than_dimensions_the_map_is_a_projection():
    x = rows(4, 8)
    bridge = bridge_of(x, x, "embedding")
    q = bridge.matrix.double()
    torch.testing.assert_close(q @ q, q, atol=1e-5, rtol=0)
    torch.testing.assert_close(q, q.T, atol=1e-5, rtol=0)
    assert round(float(q.trace())) == 3  # four centred rows
    assert bridge.scale == pytest.approx(1, abs=1e-6)
    text, seen = rows(2, 8, 1).float(), (rows(2, 4, 2) @ (x - x.mean(0))).float()
    delta = bridge.carry_class_vectors(text + seen, text, text)["delta"]
    torch.testing.assert_close(delta, normalize(text + seen, dim=1), atol=1e-5, rtol=0)
    away = text + seen + (torch.eye(8) - bridge.matrix).matmul(rows(8, 2, 3).float()).T
    torch.testing.assert_close(bridge.carry_class_vectors(away, text, text)["delta"], delta, atol=1e-5, rtol=0)


def test_class_vectors_over_a_logit_bridge_computed_directly():
    """Written over the anchors, T - A_weak = Σ_k b_k (ā_k): the same anchors of the strong model, rotated by P."""
    weak_anchors, strong_anchors = rows(9, 4, 1), rows(9, 6, 2)
    tuned, weak_text, strong_text = rows(3, 4, 3), rows(3, 4, 4), rows(3, 6, 5)
    bridge = bridge_of(rows(40, 9, 6), rows(40, 9, 7), "logit")
    carried = bridge.carry_class_vectors(
        tuned.float(), weak_text.float(), strong_text.float(), [weak_anchors.float(), strong_anchors.float()]
    )
    weak_centred, strong_centred = (a - a.mean(0) for a in (weak_anchors, strong_anchors))
    coefficients = torch.linalg.lstsq(weak_centred.T, (tuned - weak_text).T, driver="gelsd").solution  # least norm
    change = strong_centred.T @ bridge.matrix.double() @ coefficients
    torch.testing.assert_close(carried["delta"].double(), normalize(strong_text + change.T, dim=1), atol=1e-4, rtol=0)
    assert set(carried) == {"delta"}
    # In logits: x's change is the anchors' logits, mapped, times the coefficients.
    x = rows(5, 6, 8)
    logits = (x @ strong_centred.T) @ bridge.matrix.double() @ coefficients
    torch.testing.assert_close(x @ change, logits)
    with pytest.raises(ValueError, match="pass anchor_texts"):
        bridge.carry_class_vectors(tuned.float(), weak_text.float(), strong_text.float())


# Bridges of models


@pytest.fixture(scope="module")
def pair(model_dir, tmp_path_factory):
    """A weak CLIP of width 16 and a strong SigLIP with another tokenizer."""
    return DualEncoder.from_pretrained(model_dir("clip")), DualEncoder.from_pretrained(model_dir("siglip"))


def test_build_from_images(pair, make_dataset, tmp_path):
    weak, strong = pair
    dataset = make_dataset(30)
    bridge = Bridge.build(weak, strong, dataset, cache_dir=tmp_path, progress=False)
    x_weak, x_strong = (embed_dataset(model, dataset, cache_dir=tmp_path).embeds for model in pair)
    direct = bridge_of(x_strong, x_weak, "embedding")
    torch.testing.assert_close(bridge.matrix, direct.matrix, atol=1e-5, rtol=0)
    assert (bridge.source, bridge.num_pairs, bridge.anchors, bridge.beta) == ("images", 30, None, 0.0)
    assert bridge.weak == ModelId.of(weak) and bridge.strong.fingerprint == strong.fingerprint
    names = anchors(6)
    texts = [model.embed_names(names.names) for model in pair]
    z_weak, z_strong = (
        standardise(model.logits(x, a))[0] for model, x, a in zip(pair, (x_weak, x_strong), texts, strict=True)
    )
    for beta in ({"beta": 2.0}, {"beta_per_image": 2 / 30}, {}):
        bridge = Bridge.build(weak, strong, dataset, space="logit", anchors=names, cache_dir=tmp_path, **beta)
        expected = bridge_of(z_strong, z_weak, "logit", beta=2.0 if beta else 500.0)
        torch.testing.assert_close(bridge.matrix, expected.matrix, atol=1e-4, rtol=0)
        assert bridge.anchors == names and bridge.beta == pytest.approx(2.0 if beta else 500.0)


def test_build_from_text(pair):
    weak, strong = pair
    bridge = Bridge.build(weak, strong, anchors=anchors(20))
    assert (bridge.source, bridge.num_pairs, bridge.space) == ("text", 20, "embedding")
    direct = bridge_of(*(model.embed_names(anchors(20).names) for model in (strong, weak)), "embedding")
    torch.testing.assert_close(bridge.matrix, direct.matrix, atol=1e-5, rtol=0)
    bridge = Bridge.build(weak, weak, anchors=anchors(40))
    assert bridge.alignment == pytest.approx(1, abs=1e-2)  # directions without evidence are dropped


def test_build_refuses(pair):
    with pytest.raises(ValueError, match="space must be one of embedding, logit, got 'weights'"):
        Bridge.build(*pair, space="weights")
    with pytest.raises(ValueError, match="needs images; without them build one in embedding space"):
        Bridge.build(*pair, space="logit")
    with pytest.raises(TypeError, match="unexpected keyword argument 'vocabulary'"):
        Bridge.build(*pair, anchors=anchors(20), vocabulary=anchors(40))  # without images too
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        Bridge.build(*pair, anchors=anchors(20)).measure(*pair, batch=3)


def test_a_bridge_from_text_that_is_worth_little(caplog):
    """Words that the models do not know: a warning with the remedy, which helps."""
    weak, strong = (DualEncoder.from_pretrained(f"sandbox:{name}") for name in ("weak", "strong"))
    bridge, images = Bridge.build(weak, strong), sandbox.load_dataset("print", "test").select(range(300))
    assert bridge.held_out < 0.5 and bridge.held_out_on == "names"
    (said,) = [record.getMessage() for record in caplog.records if record.name == "hf_transmiter.method.bridge"]
    assert said == bridge.doubt() and "pass unlabelled pictures (--dataset), or anchors" in said
    assert f"its alignment is only {bridge.held_out:.2f} of at most 1 on names that it was not built from" in said
    caplog.clear()
    words = sandbox.vocabulary()
    known = Bridge.build(weak, strong, anchors=Anchors((), tuple(words)))
    assert known.held_out > 0.8 and known.doubt() is None and not caplog.records
    # Images tell more than names do, either way; and few names tell little.
    assert known.measure(weak, strong, images, progress=False) > 0.55 and known.doubt() is None
    assert known.held_out_on == "images"
    assert bridge.measure(weak, strong, images, progress=False) < 0.3
    assert f"only {bridge.held_out:.2f} of at most 1 on images that" in bridge.doubt()
    assert (
        "built from 150 names, fewer than 200"
        in Bridge.build(weak, strong, anchors=Anchors((), tuple(words[:150]))).doubt()
    )
    assert Bridge.build(weak, strong, images, progress=False).doubt() is None


def test_of_another_model(pair):
    bridge = Bridge.build(*pair, anchors=anchors(6))
    bridge.weak.check(pair[0], "weak")
    with pytest.raises(ValueError, match="built for the weak model .*clip.* load that model, or build a bridge"):
        bridge.weak.check(pair[1], "weak")


def test_widths_and_families_may_differ(tmp_path, model_dir):
    narrow = DualEncoder.from_pretrained(model_dir("clip"))
    wide = DualEncoder.from_pretrained(tiny_models.save("clip", tmp_path, seed=1, width=24))
    for weak, strong in ((narrow, wide), (wide, narrow)):
        bridge = Bridge.build(weak, strong, anchors=anchors(60))
        assert bridge.matrix.shape == (strong.embed_dim, weak.embed_dim)
        singular = torch.linalg.svdvals(bridge.matrix)
        assert torch.minimum(singular, (1 - singular).abs()).max() < 1e-5


def test_one_line_says_what_it_is():
    made = bridge_of(rows(20, 4), rows(20, 3, 1), "embedding", source="images")
    assert (
        repr(made)
        == "Bridge('weak' to 'strong', embedding space, 20 pairs of images, held-out alignment not measured)"
    )
    made.held_out, made.held_out_on = 0.5, "images"
    assert repr(made).endswith("20 pairs of images, held-out alignment 0.500 on images)")
