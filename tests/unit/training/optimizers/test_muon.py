"""Newton-Schulz iterations, and the learning rate of a matrix."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from univitar_ds.training.optimizers.matrices import multiplications
from univitar_ds.training.optimizers.muon import orthogonalised, rate_ratio


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (5, 60)])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix, 5)
    assert found.shape == shape
    inner = u.T @ found @ v.T
    values = inner.diagonal()
    assert 0.6 < values.min() <= values.max() < 1.3
    assert (inner - values.diag()).abs().max() < 1e-4


def test_the_multiplications_of_an_iteration_are_those_that_torch_counts():
    for shape in ((24, 24), (48, 16), (5, 60)):
        with FlopCounterMode(display=False) as counter:
            orthogonalised(torch.ones(shape), 3)
        assert counter.get_total_flops() == 2 * 3 * multiplications(shape)


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalised(torch.zeros(3, 4), 5).any()


def test_the_learning_rate_follows_the_shape():
    assert rate_ratio((8, 2), "original") == 2.0
    assert rate_ratio((2, 8), "original") == 1.0
    assert rate_ratio((2, 16), "match_rms_adamw") == rate_ratio((16, 2), "match_rms_adamw") == 0.2 * math.sqrt(16)
