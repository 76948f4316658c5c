"""A shard whose loss is not finite: all ranks skip the update or roll back together, and the run continues."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support.distributed import run_distributed
from tests.support.runs import metrics, rewound, samples, small_config, train_rank
from tests.support.shards import image_sample, sidecar, write_tar
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.errors import UserError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_updates
from univitar_ds.run import create_run

pytestmark = pytest.mark.distributed
CLEAN, POISONED = 360, 2
NOT_FINITE, LARGE = "nan", "1e4"
ROLLS_BACK = {"max_skipped_in_a_row": 0, "max_rollbacks": 8, "min_steps": 4, "window_steps": 8}
WHITE = 254
"""Images with a larger mean pixel value are poisoned: the patched model has outputs that are not finite, or too
large."""


def write_shards(folder):
    """Writes images for one epoch of the runs below. The poisoned ones are in a separate shard."""
    rng = np.random.default_rng(3)
    clean = [image_sample(index, rng) for index in range(CLEAN)]
    for number in range(4):
        write_tar(folder / f"clean-{number}.tar", clean[number::4])
    white = io.BytesIO()
    Image.new("RGB", (56, 56), (255, 255, 255)).save(white, "PNG")
    text = sidecar(["nothing"], None, "image", (56, 56, 1), "white.png")
    poison = {"png": white.getvalue(), "json": text}
    write_tar(folder / "poison.tar", [(f"p{index}", poison) for index in range(POISONED)])
    return folder


def poison_the_model(factor):
    """Patches the model: image embeddings of a pack with a poisoned image are multiplied by `factor`."""
    from univitar_ds.model.contrastive import ContrastiveModel

    forward = ContrastiveModel.forward

    def poisoned(self, pixels, frames, grid_thw, *rest):
        out = forward(self, pixels, frames, grid_thw, *rest)
        sizes = (frames * grid_thw[:, 1] * grid_thw[:, 2]).tolist()
        white = any(item.float().mean() > WHITE for item in pixels.split([size * 588 for size in sizes]))
        return out._replace(vision=out.vision * float(factor)) if white else out

    ContrastiveModel.forward = poisoned


def train_poisoned(run, factor):
    poison_the_model(factor)
    try:
        return train_rank(run)
    except UserError as error:
        return str(error)


def config_of(shards, output, **changes):
    sizes = {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}
    stage = {"image": sizes, "token_budget": 96, "lr": 1e-3, "warmup_samples": 50}
    return small_config(
        shards,
        output,
        **{
            "guard": ROLLS_BACK,
            "stages": [{"name": "images", "samples": 200, **stage}],
            **changes,
        },
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def events_of(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recovered(shards, tmp_path_factory):
    run = create_run(config_of(shards, tmp_path_factory.mktemp("run")), "test", 2)
    answers = run_distributed(train_poisoned, 2, run, NOT_FINITE)
    return SimpleNamespace(run=run, answers=answers, events=events_of(run))


def test_the_run_rolls_back_is_completed_and_logs_the_events(recovered):
    assert recovered.answers == [True, True]
    assert recovered.events[0] == {"step": 0, "event": "stage", "stage": "images", "samples_seen": 0}
    rollbacks = recovered.events[1:]
    assert rollbacks
    assert {event["event"] for event in rollbacks} == {"rollback"}
    assert all(event["undone_step"] > event["step"] for event in rollbacks)
    assert all("the loss is nan" in event["reason"] for event in rollbacks)
    summary = json.loads((recovered.run / "summary.json").read_text())
    assert summary["completed"] is True
    assert summary["rollbacks"] == len(rollbacks)
    assert np.isfinite([line["loss"] for line in metrics(recovered.run)]).all()


def test_every_step_is_logged_once_and_no_poisoned_pack_was_trained_on(recovered):
    lines = metrics(recovered.run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    learned = [key for entry in samples(recovered.run).values() for key in entry[1:]]
    assert len(learned) == lines[-1]["samples_seen"]
    assert not any("poison" in key for key in learned)


def test_the_data_window_is_skipped_listed_and_not_read_again(recovered):
    learned = [key for entry in samples(recovered.run).values() for key in entry[1:]]
    skipped = [
        key
        for path in recovered.run.glob("skipped-rank*.jsonl")
        for line in path.read_text().splitlines()
        for key in json.loads(line)["keys"]
    ]
    assert len(learned) == len(set(learned)), "one epoch: nothing is read twice"
    assert not set(skipped) & set(learned)


def test_a_run_resumed_before_a_rollback_repeats_it_bit_for_bit(recovered, tmp_path):
    back = recovered.events[1]["step"]
    assert back > 0, "the first rollback must have a checkpoint to start from; choose another seed"
    again = rewound(recovered.run, back, tmp_path / "again")
    assert run_distributed(train_poisoned, 2, again, NOT_FINITE) == [True, True]
    losses = [[line["loss"] for line in metrics(run)] for run in (again, recovered.run)]
    assert losses[0] == losses[1]
    assert samples(again) == samples(recovered.run)
    assert events_of(again) == recovered.events
    names = [checkpoint_dir.complete(run / CHECKPOINTS)[-1] for run in (again, recovered.run)]
    ours, theirs = (checkpoint_dir.read_manifest(folder) for folder in names)
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert tensors
    assert all(ours[name] == theirs[name] for name in tensors)


@pytest.mark.slow
def test_a_spike_before_the_first_checkpoint_rolls_the_run_back_to_its_start(shards, tmp_path):
    run = create_run(config_of(shards, tmp_path, checkpoint={"every_steps": 1000}), "test", 2)
    assert run_distributed(train_poisoned, 2, run, LARGE) == [True, True]
    rollbacks = events_of(run)[1:]
    assert {event["step"] for event in rollbacks} == {0}
    assert all("deviations above its median" in event["reason"] for event in rollbacks)
    assert metrics(run)[0]["lr"] == 0.0


def test_too_many_rollbacks_end_the_run_with_a_remedy(shards, tmp_path):
    run = create_run(config_of(shards, tmp_path, guard={"max_skipped_in_a_row": 0, "max_rollbacks": 0}), "test", 2)
    messages = run_distributed(train_poisoned, 2, run, NOT_FINITE)
    assert messages[0] == messages[1]
    for part in ("the loss is nan", "guard.max_rollbacks is 0", "resume with a higher limit"):
        assert part in messages[0]


@pytest.fixture(scope="module")
def skipping(shards, tmp_path_factory):
    changes = {"guard": {}, "checkpoint": {"every_steps": 1, "keep": 100}}
    run = create_run(config_of(shards, tmp_path_factory.mktemp("skipping"), **changes), "test", 2)
    answers = run_distributed(train_poisoned, 2, run, NOT_FINITE)
    return SimpleNamespace(run=run, answers=answers, events=events_of(run)[1:])


def test_a_loss_that_is_not_finite_skips_one_update_and_the_run_continues(skipping):
    assert skipping.answers == [True, True]
    assert {event["event"] for event in skipping.events} == {"skipped"}
    steps, lines, read = [event["step"] for event in skipping.events], metrics(skipping.run), samples(skipping.run)
    assert [line["step"] for line in lines] == [n for n in range(1, lines[-1]["step"] + 1) if n not in steps]
    assert lines[-1]["skipped_updates"] == len(steps)
    assert np.isfinite([line["loss"] for line in lines]).all()
    summary = json.loads((skipping.run / "summary.json").read_text())
    assert (summary["rollbacks"], summary["skipped_updates"]) == (0, len(steps))
    assert lines[-1]["samples_seen"] == sum(len(entry) - 1 for entry in read.values()), "samples are not counted"
    for event in skipping.events:
        keys = [key for (step, _), entry in sorted(read.items()) if step == event["step"] for key in entry[1:]]
        assert sorted(event["keys"]) == sorted(keys)
        assert event["samples"] == len(keys)
        assert any("poison" in key for key in event["not_finite"])
        assert set(event["not_finite"]) < set(keys)
        assert "the loss is nan" in event["reason"]
    poisoned = {step for (step, _), entry in read.items() if any("poison" in key for key in entry)}
    assert poisoned == set(steps)


def test_a_skipped_update_changes_no_tensor_of_the_checkpoint_nor_its_number_of_updates(skipping):
    step = skipping.events[0]["step"]
    before, after = (skipping.run / CHECKPOINTS / f"step-{number:08d}" for number in (step - 1, step))
    ours, theirs = (checkpoint_dir.read_manifest(folder) for folder in (before, after))
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert all(ours[name] == theirs[name] for name in tensors)
    assert [read_updates(folder) for folder in (before, after)] == [step - 1, step - 1]


@pytest.mark.slow
def test_a_run_killed_right_after_a_skipped_update_resumes_bit_for_bit(skipping, tmp_path):
    again = rewound(skipping.run, skipping.events[0]["step"], tmp_path / "again")
    assert run_distributed(train_poisoned, 2, again, NOT_FINITE) == [True, True]
    assert [line["loss"] for line in metrics(again)] == [line["loss"] for line in metrics(skipping.run)]
    assert samples(again) == samples(skipping.run)
    assert events_of(again)[1:] == skipping.events
    ours, theirs = (
        checkpoint_dir.read_manifest(checkpoint_dir.complete(run / CHECKPOINTS)[-1]) for run in (again, skipping.run)
    )
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert all(ours[name] == theirs[name] for name in tensors)


def train_broken(run):
    """Trains a model none of whose embeddings is finite."""
    from univitar_ds.model.contrastive import ContrastiveModel

    forward = ContrastiveModel.forward
    ContrastiveModel.forward = lambda self, *inputs: (o := forward(self, *inputs))._replace(vision=o.vision * np.nan)
    try:
        return train_rank(run)
    except UserError as error:
        return str(error)


@pytest.mark.slow
def test_too_many_skipped_updates_in_a_row_roll_back_and_a_resumed_run_continues_the_count(shards, tmp_path):
    changes = {"guard": {"max_skipped_in_a_row": 2, "max_rollbacks": 1}, "checkpoint": {"every_steps": 1, "keep": 9}}
    run = create_run(config_of(shards, tmp_path, **changes), "test", 1)
    (message,) = run_distributed(train_broken, 1, run)
    for part in ("step 5: the loss is nan", "2 updates before it were skipped", "guard.max_rollbacks is 1"):
        assert part in message
    events = [(event["event"], event["step"]) for event in events_of(run)[1:]]
    assert events == [("skipped", 1), ("skipped", 2), ("rollback", 2), ("skipped", 3), ("skipped", 4)]
    again = rewound(run, 1, tmp_path / "again")
    assert run_distributed(train_broken, 1, again) == [message]
    assert events_of(again) == events_of(run)
