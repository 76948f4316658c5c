"""Optimizer states on a disk: training, checkpoints and averages are those with the states in memory, bit for bit."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.test_skipped import step
from tests.support.disk import needs_disk
from tests.support.distributed import run_distributed
from tests.support.standin import LANES, StandIn
from tests.support.training import ds_config, norm_of_parts, steps
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import EMA, MASTER
from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine import disk
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.step.train_step import NotFiniteError

pytestmark = [pytest.mark.distributed, needs_disk]
CAPTIONS, STEPS = 40_000, 4
"""An embedding of 40,000 rows of 16 values is 2.6 MB, of which two ranks have 1.3 MB each: more than the megabyte below
which DeepSpeed keeps a sub-group in memory."""


class Wide(StandIn):
    """With parameters in two sub-groups on the disk, vectors in memory, and `spare` without a gradient in odd steps."""

    exact_parameters = ("logit_scale", "logit_bias")

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embedding = nn.Embedding(CAPTIONS, self.embedding.weight.shape[1])
            self.other = nn.Embedding(CAPTIONS, self.embedding.weight.shape[1])

    def forward(self, pixels, frames, grid_thw, token_ids, text_lengths):
        vision, text, *rest = super().forward(pixels, frames, grid_thw, token_ids, text_lengths)
        return vision + 1e-3 * self.other(token_ids[:, 0])[:, : vision.shape[1]], text, *rest


def built(world, folder, *, device="nvme", bf16=False, kind="adamw"):
    content = ds_config(LANES // world.size, bf16=bf16, kept_whole=0)
    section = {"device": device, **({"nvme_path": str(folder)} if device == "nvme" else {})}
    zero = {"sub_group_size": 300_000, "offload_optimizer": section}
    content["zero_optimization"] |= zero
    content["aio"] = {"intra_op_parallelism": 4}
    return build_engine(Wide(), OptimizerConfig(betas=(0.9, 0.98), ema_decay=0.9, kind=kind), content, world)


def trained(engine, first, last):
    """Losses, norms and norms from parts of the steps."""
    found = []
    for number in range(first, last):
        engine.module.use_spare = number % 2 == 0
        (result,) = steps(engine, number, number + 1, read_gradient=True)
        found.append((result.loss, engine.grad_norm, norm_of_parts(engine)))
    return found


def state(engine):
    return {(piece.name, kind): part.clone() for piece in engine.pieces() for kind, part in piece.tensors.items()}


def differences(one, two):
    return [key for key in one if not torch.equal(one[key], two[key])] + sorted(one.keys() ^ two.keys())


def trains_as_in_memory(root, settings):
    """(steps with states on the disk, in memory, names of tensors that differ), and of a run that was resumed."""
    world, folder = start_world(), Path(root, "disk")
    on_disk, in_memory = built(world, folder, **settings), built(world, folder, device="cpu", **settings)
    assert len(on_disk._disk.groups) >= 2
    assert len(on_disk._disk.groups) < len(on_disk._flat_masters())  # vectors are too small
    first = trained(on_disk, 0, 2)
    saved = save_checkpoint(on_disk, Path(root, "saved"), 2, {}, {}, keep=1)
    found = first + trained(on_disk, 2, STEPS), trained(in_memory, 0, STEPS)
    whole = state(on_disk)
    differ = differences(whole, state(in_memory))
    resumed = built(world, folder, **settings)
    load_checkpoint(resumed, saved)
    again = trained(resumed, 2, STEPS)
    lost = differences(whole, state(resumed))
    made = len(list(folder.glob(f"{disk.PREFIX}*/**/*.swp")))
    for engine in (on_disk, in_memory, resumed):
        engine.close()
    torch.distributed.barrier()
    return *found, differ, again, lost, made, sorted(os.listdir(folder))


def resumed_alone(saved):
    """From a checkpoint of two ranks with states on the disk, into memory and onto a disk."""
    world, folder, found = start_world(), saved.parents[1] / "disk", []
    for device in ("cpu", "nvme"):
        engine = built(world, folder, device=device)
        load_checkpoint(engine, saved)
        found.append((trained(engine, 2, STEPS), state(engine)))
        engine.close()
    (one, memory), (two, on_disk) = found
    return one == two, differences(memory, on_disk)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    (folder / "disk").mkdir()
    (folder / "disk" / "of-the-user").write_text("kept")
    return folder


def test_a_run_trains_saves_and_resumes_as_in_memory(root):
    for found, wanted, differ, again, lost, made, left in run_distributed(trains_as_in_memory, 2, str(root), {}):
        assert found == wanted
        for _, norm, of_parts in found:
            assert norm == pytest.approx(of_parts, rel=1e-5)
        assert differ == lost == []
        assert again == found[2:]
        assert made >= 2 * 4  # master weights, two moments and an average of each sub-group
        assert left == ["of-the-user"]
    (saved,) = (root / "saved").glob("step-*")
    assert run_distributed(resumed_alone, 1, saved) == [(True, [])]


@pytest.mark.slow
def test_the_same_in_bf16_with_exact_scales(tmp_path):
    (tmp_path / "disk").mkdir()
    results = run_distributed(trains_as_in_memory, 2, str(tmp_path), {"bf16": True})
    for found, wanted, differ, again, lost, *_ in results:
        assert found == wanted
        assert differ == lost == []
        assert again == found[2:]


def skipped(folder):
    engine = built(start_world(), folder)
    step(engine, 0)
    before = state(engine)
    faults = [type(step(engine, 1, fault)) is NotFiniteError for fault in ("gradient", "loss")]
    changed = differences(before, state(engine))
    step(engine, 2)
    moved = differences(before, state(engine))
    engine.close()
    return faults, changed, moved


def test_a_step_that_is_not_finite_changes_nothing_on_the_disk(tmp_path):
    faults, changed, moved = zip(*run_distributed(skipped, 2, str(tmp_path)), strict=True)
    assert faults == ([True, True],) * 2
    assert changed == ([],) * 2
    assert {("embedding.weight", kind) for kind in (MASTER, EMA, "exp_avg", "exp_avg_sq")} <= set(moved[0])
