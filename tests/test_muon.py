"""Muon: its matrices' steps are orthogonal, of AdamW's size; all else is AdamW."""

import pytest
import torch
from torch import nn

from muybridge.errors import UsageError
from muybridge.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_singular_values_go_near_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # In the basis of the singular vectors it is diagonal.
    inside = u.mT @ found @ v.mT
    assert (inside - torch.diag(torch.diagonal(inside))).abs().max() < 1e-4


def test_a_matrix_takes_the_step_of_the_equation():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))
    before, gradient = weight.detach().clone(), torch.randn(6, 4)
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    weight.grad = gradient.clone()
    optimizer.step()
    expected = before - 0.1 * 0.2 * 6**0.5 * orthogonalised(gradient + 0.9 * gradient)
    torch.testing.assert_close(weight.detach(), expected)
    # Its root mean square is about 0.2 lr, as an AdamW step's.
    assert 0.1 < (weight.detach() - before).square().mean().sqrt() / 0.1 < 0.3


def test_what_is_no_matrix_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12)) for _ in range(2))
    one = Muon([ours], lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(12)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step(), other.step()
    torch.testing.assert_close(ours, theirs)


def test_its_state_goes_on_where_it_stopped():
    torch.manual_seed(0)
    gradients = [(torch.randn(4, 4), torch.randn(4)) for _ in range(6)]

    def run(parameters, optimizer, these):
        for pair in these:
            for parameter, gradient in zip(parameters, pair, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    whole = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    run(whole, Muon(whole), gradients)
    parts = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    first = Muon(parts)
    run(parts, first, gradients[:3])
    second = Muon(parts)
    second.load_state_dict(first.state_dict())
    run(parts, second, gradients[3:])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_what_it_cannot_do_is_said():
    with pytest.raises(UsageError, match="momentum"):
        Muon([nn.Parameter(torch.ones(2))], momentum=1.0)
