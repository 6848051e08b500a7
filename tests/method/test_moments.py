"""Cross moments: sums, what is solved and read from them, and the pairs that are kept apart."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hf_transmiter.algebra import standardise
from hf_transmiter.data.anchors import Anchors
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.moments import HELD_OUT, CrossMoment, image_pairs, sum_dataset, sum_pairs


seeds = st.integers(0, 2**31)


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(strong, weak):
    moment = CrossMoment.zeros(strong.shape[1], weak.shape[1])
    moment.update(strong, weak)
    return moment


def assert_same(left, right):
    for field in dataclasses.fields(left):
        a, b = (torch.as_tensor(getattr(moment, field.name), dtype=torch.float64) for moment in (left, right))
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_rows_are_checked():
    moment = CrossMoment.zeros(3, 2)
    with pytest.raises(ValueError, match="rows must come in pairs, got 4 of the strong and 3 of the weak"):
        moment.update(rows(4, 3), rows(3, 2))
    bad = rows(4, 2)
    bad[1, 1] = float("nan")
    with pytest.raises(ValueError, match="weak rows hold NaN .* first in row 1"):
        moment.update(rows(4, 3), bad)
    assert moment.n == 0  # nothing of the refused rows was added
    moment.update(rows(1, 3), rows(1, 2))
    with pytest.raises(ValueError, match="at least two pairs, got 1: pass more images or names"):
        moment.centred()


@given(seeds, st.integers(2, 9), st.integers(1, 9))
def test_a_difference_is_the_moment_of_the_other_rows(seed, kept, taken):
    strong, weak = rows(kept + taken, 4, seed), rows(kept + taken, 3, seed + 1)
    difference = moment_of(strong, weak) - moment_of(strong[kept:], weak[kept:])
    assert_same(difference, moment_of(strong[:kept], weak[:kept]))


@given(seeds, st.integers(2, 5), st.integers(0, 3))
def test_alignment_is_a_correlation(seed, d, extra):
    """The correlation, over all entries, of mapped and actual rows; for orthonormal columns exactly that."""
    matrix = torch.linalg.qr(rows(d + extra, d, seed))[0]
    weak, strong = rows(30, d, seed + 1), rows(30, d + extra, seed + 2)
    strong += 2 * weak @ matrix.T
    found = moment_of(strong, weak).alignment(matrix)
    mapped = weak @ matrix.T
    assert found == pytest.approx(float((mapped * strong).sum() / (mapped.norm() * strong.norm())))
    # Scales of either side do not matter, a perfect map has 1, and the way back has the same.
    assert moment_of(7 * strong, 3 * weak).alignment(matrix) == pytest.approx(found)
    assert moment_of(mapped, weak).alignment(matrix) == pytest.approx(1)
    assert moment_of(weak, strong).alignment(matrix.T) == pytest.approx(found)


@given(seeds, st.integers(2, 5), st.integers(2, 5))
def test_the_solution_is_the_best_aligned_of_all_maps(seed, m, k):
    moment = moment_of(rows(20, m, seed), rows(20, k, seed + 1))
    matrix, fit = moment.solve("embedding")
    assert_same(fit, moment.centred())
    best = fit.alignment(matrix)
    for other in range(5):
        size = max(m, k)
        turned = torch.linalg.qr(rows(size, size, seed + 2 + other))[0][:m, :k]
        assert fit.alignment(turned / torch.linalg.matrix_norm(turned, 2).clamp(min=1)) <= best + 1e-9


def test_every_tenth_pair_is_kept_apart():
    strong, weak = rows(57, 4), rows(57, 3, 1)
    blocks = [(strong[:40], weak[:40]), (strong[40:], weak[40:])]
    total, part = sum_pairs(blocks, 4, 3)
    assert_same(total, moment_of(strong, weak))
    taken = [*range(0, 40, HELD_OUT), *range(40, 57, HELD_OUT)]
    assert_same(part, moment_of(strong[taken], weak[taken]))
    assert sum_pairs([], 4, 3)[0].n == 0  # a process without images


def test_moments_of_two_models(model_dir, make_dataset, tmp_path):
    pair = DualEncoder.from_pretrained(model_dir("clip")), DualEncoder.from_pretrained(model_dir("siglip"))
    weak, strong = pair
    dataset, names = make_dataset(25), Anchors((), ("cat", "dog", "red car", "old tree"))
    options = {"cache_dir": tmp_path, "progress": False}
    tables = [embed_dataset(model, dataset, **options) for model in pair]
    x_weak, x_strong = (table.embeds for table in tables)
    texts = [model.embed_names(names.names, names.templates) for model in pair]
    z_weak, z_strong = (
        standardise(model.logits(x, a))[0] for model, x, a in zip(pair, (x_weak, x_strong), texts, strict=True)
    )
    expected = {"embedding": moment_of(x_strong, x_weak), "logit": moment_of(z_strong, z_weak)}
    for space, moment in expected.items():
        found, part, span = sum_dataset(weak, strong, dataset, space, names, **options)
        assert span is None  # no more names than dimensions
        for field in dataclasses.fields(found):
            a, b = (torch.as_tensor(getattr(m, field.name), dtype=torch.float64) for m in (found, moment))
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
        assert (found.n, part.n) == (25, 3)
    pairs = list(image_pairs(weak, strong, tables, None))
    assert_same(sum_pairs(pairs, strong.embed_dim, weak.embed_dim)[0], expected["embedding"])
    found, _, _ = sum_dataset(weak, strong, None, "embedding", names)
    assert_same(found, moment_of(texts[1], texts[0]))
    ((block, _),) = pairs
    torch.testing.assert_close(block, normalize(block, dim=1))


@pytest.mark.parametrize("beta", [1e-3, 1.0, 500.0, float("inf")])
def test_a_bridge_of_many_names_is_solved_in_the_span_of_their_logits(beta, model_dir, make_dataset, tmp_path):
    """Exactly that of all K names: the moment is (q, q), and beyond the span both are the identity."""
    pair = weak, strong = [DualEncoder.from_pretrained(model_dir(family)) for family in ("clip", "siglip")]
    names = Anchors((), tuple(f"thing {number} of {number % 7}" for number in range(50)))
    dataset, options = make_dataset(25), {"cache_dir": tmp_path, "progress": False}
    moment, held_out, span = sum_dataset(weak, strong, dataset, "logit", names, **options)
    q = weak.embed_dim + strong.embed_dim
    assert span.shape == (50, q) and moment.xy.shape == (q, q) and q < 50
    tables = [embed_dataset(model, dataset, **options) for model in pair]
    texts = [model.embed_names(names.names, names.templates) for model in pair]
    whole = sum_pairs(image_pairs(weak, strong, tables, texts), 50, 50)
    pair = [ModelId.of(model) for model in pair]
    found = Bridge.from_moment(moment, *pair, space="logit", beta=beta, held_out=held_out, span=span, anchors=names)
    expected = Bridge.from_moment(whole[0], *pair, space="logit", beta=beta, held_out=whole[1], anchors=names)
    torch.testing.assert_close(found.matrix, expected.matrix, atol=2e-5, rtol=0)
    assert (found.alignment, found.held_out) == pytest.approx((expected.alignment, expected.held_out), abs=1e-5)
    assert found.mean_strong.shape == found.mean_weak.shape == (50,)
    built = Bridge.build(weak, strong, dataset, space="logit", anchors=names, beta=beta, **options)
    torch.testing.assert_close(built.matrix, found.matrix)
    assert built.measure(weak, strong, dataset, **options) == pytest.approx(found.alignment, abs=1e-5)
