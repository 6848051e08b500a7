"""Bridges that are composed and turned round, and what is said about their worth."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.moments import CrossMoment


WEAK, STRONG = ModelId("weak", None, "w" * 64), ModelId("strong", None, "s" * 64)
MIDDLE, LAST = ModelId("middle", None, "m" * 64), ModelId("last", "main", "l" * 64)
seeds = st.integers(0, 2**31)


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(rows(d, d, seed))[0]


def moment_of(strong, weak):
    moment = CrossMoment.zeros(strong.shape[1], weak.shape[1])
    moment.update(strong, weak)
    return moment


def anchors(k):
    return Anchors((), tuple(f"name {i}" for i in range(k)))


def assert_equal(left, right, atol=0.0):
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if torch.is_tensor(a) or isinstance(a, float):
            a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
            torch.testing.assert_close(a, b, atol=atol, rtol=0)
        else:
            assert a == b, field.name


def between(weak, strong, models, space="embedding", **kwargs):
    return Bridge.from_moment(moment_of(strong, weak), *models, space=space, **kwargs)


def apply(bridge, x):
    """x (N, d_weak) of the weak model, in the strong model's space."""
    matrix, means = bridge.matrix.double(), (bridge.mean_strong.double(), bridge.mean_weak.double())
    return means[0] + bridge.scale * (x - means[1]) @ matrix.T


def noisy(seed, widths=(4, 6, 5), n=40):
    """Rows of three models that agree only in part, and a second sample of them."""
    hidden = rows(2 * n, 3, seed)
    tables = []
    for i, width in enumerate(widths):
        noise = rows(2 * n, width, seed + 10 + i)
        tables.append(i + hidden @ rows(3, width, seed + 20 + i) + 0.5 * noise)
    return [x[:n] for x in tables], [x[n:] for x in tables]


def chain(seed, space="embedding", same_rows=False, **options):
    (a, b, c), (_, b2, c2) = noisy(seed, **options)
    return (
        between(a, b, (WEAK, MIDDLE), space),
        between(b, c, (MIDDLE, LAST), space) if same_rows else between(b2, c2, (MIDDLE, LAST), space),
    )


@given(seeds, st.integers(2, 5), st.integers(0, 2), st.integers(0, 2), st.floats(0.3, 3), st.floats(0.3, 3))
def test_exact_maps_compose_to_their_product(seed, d, more, still_more, s1, s2):
    """Each bridge saw other rows, with other means: the composition is exact all the same."""
    sizes = (d, d + more, d + more + still_more)
    turns = [rotation(sizes[i + 1], seed + i)[:, : sizes[i]] for i in (0, 1)]

    def three(rows_of_weak):
        middle = 2 + s1 * rows_of_weak @ turns[0].T
        return rows_of_weak, middle, -1 + s2 * middle @ turns[1].T

    (a, b, _), (_, b2, c2) = three(rows(12 * d, d, seed + 2)), three(1 + rows(80, d, seed + 3))
    second = between(b2, c2, (MIDDLE, LAST))
    composed = between(a, b, (WEAK, MIDDLE)).compose(second)
    torch.testing.assert_close(composed.matrix.double(), turns[1] @ turns[0], atol=1e-5, rtol=0)
    assert composed.scale == pytest.approx(s1 * s2, rel=1e-4)
    x, _, expected = three(rows(5, d, seed + 4))
    torch.testing.assert_close(apply(composed, x), expected, atol=1e-4, rtol=1e-4)
    assert (composed.weak, composed.strong) == (WEAK, LAST)


