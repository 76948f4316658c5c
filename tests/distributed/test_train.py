"""Whole runs with the real model and loader: uninterrupted, resumed on the same or other ranks, and ended by errors."""

import gzip
import json
import math
import re
import tarfile
from types import SimpleNamespace

import pytest

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.distributed import RankFailed, run_distributed
from tests.support.runs import (
    TERMS,
    metrics,
    reach_of,
    rewound,
    samples,
    small_config,
    train_rank,
    train_without_launcher,
)
from tests.support.shards import write_demo_shards
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.config.stage import AugmentConfig
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_full
from univitar_ds.model.config import PRESETS
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.run import create_run
from univitar_ds.training.engine.optim import GRADIENT_PARTS

pytestmark = pytest.mark.distributed
PARAMETERS = 3_500_000
"""Approximate number of parameters, whose squared gradients a norm sums."""
CANCELLED = "k_proj.bias"
"""The bias that softmax cancels. Its gradient is only rounding error, which Adam scales up."""
TIMED = ("_s", "_pct", "tflops_per_rank", "memory_gb", "mfu_note")


def watched(run):
    """Trains as `train_rank`. Returns the drop plan of each pack of this rank, by step and lane."""
    from univitar_ds.model.blocks.dropping import DropConfig

    seen, draw = {}, DropConfig.of_pack

    def of_pack(self, grids, lane):
        assert (self.step + 1, lane) not in seen
        seen[self.step + 1, lane] = self
        return draw(self, grids, lane)

    DropConfig.of_pack = of_pack
    return train_rank(run), seen


