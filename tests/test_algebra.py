"""The algebra: each closed form against a direct computation, each streamed sum against all rows at once."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_transmiter.algebra import (
    PairSums,
    check_finite,
    class_pull,
    coverage,
    discriminant,
    discriminant_head,
    divergence,
    fit_temperature,
    guessing,
    polar,
    ridge,
    spread,
    standardise,
)
from hf_transmiter.method.moments import CrossMoment
from hf_transmiter.settings import LAMBDAS


seeds = st.integers(0, 2**31)


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(rows(d, d, seed))[0]


def row_blocks(tensors, size):
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def split(tensor, cuts):
    """`tensor` cut at the given places, empty pieces included."""
    return torch.tensor_split(tensor, sorted(cuts))


# Standardised logits


@given(seeds, st.integers(1, 5), st.integers(2, 9), st.floats(1, 100), st.floats(-50, 50))
def test_standardise_round_trip(seed, n, k, spread, offset):
    logits = (rows(n, k, seed) * spread + offset).float()
    z, std, mean = standardise(logits)
    assert z.shape == (n, k) and std.shape == mean.shape == (n, 1)
    torch.testing.assert_close(z * std + mean, logits, atol=1e-4, rtol=1e-5)
    assert (z * std).mean(1).abs().max() < 1e-4
    own = logits.double().std(1)
    torch.testing.assert_close(z.double().std(1), own / (own + 1e-6), atol=1e-4, rtol=1e-3)


def test_standardise_published_numbers():
    # One row of CLIP-like logits over 32 anchors and what the published arithmetic (unbiased std, + 1e-6) makes of it.
    logits = torch.tensor(
        [
            *(17.151098, 18.510208, 19.921263, 21.283903, 21.968204, 14.606887, 26.084852, 12.926977, 22.260201),
            *(15.663137, 20.007652, 18.524965, 20.971436, 25.117050, 16.802862, 19.488924, 17.087769, 20.676146),
            *(22.579655, 19.159054, 20.360668, 22.370632, 19.826565, 20.284636, 23.340818, 20.853292, 19.512318),
            *(19.149658, 24.344051, 16.771400, 20.357012, 17.111021),
        ]
    )
    z = standardise(logits[None])[0][0]
    expected = torch.tensor([-0.9170411, -0.4545657, 0.0255854, 0.4892621, 0.7221150, -1.7827806, 2.1229203])
    torch.testing.assert_close(z[:7], expected, atol=2e-6, rtol=0)


def test_a_constant_row_stays_finite():
    z, std, mean = standardise(torch.full((2, 4), 3.0))
    assert z.abs().max() == 0 and torch.isfinite(std).all()


def test_check_finite_names_the_row():
    good = rows(4, 2)
    assert check_finite(good, "rows") is good
    bad = good.clone()
    bad[2, 1], bad[3, 0] = float("inf"), float("nan")
    with pytest.raises(
        ValueError, match=r"the rows hold NaN or infinite values, first in row 2 \(in 2 rows\).*float32"
    ):
        check_finite(bad, "the rows")


# Streamed sums


@given(seeds, st.lists(st.integers(0, 11), max_size=4))
def test_sums_do_not_depend_on_the_split(seed, cuts):
    x, y = rows(11, 4, seed), rows(11, 3, seed + 1)
    for kind in (CrossMoment, PairSums):
        sums, pairs = kind.zeros(4, 3), (x, y)
        once = dataclasses.replace(
            sums, **{key: torch.clone(v) if torch.is_tensor(v) else v for key, v in vars(sums).items()}
        )
        once.update(*pairs)
        for block in zip(*(split(tensor, cuts) for tensor in pairs), strict=True):
            sums.update(*block)
        for field in dataclasses.fields(sums):
            left, right = (torch.as_tensor(getattr(s, field.name), dtype=torch.float64) for s in (sums, once))
            torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)


def test_sums_are_what_they_say():
    x, y = rows(9, 4), rows(9, 3, 1)
    moment, pairs = CrossMoment.zeros(4, 3), PairSums.of([(x[:5].float(), y[:5].float()), (x[5:], y[5:])], 4, 3)
    moment.update(x, y)
    assert moment.n == pairs.n == 9
    for sums in (moment, pairs):
        torch.testing.assert_close(sums.x, x.sum(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sums.y, y.sum(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sums.xx, torch.einsum("ni,nj->ij", x, x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sums.xy, torch.einsum("ni,nj->ij", x, y), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moment.yy, torch.einsum("ni,nj->ij", y, y))
    centred = moment.centred()
    torch.testing.assert_close(centred.x, x.mean(0))
    torch.testing.assert_close(centred.xy, (x - x.mean(0)).T @ (y - y.mean(0)))
    torch.testing.assert_close(centred.yy, (y - y.mean(0)).T @ (y - y.mean(0)))
    torch.testing.assert_close(centred.xx, (x - x.mean(0)).T @ (x - x.mean(0)))
    assert {moment.xy.dtype, moment.yy.dtype, pairs.xx.dtype, pairs.xy.dtype} == {torch.float64}


# Orthogonal Procrustes


@given(seeds, st.integers(2, 8))
def test_polar_recovers_a_planted_rotation(seed, d):
    planted = rotation(d, seed)
    x = rows(5 * d, d, seed + 1)
    found = polar(x.T @ (x @ planted))
    torch.testing.assert_close(found, planted, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(d, dtype=torch.float64), atol=1e-10, rtol=0)


@given(seeds, st.integers(2, 6), st.integers(2, 6))
def test_polar_is_the_best_orthogonal_map(seed, m, n):
    moment = rows(m, n, seed)
    best, singular = polar(moment), torch.linalg.svdvals(moment)
    assert float((best * moment).sum()) == pytest.approx(float(singular.sum()), rel=1e-9)
    for other in range(3):
        u, v = rotation(m, seed + other)[:, : min(m, n)], rotation(n, seed + 10 + other)[:, : min(m, n)]
        assert float((u @ v.T * moment).sum()) <= float(singular.sum()) + 1e-9


def test_polar_without_full_rank_is_a_partial_isometry():
    moment = rows(6, 2, 1) @ rows(2, 5, 2)
    q = polar(moment, rank_tolerance=1e-3)
    projection = q.T @ q
    torch.testing.assert_close(projection @ projection, projection)
    assert int(projection.trace().round()) == 2
    torch.testing.assert_close(moment @ projection, moment)  # nothing that the moment knows is lost
    full = polar(moment)
    assert int((full.T @ full).trace().round()) == 5  # without a tolerance: filled up with arbitrary directions
    assert polar(torch.zeros(3, 2, dtype=torch.float64), 1e-3).abs().max() == 0


# Ridge


def dense_ridge(x, y, prior, penalty):
    """Weight and bias by least squares over the stacked system, the unpenalised bias as a column of ones."""
    n, d = x.shape
    design = torch.cat([torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1), torch.zeros(d, d + 1, dtype=x.dtype)])
    design[n:, :d] = penalty**0.5 * torch.eye(d, dtype=x.dtype)
    solution = torch.linalg.lstsq(design, torch.cat([y, penalty**0.5 * prior])).solution
    return solution[:d], solution[d]


def mean_eigenvalue(x):
    return float((x - x.mean(0)).square().sum()) / x.shape[1]


@given(seeds, st.integers(6, 20), st.integers(2, 5), st.sampled_from(LAMBDAS), st.integers(1, 30))
def test_ridge_is_the_dense_solution(seed, n, d, lam, block):
    x, y, prior = rows(n, d, seed) + 0.5, rows(n, 3, seed + 1) - 2, rows(d, 3, seed + 2)
    found = ridge(lambda: row_blocks((x, y), block), prior, (lam,))
    weight, bias = dense_ridge(x, y, prior, lam * mean_eigenvalue(x))
    torch.testing.assert_close(found.weight.double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias.double(), bias, atol=1e-5, rtol=1e-4)
    assert found.lam == lam and found.errors == {}


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_errors_are_those_of_leaving_one_out(seed):
    x, y, prior = rows(12, 4, seed) + 1, rows(12, 3, seed + 10), rows(4, 3, seed + 20)
    lambdas = (0.01, 0.3, 10.0)
    found = ridge(lambda: row_blocks((x, y), 5), prior, lambdas)
    for lam in lambdas:
        penalty, total = lam * mean_eigenvalue(x), 0.0
        for i in range(12):
            keep = [j for j in range(12) if j != i]
            weight, bias = dense_ridge(x[keep], y[keep], prior, penalty)
            total += float((x[i] @ weight + bias - y[i]).square().sum())
        assert found.errors[lam] == pytest.approx(total / y.numel(), rel=1e-6)
    assert found.lam == min(found.errors, key=found.errors.get)


def test_ridge_chooses_by_what_the_data_say():
    x, prior = rows(200, 5), rows(5, 2, 1)
    noise = rows(200, 2, 2)
    signal = x @ rows(5, 2, 3)
    assert ridge(lambda: [(x, signal + 0.01 * noise)], prior).lam == min(LAMBDAS)
    assert ridge(lambda: [(x, x @ prior + noise)], prior).lam >= 1


def test_an_infinite_penalty_gives_the_prior():
    x, y, prior = rows(20, 4), rows(20, 3, 1), rows(4, 3, 2)
    found = ridge(lambda: [(x, y)], prior, (1e12,))
    torch.testing.assert_close(found.weight.double(), prior, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.bias.double(), (y - x @ prior).mean(0), atol=1e-5, rtol=0)


def test_a_tiny_penalty_recovers_a_linear_map():
    x, weight = rows(30, 4), rows(4, 3, 1)
    found = ridge(lambda: [(x, x @ weight + 7)], torch.zeros(4, 3), (1e-9,))
    torch.testing.assert_close(found.weight.double(), weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, torch.full((3,), 7.0), atol=1e-5, rtol=0)


def test_ridge_refuses_what_it_cannot_fit():
    x, y, prior = rows(4, 2), rows(4, 3), torch.zeros(2, 3)
    for blocks in ([], [(x[:1], y[:1])]):
        with pytest.raises(ValueError, match="at least two images"):
            ridge(lambda blocks=blocks: blocks, prior)
    bad = x.clone()
    bad[1, 0] = float("nan")
    with pytest.raises(ValueError, match="the embeddings hold NaN .* first in row 1"):
        ridge(lambda: [(bad, y)], prior)
    with pytest.raises(ValueError, match="the targets hold NaN"):
        ridge(lambda: [(x, y / 0)], prior)


# Linear discriminant


def classes(seed=0):
    """Three Gaussian classes in five dimensions, sizes 10, 14, 6."""
    labels = torch.tensor([0] * 10 + [1] * 14 + [2] * 6)
    return rows(30, 5, seed) + 2 * rows(3, 5, seed + 1)[labels], labels


def sums_of(x, q, block=100):
    return PairSums.of(row_blocks((x, q), block), x.shape[1], q.shape[1])


def test_discriminant_with_hard_labels_is_the_textbook_one():
    x, labels = classes()
    q = torch.nn.functional.one_hot(labels, 3).double()
    weight, bias = discriminant(sums_of(x, q), shrinkage=0.0, pseudo_count=0.0)
    x, labels = x.numpy(), labels.numpy()
    means = np.stack([x[labels == c].mean(0) for c in range(3)])
    covariance = sum((x[labels == c] - means[c]).T @ (x[labels == c] - means[c]) for c in range(3)) / len(x)
    inverse = np.linalg.inv(covariance)
    textbook = x @ inverse @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, inverse, means)
    ours = x @ weight.double().numpy().T + bias.double().numpy()
    for logits in (textbook, ours):
        logits -= logits.mean(1, keepdims=True)  # equal up to a constant per image
    np.testing.assert_allclose(ours, textbook, atol=1e-4)


def test_a_class_without_images_gets_no_weight():
    x, labels = classes()
    q = torch.nn.functional.one_hot(labels, 4).double()
    weight, bias = discriminant(sums_of(x, q))
    assert weight[3].abs().max() == 0 and bias[3] == 0
    assert weight[:3].abs().sum(1).min() > 0


@given(seeds, st.integers(1, 30))
def test_discriminant_does_not_depend_on_blocks(seed, block):
    x, q = rows(30, 5, seed), rows(30, 3, seed + 1).softmax(1)
    for left, right in zip(discriminant(sums_of(x, q, block)), discriminant(sums_of(x, q)), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


def test_discriminant_follows_rotations_and_permutations():
    x, labels = classes()
    q = (3 * torch.nn.functional.one_hot(labels, 3).double()).softmax(1)
    weight, bias = discriminant(sums_of(x, q))
    turn = rotation(5, 7)
    turned, same = discriminant(sums_of(x @ turn, q))
    torch.testing.assert_close(turned, weight @ turn.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(same, bias, atol=1e-5, rtol=1e-4)
    for order in itertools.permutations(range(3)):
        swapped, shifted = discriminant(sums_of(x, q[:, order]))
        torch.testing.assert_close(swapped, weight[list(order)], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(shifted, bias[list(order)], atol=1e-6, rtol=1e-5)


def test_shrinkage_by_the_number_of_images():
    """d / (N - 1) between 0.3 and 1."""
    for count, shrinkage in ((30, 0.3), (11, 0.5), (4, 1.0)):
        x, q = rows(count, 5), rows(count, 3, 1).softmax(1)
        for left, right in zip(discriminant(sums_of(x, q)), discriminant(sums_of(x, q), shrinkage), strict=True):
            assert torch.equal(left, right)


@given(seeds)
def test_standardised_sums_are_those_of_standardised_rows(seed):
    x, y = rows(20, 4, seed) * torch.tensor([1.0, 0.1, 10.0, 0.0]) + 3, rows(20, 2, seed + 1)
    scaled, mean, std = sums_of(x, y).standardised()
    torch.testing.assert_close(mean, x.mean(0))
    assert std[3] == 1  # it never varies
    expected = sums_of((x - mean) / std, y)
    for name in ("x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(scaled, name), getattr(expected, name), atol=1e-6, rtol=1e-6)
    whole, part = sums_of(x, y), sums_of(x[:5], y[:5])
    torch.testing.assert_close((whole - part).xy, sums_of(x[5:], y[5:]).xy)


# Soft labels


def test_even_labels_take_back_the_pull_of_a_class():
    """Of labels with a constant added to one class, as of a model that answers it too often."""
    truth = torch.arange(4).repeat(50)
    fair = 3 * torch.nn.functional.one_hot(truth, 4).double() + rows(200, 4)
    pulled = fair + torch.tensor([2.0, 0.0, 0.0, 0.0])
    hits = [float((z.argmax(1) == truth).double().mean()) for z in (fair, pulled, pulled - class_pull(pulled))]
    assert hits[1] < hits[0] - 0.1 and hits[2] > hits[0] - 0.05, hits
    assert class_pull(pulled).shape == (4,) and class_pull(pulled).argmax() == 0


def test_labels_of_many_images_are_read_in_blocks():
    """Of images that are there three times, in more than one block, the same comes out as of each once."""
    logits = 3 * rows(3000, 5) + torch.tensor([2.0, 0.0, 0.0, 0.0, -1.0])
    often = logits.repeat(3, 1)
    torch.testing.assert_close(class_pull(often), class_pull(logits))
    assert coverage(often.softmax(1)) == pytest.approx(coverage(logits.softmax(1)))


@given(seeds)
def test_coverage(seed):
    even, quarter = torch.eye(20).repeat(30, 1), torch.eye(20)[:5].repeat(120, 1)
    assert coverage(even) == pytest.approx(1, abs=1e-6) and coverage(quarter) == pytest.approx(0.25, abs=1e-6)
    drawn = torch.randint(20, (12,), generator=torch.Generator().manual_seed(seed))
    assert 0.5 < coverage(torch.eye(20)[drawn]) < 1.4  # twelve images cannot hold more classes


@given(seeds, st.floats(0.05, 20))
def test_temperature_is_found(seed, factor):
    logits = rows(40, 5, seed)
    q = (factor * logits).softmax(1)
    assert fit_temperature(logits, q) == pytest.approx(factor, rel=1e-4)
    assert divergence(q, factor * logits) == pytest.approx(0, abs=1e-9)
    noisy = (factor * logits + rows(40, 5, seed + 1)).softmax(1)
    best = fit_temperature(logits, noisy)
    for other in (0.9 * best, 1.1 * best):
        assert divergence(noisy, best * logits) <= divergence(noisy, other * logits)


def test_shrinkage_pulls_towards_differences_of_means():
    x, labels = classes()
    q = torch.nn.functional.one_hot(labels, 3).double()
    weight, _ = discriminant(sums_of(x, q), shrinkage=1e6, pseudo_count=0.0)
    offsets = torch.stack([x[labels == c].mean(0) for c in range(3)]) - x.mean(0)
    cosine = torch.nn.functional.cosine_similarity(weight.double(), offsets)
    assert cosine.min() > 0.99999


@pytest.mark.parametrize("sign", [1, -1])
def test_discriminant_head_is_two_heads_of_equal_spread(sign):
    x, labels = (t.float() for t in classes())
    said = 4 * torch.nn.functional.one_hot(labels.long(), 3).float() + rows(30, 3, 9).float()
    weight, bias = discriminant(sums_of(x, said.softmax(1)), 2.0)
    prior = sign * weight + 0.3 * rows(3, 5, 8).float()  # of one mind with the discriminant, or against it
    vectors = discriminant_head(lambda: row_blocks((x, said), 7), prior, 2.0)
    expected = weight / spread(x @ weight.T + bias) + prior / spread(x @ prior.T)
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)


def test_discriminant_head_refuses():
    x, said = rows(4, 2).float(), rows(4, 3).float()
    with pytest.raises(ValueError, match="at least two images, got 1"):
        discriminant_head(lambda: [(x[:1], said[:1])], torch.zeros(3, 2), 1.0)
    for blocks, message in (([(x / 0, said)], "the embeddings hold NaN"), ([(x, said / 0)], "the label logits hold")):
        with pytest.raises(ValueError, match=message):
            discriminant_head(lambda blocks=blocks: blocks, torch.zeros(3, 2), 1.0)


def test_guessing_is_told_from_knowing():
    assert guessing(2.8, 1000, 36) == pytest.approx(100 / 36)
    assert guessing(3.8, 1000, 36) is not None and guessing(3.9, 1000, 36) is None  # two standard errors
    assert guessing(55.0, 100, 2) == 50.0 and guessing(65.0, 100, 2) is None
    assert guessing(0.0, 29, 2) is None  # too few to tell
    assert guessing(100.0, 1000, 1) is None  # there is nothing to guess
