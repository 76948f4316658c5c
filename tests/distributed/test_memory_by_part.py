"""Compares the bytes of the parts of a training state with the sizes that follow from the ZeRO stage."""

import pytest

from tests.support.distributed import run_distributed
from tests.support.training import engine_of, steps
from univitar_ds.training.distributed.process_group import start_world

pytestmark = pytest.mark.distributed


def measured():
    """By ZeRO stage: bytes by part, and numbers of all weights and of trained weights, in float32."""
    world, found = start_world(), {}
    for stage in (2, 3):
        engine = engine_of(world, stage=stage, kept_whole=0)
        steps(engine, 0, 1)
        sizes = [(getattr(one, "ds_numel", one.numel()), one.requires_grad) for one in engine.module.parameters()]
        found[stage] = engine.memory_by_part(), sum(size for size, _ in sizes), sum(size for size, on in sizes if on)
        engine.close()
    return found


def test_the_parts_have_the_bytes_of_their_zero_stage():
    """Master weights and moments are sharded over two ranks, with ZeRO-3 also weights and gradients. Padding is
    small."""
    for found in run_distributed(measured, 2):
        for stage, (parts, weights, trained) in found.items():
            said = (stage, parts, weights, trained)
            assert parts["average"] == parts["teacher"] == 0
            assert 3 * 4 * trained / 2 <= parts["optimizer"] <= 1.2 * 3 * 4 * trained / 2, said
            held = 4 * weights / (2 if stage == 3 else 1)
            assert held <= parts["weights"] <= 1.2 * held, said
        parts, _, trained = found[3]
        assert 4 * trained / 2 <= parts["gradients"] <= 1.2 * 4 * trained / 2, parts
