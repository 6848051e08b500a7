"""Muon against its definition and against torch's own."""

import pytest
import torch
from muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_orthogonalize_keeps_the_singular_vectors_and_flattens_the_values(shape):
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ result @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert ((values - torch.diag_embed(diagonal)).abs() < 1e-4).all()
    # The smallest singular values of a square Gaussian matrix may not reach 0.6 in five steps.
    assert diagonal.max() < 1.3 and diagonal.median() > 0.6


def test_orthogonalize_treats_each_matrix_alone():
    matrices = torch.randn(3, 8, 16)
    alone = torch.cat([orthogonalize(m[None]) for m in matrices])
    torch.testing.assert_close(orthogonalize(matrices), alone)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9")
def test_follows_torch_muon_up_to_its_half_precision():
    start, target = torch.randn(24, 12), torch.randn(24, 12)
    ends = []
    for make in (
        lambda p: Muon(p, lr=0.02, weight_decay=0.1),
        lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        matrix = torch.nn.Parameter(start.clone())
        optimizer = make([matrix])
        for _ in range(5):
            optimizer.zero_grad()
            (matrix - target).square().sum().backward()
            optimizer.step()
        ends.append(matrix.detach())
    assert (ends[0] - ends[1]).norm() < 0.02 * (ends[0] - start).norm()


def test_parameters_without_gradient_stay():
    used, unused = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Muon([used, unused], lr=0.1)
    (used * torch.eye(4)).sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(4, 4)) and not torch.equal(used, torch.ones(4, 4))
