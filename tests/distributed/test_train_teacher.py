"""A whole run with a teacher in its first stage: its metrics, and that it resumes bit for bit."""

from types import SimpleNamespace

import pytest

from tests.support.closeness import assert_sums_close
from tests.support.distributed import run_distributed
from tests.support.runs import counted_rank, metrics, rewound, samples, small_config, train_rank
from tests.support.shards import write_demo_shards
from tests.support.teachers import own_encoder
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.formats import checkpoint_dir
from univitar_ds.run import create_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    write_demo_shards(folder / "shards")
    own_encoder().save_pretrained(folder / "teacher")
    config = small_config(folder / "shards", folder, objective={"teacher": {"path": str(folder / "teacher")}})
    first, second = config.stages
    drops = {"patch_dropout": 0.5, "stochastic_depth": 0.2}
    fading = first.model_copy(update={"distill": type(first.distill)(kind="linear", start=1.0, end=0.0), **drops})
    config = config.model_copy(update={"stages": [fading, second]})
    run = create_run(config, "test", 2)
    counted = run_distributed(counted_rank, 2, run)
    checkpoints = checkpoint_dir.complete(run / CHECKPOINTS)
    return SimpleNamespace(run=run, folder=folder, last=checkpoints[-1], counted=counted)


def assert_two_messages_a_step(counted, run):
    for steps, between in counted:
        assert len(steps) == len(metrics(run))
        assert set(steps) == {1}, "the metrics and the losses"
        assert min(between) == 2, "the same, and the agreement before a step with the numbers of items and tokens"


def test_a_distilling_step_has_two_small_messages(taught):
    assert_two_messages_a_step(taught.counted, taught.run)


def test_distillation_has_the_weight_of_the_schedule_in_its_stage_and_ends_with_it(taught):
    lines = metrics(taught.run)
    first = [line for line in lines if line["stage"] == "images"]
    weights = [line["distill_weight"] for line in first]
    seen = [0, *(line["samples_seen"] for line in first[:-1])]
    assert weights == pytest.approx([1 - done / 60 for done in seen])
    for line in first:
        parts = line["distill_weight"] * (line["loss_distill_patch"] + line["loss_distill_pooled"])
        assert_sums_close(line["loss"], line["loss_contrastive"] + parts, 3)
        assert -1 <= line["teacher_agreement"] <= 1
    assert first[-1]["teacher_agreement"] > first[0]["teacher_agreement"]
    assert not any("teacher_agreement" in line for line in lines if line["stage"] == "both")


def test_a_run_resumed_while_it_distills_equals_the_uninterrupted_one_bit_for_bit(taught, tmp_path):
    again = rewound(taught.run, 2, tmp_path / "again")
    run_distributed(train_rank, 2, again)
    assert [line["loss"] for line in metrics(again)] == [line["loss"] for line in metrics(taught.run)]
    assert samples(again) == samples(taught.run)
    ours, theirs = (checkpoint_dir.read_manifest(run / CHECKPOINTS / taught.last.name) for run in (taught.run, again))
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert len(tensors) == 2  # the tensors of the node, and the buffers
    assert all(ours[name] == theirs[name] for name in tensors)


def test_a_classifier_distills_too(taught, tmp_path):
    objective = {"kind": "classification", "teacher": {"path": str(taught.folder / "teacher")}}
    config = small_config(taught.folder / "shards", tmp_path, objective=objective)
    first = config.stages[0]
    first = first.model_copy(update={"distill": type(first.distill)(start=0.5), "patch_dropout": 0.5})
    config = config.model_copy(update={"stages": [first]})
    run = create_run(config, "test", 2)
    assert_two_messages_a_step(run_distributed(counted_rank, 2, run), run)
    for line in metrics(run):
        parts = 0.5 * (line["loss_distill_patch"] + line["loss_distill_pooled"])
        assert_sums_close(line["loss"], line["loss_classification"] + parts, 3)
    assert metrics(run)[-1]["teacher_agreement"] > metrics(run)[0]["teacher_agreement"]