@given(seeds)
def test_composing_is_applying_one_after_the_other(seed):
    first, second = chain(seed)
    composed, x = first.compose(second), rows(7, 4, seed + 5)
    torch.testing.assert_close(apply(composed, x), apply(second, apply(first, x)), atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_norm(composed.matrix, 2) <= 1 + 1e-5
    # It is fitted to nothing, and a bridge of the same rows is aligned at least as well on them.
    assert composed.alignment is None and composed.held_out is None
    (a, _, c), _ = noisy(seed)
    moment = moment_of(c, a).centred()
    best, single = moment.alignment(between(a, c, (WEAK, LAST)).matrix), moment.alignment(composed.matrix)
    assert -1 <= single <= best + 1e-6


@given(seeds)
def test_class_vectors_over_a_composition_are_those_carried_twice(seed):
    """As long as lengths are not taken away in between, which `carry_class_vectors` does."""
    first, second = chain(seed)
    tuned, texts = rows(3, 4, seed + 6), [rows(3, d, seed + 7) for d in (4, 6, 5)]
    found = first.compose(second).carry_class_vectors(tuned.float(), texts[0].float(), texts[2].float())
    expected = {
        "full": apply(second, apply(first, tuned)),
        "delta": texts[2]
        + second.scale * first.scale * (tuned - texts[0]) @ (second.matrix @ first.matrix).double().T,
    }
    for kind, vectors in expected.items():
        torch.testing.assert_close(found[kind].double(), normalize(vectors, dim=1), atol=1e-4, rtol=0)


@given(seeds, st.integers(3, 6))
def test_unit_class_vectors_over_rotations_are_exactly_those_carried_twice(seed, d):
    x, turns = normalize(rows(60, d, seed), dim=1), [rotation(d, seed + 1), rotation(d, seed + 2)]
    first = between(x, x @ turns[0].T, (WEAK, MIDDLE))
    second = between(x @ turns[0].T, x @ turns[0].T @ turns[1].T, (MIDDLE, LAST))
    tuned, text = normalize(rows(3, d, seed + 3), dim=1).float(), normalize(rows(3, d, seed + 4), dim=1).float()
    texts = [text, text @ turns[0].T.float(), text @ (turns[1] @ turns[0]).T.float()]
    composed = first.compose(second).carry_class_vectors(tuned, texts[0], texts[2])
    for kind in ("full", "delta"):
        once = first.carry_class_vectors(tuned, *texts[:2])[kind]
        torch.testing.assert_close(
            composed[kind], second.carry_class_vectors(once, *texts[1:])[kind], atol=1e-4, rtol=0
        )


@given(seeds, st.sampled_from(["embedding", "logit"]))
def test_the_inverse_is_the_bridge_built_the_other_way_round(seed, space):
    widths = (4, 6) if space == "embedding" else (5, 5)
    weak, strong = noisy(seed, widths)[0]
    forth = between(weak, strong, (WEAK, STRONG), space, beta=2.0, held_out=moment_of(strong[::4], weak[::4]))
    back = between(strong, weak, (STRONG, WEAK), space, beta=2.0, held_out=moment_of(weak[::4], strong[::4]))
    assert forth.held_out is not None
    assert_equal(forth.invert(), back, atol=1e-5)
    assert_equal(forth.invert().invert(), forth)


@given(seeds)
def test_there_and_back_is_a_projection_that_shrinks(seed):
    weak, strong = noisy(seed, (4, 6), n=3)[0]  # three pairs: two directions
    forth = between(weak, strong, (WEAK, STRONG))
    there_and_back = forth.compose(forth.invert())
    matrix = there_and_back.matrix
    torch.testing.assert_close(matrix @ matrix, matrix, atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix, matrix.T, atol=1e-5, rtol=0)
    assert round(float(matrix.trace())) == 2
    assert 0 < there_and_back.scale <= 1 + 1e-9
    torch.testing.assert_close(there_and_back.mean_strong, forth.mean_weak, atol=1e-5, rtol=0)
    # Without noise nothing shrinks.
    x = rows(20, 4, seed)
    exact = between(x, 3 * x @ rotation(6, seed)[:, :4].T, (WEAK, STRONG))
    identity = exact.compose(exact.invert())
    torch.testing.assert_close(identity.matrix, torch.eye(4), atol=1e-5, rtol=0)
    assert identity.scale == pytest.approx(1, abs=1e-5)


@given(seeds)
def test_the_way_back_of_a_composition_is_the_composition_of_the_ways_back(seed):
    first, second = chain(seed, same_rows=True)  # of equal means: else the shift goes another way, too
    back, other = first.compose(second).invert(), second.invert().compose(first.invert())
    assert_equal(back, other, atol=1e-5)
    assert back.derived == "composed of last -> middle and middle -> weak"


@given(seeds, st.integers(3, 6))
def test_composition_in_logit_space(seed, k):
    z = rows(8 * k, k, seed)
    turns = [rotation(k, seed + 1), rotation(k, seed + 2)]
    middle = z @ turns[0].T
    first = between(z, middle, (WEAK, MIDDLE), "logit", beta=0.0, anchors=anchors(k))
    second = between(middle, middle @ turns[1].T, (MIDDLE, LAST), "logit", beta=0.0, anchors=anchors(k))
    composed, basis = first.compose(second), rotation(k, seed + 3).float()
    torch.testing.assert_close(composed.matrix.double(), turns[1] @ turns[0], atol=1e-5, rtol=0)  # z_last P = z
    twice = second.carry_basis(first.carry_basis(basis))
    torch.testing.assert_close(composed.carry_basis(basis), twice, atol=1e-5, rtol=0)
    assert (composed.scale, composed.beta, composed.anchors) == (1, 0.0, anchors(k))
    with pytest.raises(ValueError, match="two sets of anchors differ"):
        first.compose(dataclasses.replace(second, anchors=anchors(k + 1)))


def test_facts_of_a_composition():
    first, second = chain(1)
    first.dataset, second.dataset, second.source, second.num_pairs = "mteb/dtd (train)", "my/photos", "text", 7
    composed = first.compose(second)
    assert composed.derived == "composed of weak -> middle and middle -> last" and composed.through == ("middle",)
    assert (composed.source, composed.num_pairs) == ("text", 7)
    assert composed.dataset == "mteb/dtd (train) and my/photos"
    assert first.compose(dataclasses.replace(second, dataset=None, source="images")).dataset == "mteb/dtd (train)"
    third = dataclasses.replace(between(*noisy(2, (5, 3))[0], (LAST, STRONG)))
    left, right = composed.compose(third), first.compose(second.compose(third))
    assert_equal(left, right, atol=1e-5)
    assert left.derived == "composed of weak -> middle and middle -> last and last -> strong"
    assert first.derived is None and first.invert().derived is None


def test_bridges_that_do_not_meet():
    first, second = chain(1)
    with pytest.raises(ValueError, match="do not meet: one ends at 'last' .*main.*, the other begins at 'weak'"):
        second.compose(first)
    with pytest.raises(ValueError, match="one bridge is in embedding space, the other in logit space"):
        first.compose(dataclasses.replace(second, space="logit"))
    with pytest.raises(ValueError, match="without the factor of the way back: build it again"):
        dataclasses.replace(first, scale_back=None).invert()


# What a bridge is worth


def test_the_held_out_alignment_computed_directly():
    weak, strong = noisy(3, (4, 6), n=120)[0]
    held = slice(None, None, 10)
    bridge = between(weak, strong, (WEAK, STRONG), held_out=moment_of(strong[held], weak[held]))
    others = [i for i in range(120) if i % 10]
    fitted = between(weak[others], strong[others], (WEAK, STRONG))
    mapped, actual = ((x[held] - x[held].mean(0)) for x in (weak @ fitted.matrix.double().T, strong))
    assert bridge.held_out == pytest.approx(float((mapped * actual).sum() / (mapped.norm() * actual.norm())), rel=1e-5)
    assert_equal(dataclasses.replace(bridge, held_out=None, held_out_on=None), between(weak, strong, (WEAK, STRONG)))
    few = between(weak, strong, (WEAK, STRONG), held_out=moment_of(strong[:9], weak[:9]))
    assert few.held_out is None  # nine pairs tell little


def test_held_out_pairs_see_through_a_fit_to_noise():
    """100 pairs of unrelated rows in 150 directions: aligned where fitted, not elsewhere."""
    weak, strong = rows(100, 150), rows(100, 150, 1)
    bridge = between(weak, strong, (WEAK, STRONG), held_out=moment_of(strong[::10], weak[::10]))
    assert bridge.alignment > 0.7 and abs(bridge.held_out) < 0.15


def test_measured_on_other_images(model_dir, make_dataset, tmp_path):
    """On the pairs of the build it is the alignment of the build; a composed bridge keeps what was found."""
    models = [DualEncoder.from_pretrained(model_dir(*kind)) for kind in (("clip",), ("siglip",), ("clip", 1))]
    options = {"cache_dir": tmp_path, "progress": False}
    seen, other = make_dataset(30), make_dataset(30, seed=1)
    steps = [Bridge.build(*pair, seen, **options) for pair in (models[:2], models[1:])]
    assert steps[0].measure(*models[:2], seen, **options) == pytest.approx(steps[0].alignment, abs=1e-5)
    before = steps[0].alignment
    found = steps[0].measure(*models[:2], other, **options)
    assert found != pytest.approx(before, abs=1e-3) and steps[0].alignment == before
    composed = steps[0].compose(steps[1])
    assert composed.alignment is None and composed.held_out is None
    found = composed.measure(models[0], models[2], other, **options)
    assert composed.held_out == found and composed.alignment is None
    direct = Bridge.build(models[0], models[2], other, **options)
    assert found < direct.alignment <= 1
    names = anchors(12)
    text = Bridge.build(*models[:2], anchors=names)
    assert text.measure(*models[:2], anchors=names) == pytest.approx(text.alignment, abs=1e-5)
    assert text.held_out_on in (None, "names")
    found = text.measure(*models[:2], seen, **options)  # of images: that is the number to trust
    assert (text.held_out, text.held_out_on) == (found, "images") and f"{found:.3f} on images" in repr(text)
    assert text.measure(*models[:2]) != pytest.approx(text.alignment, abs=1e-3)
    logit = Bridge.build(*models[:2], seen, space="logit", anchors=names, **options)
    assert logit.measure(*models[:2], seen, **options) == pytest.approx(logit.alignment, abs=1e-5)
    with pytest.raises(ValueError, match="is measured on images: pass some"):
        logit.measure(*models[:2])
    with pytest.raises(ValueError, match="built for the strong model"):
        composed.measure(*models[:2], other, **options)
