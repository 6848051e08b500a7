"""Neighbours in an index of old embeddings, asked by the new model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.encoders.identity import ModelId
from hf_transmiter.evaluation.retrieval import (
    INDEX,
    OLD,
    QUERIES,
    evaluate_bridge,
    index_verdict,
    nearest,
    recall,
    recalls,
)
from hf_transmiter.hub.scores import Score
from hf_transmiter.method import bridge as bridges
from hf_transmiter.method.bridge import Bridge
from hf_transmiter.method.moments import sum_pairs


def unit_rows(n, d, seed=0):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def bridge_of(strong, weak, space="embedding"):
    moment, _ = sum_pairs([(strong, weak)], strong.shape[1], weak.shape[1])
    return Bridge.from_moment(moment, ModelId("weak", None, "w"), ModelId("strong", None, "s"), space=space)


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_neighbours_are_the_nearest_others(seed, k):
    index, queries = unit_rows(40, 6, seed), unit_rows(7, 6, seed + 1)
    found = nearest(queries, index, k)
    scores = queries @ index.T
    assert torch.equal(scores.gather(1, found), scores.sort(1, descending=True).values[:, :k])
    own = torch.tensor([3, 30])
    others = nearest(index[own], index, k, own)
    assert (others != own[:, None]).all() and others[0, 0] == nearest(index[own], index, 2)[0, 1]
    assert recall(found, found.flip(1)) == 100 and recall(found, found + 100) == 0
    assert recall(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 9], [3, 4]])) == 75


@given(st.integers(0, 2**31))
def test_a_turned_model_loses_nothing(seed):
    """Where the strong model is the weak one turned, translated rows are the strong model's own."""
    weak = unit_rows(60, 8, seed)
    turn = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(seed + 1)))[0]
    strong = weak @ turn.T
    bridge = bridge_of(strong, weak)
    torch.testing.assert_close(bridge.translate(weak), strong, atol=1e-5, rtol=0)
    torch.testing.assert_close(bridge.translate_queries(strong), weak, atol=1e-5, rtol=0)
    found = recalls(bridge, weak, strong, range(0, 60, 3))
    assert min(value for row in found.values() for value in row.values()) > 99
    texts = unit_rows(5, 12, seed + 2)  # queries that are no pictures
    expected = nearest(texts, bridge.translate(weak), 3)
    assert recall(nearest(bridge.translate_queries(texts), weak, 3), expected) > 90


def test_arrays_blocks_lengths_and_half_precision(monkeypatch, tmp_path):
    """An index as people have it: a file of numpy rows, larger than a block, perhaps in half precision or not unit."""
    weak, strong = unit_rows(50, 4), unit_rows(50, 6, 1)
    bridge = bridge_of(strong, weak)
    x, q = (weak - bridge.mean_weak).double(), bridge.matrix.double()
    expected = normalize(bridge.mean_strong + bridge.scale * x @ q.T, dim=1).float()
    torch.testing.assert_close(bridge.translate(weak), expected)
    torch.testing.assert_close(bridge.translate_queries(strong), normalize(strong @ bridge.matrix, dim=1))
    monkeypatch.setattr(bridges, "_BLOCK", 7)
    np.save(tmp_path / "index.npy", 3 * weak.numpy())
    for rows in (weak.numpy(), np.load(tmp_path / "index.npy", mmap_mode="r")):
        found = bridge.translate(rows)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    torch.testing.assert_close(bridge.translate(weak.bfloat16()), expected, atol=0.02, rtol=0)
    assert bridge.translate(weak[:0]).shape == (0, 6) and bridge.translate_queries(strong.numpy()[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match="rows to translate, counted from 14, hold NaN .* first in row 1 "):
        bridge.translate(torch.cat([weak[:15], weak[:3] / 0]))


def of_ways(old, new, count=500):
    values = {OLD: old, INDEX: new}
    return [
        Score(way, "test", f"recall@{k}", value, num_images=count)
        for way, found in values.items()
        for k, value in zip((1, 10), found, strict=True)
    ]


def test_the_verdict_tells_only_what_is_clear():
    assert index_verdict(of_ways((40, 60), (50, 70))).startswith("Translate the index: new queries")
    assert "recall@1 50.0 % against 40.0 % and recall@10 70.0 % against 60.0 %" in index_verdict(
        of_ways((40, 60), (50, 70))
    )
    assert index_verdict(of_ways((40, 60), (50, 70), 50)).startswith("No clear difference")
    assert index_verdict(of_ways((40, 60), (30, 61))).startswith("Keep the old model and its index")
    assert index_verdict(of_ways((40, 60), (30, 80))).startswith("It depends")
    assert "(1000 pictures asked)" in index_verdict(of_ways((40, 60), (40, 60), 5000))


def test_what_is_wrong_with_rows_is_said():
    weak, strong = unit_rows(30, 4), unit_rows(30, 6)
    bridge = bridge_of(strong, weak)
    with pytest.raises(ValueError, match=r"rows of 'weak' are \(N, 4\), these are \(30, 6\)"):
        bridge.translate(strong)
    with pytest.raises(ValueError, match=r"rows of 'strong' are \(N, 6\), these are \(30, 4\)"):
        bridge.translate_queries(weak)
    with pytest.raises(ValueError, match="hold NaN or infinite values"):
        bridge.translate(weak / 0)
    with pytest.raises(ValueError, match="a bridge of logits translates no embeddings"):
        bridge_of(strong[:, :4], weak, "logit").translate(weak)
    with pytest.raises(ValueError, match="recall@10 needs more than 10 pictures, there are 10"):
        recalls(bridge, weak[:10], strong[:10], [0])


def test_a_bridge_is_evaluated_on_pictures(model_dir, make_dataset, tmp_path):
    weak, strong = (DualEncoder.from_pretrained(model_dir(family)) for family in ("clip", "siglip"))
    options = {"cache_dir": tmp_path, "progress": False}
    bridge = Bridge.build(weak, strong, make_dataset(60), **options)
    scores = evaluate_bridge(bridge, weak, strong, make_dataset(24, seed=1), dataset_name="photos", **options)
    ways = [(way, f"recall@{k}") for way in (OLD, INDEX, QUERIES) for k in (1, 10)]
    assert [(score.method, score.metric) for score in scores] == ways
    assert all(0 <= score.value <= 100 and score.num_images == 24 for score in scores)
    with pytest.raises(ValueError, match="the bridge was built for the weak model"):
        evaluate_bridge(bridge, strong, strong, make_dataset(24), **options)