def dropping_config(shards, output, **changes):
    """The small run with a condition on its samples; dropout, stochastic depth and augmentation in its second stage."""
    config = small_config(shards, output, **changes)
    first, second = config.stages
    augment = AugmentConfig(crop_scale=(0.4, 1.0), crop_ratio=(0.8, 1.25), flip=0.5, brightness=0.4, hue=0.1, grey=0.2)
    second = second.model_copy(update={"patch_dropout": 0.5, "stochastic_depth": 0.3, "augment": augment})
    source = config.data.sources[0].model_copy(update={"where": "label != 'grey' or json.width > 60"})
    data = config.data.model_copy(update={"sources": [source]})
    return config.model_copy(update={"stages": [first, second], "data": data})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on 2 ranks."""
    folder = tmp_path_factory.mktemp("whole")
    write_demo_shards(folder / "shards")
    run = create_run(dropping_config(folder / "shards", folder), "test", 2)
    answers = run_distributed(watched, 2, run)
    assert [completed for completed, _ in answers] == [True, True]
    rules = {**answers[0][1], **answers[1][1]}
    last = checkpoint_dir.complete(run / CHECKPOINTS)[-1]
    return SimpleNamespace(run=run, shards=folder / "shards", last=last, steps=len(metrics(run)), rules=rules)


def untimed(line):
    return {name: value for name, value in line.items() if not name.endswith(TIMED)} | {"fill_pct": line["fill_pct"]}


def middle_of(whole, stage):
    """A step with a checkpoint, inside the stage."""
    lines = [line["step"] for line in metrics(whole.run) if line["stage"] == stage]
    return next(step for step in lines[:-1] if step % 2 == 0)


def test_a_run_trains_its_stages_and_logs_them(whole):
    lines = metrics(whole.run)
    assert [line["step"] for line in lines] == list(range(1, whole.steps + 1))
    stages = [line["stage"] for line in lines]
    assert stages == sorted(stages, key=["images", "both"].index)
    both = [line["modality"] for line in lines if line["stage"] == "both"]
    assert {line["modality"] for line in lines if line["stage"] == "images"} == {"image"}
    assert both == ["image", "video"] * (len(both) // 2) + ["image"] * (len(both) % 2)
    for line in lines:
        assert line[f"loss_{line['modality']}"] == line["loss"]
        assert 0 < line["fill_pct"] <= 100
        assert line["flop_imbalance_pct"] >= 0
        assert line["mfu_pct"] > 0
        parts = [line[f"grad_norm_{part}"] for part in GRADIENT_PARTS]
        assert min(parts) > 0
        assert_sums_close(math.hypot(*parts), line["grad_norm"], PARAMETERS)
    assert lines[0]["lr"] == 0.0
    assert max(line["lr"] for line in lines) > 0


def test_every_step_saw_one_pack_of_every_lane_and_the_counters_agree(whole):
    seen = samples(whole.run)
    assert set(seen) == {(step, lane) for step in range(1, whole.steps + 1) for lane in range(4)}
    lines = metrics(whole.run)
    assert sum(len(entry) - 1 for entry in seen.values()) == lines[-1]["samples_seen"]
    assert all(entry[0] == lines[step - 1]["modality"] for (step, _), entry in seen.items())


def test_every_pack_of_a_stage_is_dropped_from_at_the_rates_of_the_stage_keyed_by_step_and_lane(whole):
    assert whole.rules.keys() == samples(whole.run).keys()
    for (step, _), rule in whole.rules.items():
        line = metrics(whole.run)[step - 1]
        both = line["stage"] == "both"
        assert (rule.patches, rule.depth, rule.seed) == ((0.5, 0.3, 0) if both else (0.0, 0.0, 0))
        a, _ = cost_coefficients(PRESETS["tiny"])
        flops = line["tflops_per_rank"] * 2 * line["step_s"] * 1e12
        tokens = line["tokens_per_s"] * line["step_s"]
        assert flops < 0.7 * a * tokens if both else flops > a * tokens


def test_samples_that_the_condition_leaves_out_are_counted_and_never_read(whole):
    assert metrics(whole.run)[-1]["filtered_samples"] > 0
    left_out, seen = set(), {key.rpartition("/")[2] for _, *keys in samples(whole.run).values() for key in keys}
    for shard in whole.shards.glob("train-image-*.tar"):
        with tarfile.open(shard) as tar:
            texts = {name[:-5]: json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")}
        left_out |= {key for key, text in texts.items() if text["label"] == "grey" and text["width"] <= 60}
    assert left_out
    assert not seen & left_out


def test_the_summary_has_totals_losses_versions_and_checkpoints(whole):
    summary = json.loads((whole.run / "summary.json").read_text())
    lines = metrics(whole.run)
    assert summary["completed"] is True
    assert summary["steps"] == whole.steps
    assert summary["samples"] == lines[-1]["samples_seen"] >= 120
    assert summary["last"]["loss"] == lines[-1]["loss"]
    assert summary["best"]["loss"] == min(line["loss"] for line in lines)
    assert summary["checkpoints"][-1] == whole.last.name
    assert summary["seconds"]["training"] > 0
    assert {"torch", "deepspeed"} <= set(summary["versions"])


def test_images_of_both_modalities_and_a_profile_change_no_bit(whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = {"every_steps": 1, "peak_tflops": 0.05, "images_every_steps": 3, "profile": {"from_step": 2, "steps": 2}}
    run = create_run(dropping_config(whole.shards, tmp_path, logging=logging), "test", 2)
    run_distributed(train_rank, 2, run)
    assert [untimed(line) for line in metrics(run)] == [untimed(line) for line in metrics(whole.run)]
    ours, theirs = (checkpoint_dir.read_manifest(folder / CHECKPOINTS / whole.last.name) for folder in (whole.run, run))
    assert all(ours[name] == theirs[name] for name in ours if name.endswith(".safetensors"))
    board = EventAccumulator(str(run / "tb")).Reload()
    assert board.Images("pack_image")[0].step == 3
    videos = [line["step"] for line in metrics(run) if line["modality"] == "video"]
    assert board.Images("pack_video")[0].step == videos[0]
    texts = [text.tensor_proto.string_val[0].decode() for text in board.Tensors("events/text_summary")]
    assert [text.split(" begins")[0] for text in texts] == ["stage images", "stage both"]
    (path,) = run.glob("profile/*")
    with gzip.open(path) as trace:
        events = [event["name"] for event in json.load(trace)["traceEvents"]]
    assert path.name == "step00000002-rank00000.json.gz"
    assert {"data_wait", "forward", "backward", "optimizer", "all_gather_single"} <= set(events)
    assert events.count("optimizer") == 2


@pytest.mark.parametrize("stage", ["images", "both"])
def test_a_run_resumed_inside_a_stage_equals_the_uninterrupted_one_bit_for_bit(whole, tmp_path, stage):
    again = rewound(whole.run, middle_of(whole, stage), tmp_path / "again")
    run_distributed(train_rank, 2, again)
    assert [untimed(line) for line in metrics(again)] == [untimed(line) for line in metrics(whole.run)]
    assert samples(again) == samples(whole.run)
    ours, theirs = (checkpoint_dir.read_manifest(run / CHECKPOINTS / whole.last.name) for run in (whole.run, again))
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert len(tensors) == 2  # the tensors of the node, and the buffers
    assert all(ours[name] == theirs[name] for name in tensors)
    assert ours["index.json"] == theirs["index.json"], "cursors differ"


@pytest.mark.parametrize(
    ("size", "start"), [(1, train_without_launcher), pytest.param(4, train_rank, marks=pytest.mark.slow)]
)
def test_a_run_resumed_on_other_ranks_sees_the_same_samples_and_losses(whole, tmp_path, size, start):
    again = rewound(whole.run, 2, tmp_path / "again")
    run_distributed(start, size, again)
    assert samples(again) == samples(whole.run)
    for ours, theirs in zip(metrics(whole.run), metrics(again), strict=True):
        assert_sums_close(theirs["loss"], ours["loss"], ours["step"] * TERMS, f"loss of step {ours['step']}")
        assert theirs["lr"] == ours["lr"]
        assert theirs["samples_seen"] == ours["samples_seen"]
    weights = read_full(again / CHECKPOINTS / whole.last.name)
    wanted = {name: value for name, value in read_full(whole.last).items() if not name.endswith(CANCELLED)}
    assert_all_close({name: weights[name] for name in wanted}, wanted, whole.steps * TERMS, reach=reach_of(whole.run))


def test_a_finished_run_that_is_started_again_trains_no_step(whole, tmp_path):
    again = rewound(whole.run, whole.steps, tmp_path / "again")
    assert run_distributed(train_rank, 2, again) == [True, True]
    assert [line["step"] for line in metrics(again)] == list(range(1, whole.steps + 1))
    assert checkpoint_dir.complete(again / CHECKPOINTS)[-1].name == whole.last.name


def error_of(run):
    """The error of this rank."""
    from univitar_ds.errors import UserError

    try:
        train_rank(run)
    except UserError as error:
        return type(error).__name__, str(error)
    return None


def error_of_broken_data(run):
    """As `error_of`, but the data of the second rank cannot be read in its third step."""
    import os

    from univitar_ds.errors import DataError
    from univitar_ds.training import loop

    class Broken(loop.PackLoader):
        steps = 0

        def __next__(self):
            self.steps += 1
            if self.steps == 3:
                raise DataError("shard-7.tar is cut at byte 512")
            return super().__next__()

    if os.environ["RANK"] == "1":
        loop.PackLoader = Broken
    return error_of(run)


def test_a_data_error_on_one_rank_ends_all_ranks_with_its_message(whole, tmp_path):
    run = create_run(small_config(whole.shards, tmp_path), "test", 2)
    errors = run_distributed(error_of_broken_data, 2, run)
    assert errors[1] == ("DataError", "shard-7.tar is cut at byte 512")
    assert errors[0] == ("PeerFailure", "rank 1 ended the run: shard-7.tar is cut at byte 512")
    assert len(metrics(run)) == 2
    assert checkpoint_dir.latest(run / CHECKPOINTS).name == "step-00000002"


def error_of_other_shards(run):
    """As `error_of`, but the second rank sees other sizes of the shards, and fails if it reads them."""
    import os

    from univitar_ds.data.storage.local import LocalStorage

    def fail(*_):
        raise AssertionError("a rank other than the first lists a source, or reads its shards")

    if os.environ["RANK"] == "1":
        found = LocalStorage.size
        LocalStorage.size = lambda *given: found(*given) + 1
        LocalStorage.list = LocalStorage.read_range = fail
    return error_of(run)


def test_ranks_that_see_other_shards_end_the_run_and_only_the_first_lists_and_reads_them(whole, tmp_path):
    run = create_run(small_config(whole.shards, tmp_path), "test", 2)
    (first, error), (second, other) = run_distributed(error_of_other_shards, 2, run)
    assert (first, second) == ("PeerFailure", "DataError")
    assert error == f"rank 1 ended the run: {other}"
    assert re.search(r"rank 1: .*\.tar has \d+ bytes here and \d+ on rank 0; all ranks must see the same data", other)


def test_another_configuration_is_refused(whole, tmp_path):
    again = rewound(whole.run, 2, tmp_path / "again")
    text = (again / "config.yaml").read_text()
    assert "seed: 0\n" in text
    (again / "config.yaml").write_text(text.replace("seed: 0\n", "seed: 1\n"))
    errors = run_distributed(error_of, 2, again)
    assert errors[0] == errors[1]
    assert errors[0][0] == "CheckpointError"
    assert "another configuration" in errors[0][1]


def test_a_number_of_ranks_that_does_not_divide_the_lanes_is_refused(whole, tmp_path):
    again = rewound(whole.run, 2, tmp_path / "again")
    errors = run_distributed(error_of, 3, again)
    assert {error[0] for error in errors} == {"ConfigError"}
    assert "run 1, 2, 4 ranks" in errors[0][1]


def raise_on_rank_one():
    import os

    if os.environ["RANK"] == "1":
        raise ValueError("the error of rank one")


def wait_forever():
    import time

    time.sleep(1000)


def test_a_failing_rank_prints_its_traceback_and_a_hanging_one_is_ended_with_its_stack():
    with pytest.raises(RankFailed, match=r"rank 1 of 2:\n(.*\n)*.*raise_on_rank_one(.*\n)*.*the error of rank one"):
        run_distributed(raise_on_rank_one, 2)
    stalled = r"2 ranks: no progress for 3 s \(rank 0: \d+\.\d\d s of CPU time, rank 1: .*\)\nrank 0:\n(.*\n)*"
    with pytest.raises(RankFailed, match=stalled + r".*in wait_forever(.*\n)*rank 1:\n(.*\n)*.*in wait_forever"):
        run_distributed(wait_forever, 2, idle_s=3)
