"""Stages that freeze and unfreeze parts of the model: frozen weights stay, moments of unfrozen ones restart."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.support.closeness import assert_sums_close
from tests.support.distributed import run_distributed
from tests.support.runs import TERMS, metrics, rewound, samples, small_config, train_rank
from tests.support.shards import write_demo_shards
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_full
from univitar_ds.run import create_run

pytestmark = pytest.mark.distributed
LR = 1e-3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two ranks: the text tower is frozen, then all is trained, then the encoder is frozen and the weight of
    the contrastive loss decreases."""
    folder = tmp_path_factory.mktemp("whole")
    sizes = {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}
    stage = {"samples": 50, "image": sizes, "token_budget": 96, "lr": LR, "lr_schedule": "constant"}
    config = small_config(
        write_demo_shards(folder / "shards"),
        folder,
        stages=[
            {"name": "locked", "frozen": ["text"], **stage},
            {"name": "unlocked", "checkpoint_every": 1, **stage},
            {"name": "heads", "frozen": ["vision"], "contrastive": {"kind": "linear", "start": 1, "end": 0.5}, **stage},
        ],
        optimizer={"weight_decay": 0.1, "ema_decay": 0.9},
        checkpoint={"every_steps": 1, "keep": 100},
    )
    run = create_run(config, "test", 2)
    assert run_distributed(train_rank, 2, run) == [True, True]
    lines = metrics(run)
    ends = [max(line["step"] for line in lines if line["stage"] == stage.name) for stage in config.stages]
    return SimpleNamespace(run=run, ends=ends, steps=len(lines))


def weights(whole, step, **options):
    return read_full(whole.run / CHECKPOINTS / f"step-{step:08d}", **options)


def unchanged(before, after, prefix):
    names = [name for name in before if name.startswith(prefix)]
    assert names
    return [torch.equal(before[name], after[name]) for name in names]


def test_parts_that_a_stage_freezes_keep_their_bits_and_the_others_are_trained(whole):
    first, second, third = (weights(whole, step) for step in whole.ends)
    begin = weights(whole, 1)
    assert all(unchanged(begin, first, "text."))
    assert not any(unchanged(begin, first, "vision.encoder.layers.0.attn.qkv.weight"))
    assert not all(unchanged(first, second, "text."))
    assert all(unchanged(second, third, "vision."))
    assert not any(unchanged(second, third, "vision_proj."))
    assert not all(unchanged(second, third, "text."))


def test_the_first_update_of_an_unfrozen_part_is_the_first_of_adam(whole):
    """With bias correction, the size of Adam's first step is the learning rate for any gradient. Later ones differ."""
    before, after = (weights(whole, whole.ends[0] + more) for more in (0, 1))
    name = "text.model.encoder.layers.0.mlp.fc2.weight"
    if name not in before:
        name = next(n for n in before if n.startswith("text.") and n.endswith("fc2.weight"))
    step = (after[name] - before[name] * (1 - LR * 0.1)).abs() / LR
    assert step.median() == pytest.approx(1.0, abs=1e-2)
    name = "vision_proj.weight"
    step = (after[name] - before[name] * (1 - LR * 0.1)).abs() / LR
    assert step.median() < 0.95


def test_the_average_of_an_unfrozen_part_starts_at_its_weights(whole):
    at, later = whole.ends[0], whole.ends[1]
    name = next(n for n in weights(whole, at) if n.startswith("text.") and n.endswith("fc2.weight"))
    trained, averaged = weights(whole, at + 1)[name], weights(whole, at + 1, averaged=True)[name]
    start = weights(whole, at)[name]
    assert_sums_close(averaged, start.lerp(trained, 1 - 2 / 11), 3)
    assert not torch.equal(weights(whole, later)[name], weights(whole, later, averaged=True)[name])


@pytest.mark.parametrize(
    "where", ["inside the first", "at the first stage transition", "at the second stage transition"]
)
def test_a_run_resumed_in_a_stage_or_at_a_transition_equals_the_uninterrupted_one_bit_for_bit(whole, tmp_path, where):
    step = {
        "inside the first": 1,
        "at the first stage transition": whole.ends[0],
        "at the second stage transition": whole.ends[1],
    }
    again = rewound(whole.run, step[where], tmp_path / "again")
    assert run_distributed(train_rank, 2, again) == [True, True]
    assert [line["loss"] for line in metrics(again)] == [line["loss"] for line in metrics(whole.run)]
    assert samples(again) == samples(whole.run)
    step = f"step-{whole.steps:08d}"
    ours, theirs = (checkpoint_dir.read_manifest(run / CHECKPOINTS / step) for run in (again, whole.run))
    assert {n: f for n, f in ours.items() if n.endswith(".safetensors")} == {
        n: f for n, f in theirs.items() if n.endswith(".safetensors")
    }
    assert (again / "events.jsonl").read_text() == (whole.run / "events.jsonl").read_text()


def test_the_losses_are_the_same_on_another_number_of_ranks(whole, tmp_path):
    again = rewound(whole.run, 1, tmp_path / "again")
    run_distributed(train_rank, 1, again)
    for ours, theirs in zip(metrics(whole.run), metrics(again), strict=True):
        assert_sums_close(theirs["loss"], ours["loss"], ours["step"] * TERMS, f"loss of step {ours['step']}")


def test_the_stages_are_reported(whole):
    events = [json.loads(line) for line in (whole.run / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["stage"], event["step"]) for event in events] == [
        ("stage", "locked", 0),
        ("stage", "unlocked", whole.ends[0]),
        ("stage", "heads", whole.ends[1]),
    ]
