"""A disk that is full, fails, or fails for a moment, and a lost lock: the save is repeated once, or all ranks end and
the last checkpoint is complete."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.full import resize, small_disk
from tests.support.runs import metrics, rewound, samples, small_config, train_rank
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import dump_config
from univitar_ds.config.run_folder import CHECKPOINTS, METRICS
from univitar_ds.errors import UserError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_full
from univitar_ds.run import create_run
from univitar_ds.run_lock import RunLock

pytestmark = pytest.mark.distributed
CHECKPOINT_MB = 41
"""Size of a checkpoint of the small run on two ranks."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=48, videos=16, shards=2)


def end_of(run: Path) -> list[str]:
    """Trains as one rank. Returns the class and the message of the error."""
    try:
        train_rank(run)
    except UserError as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def with_failing_log(run: Path, fault: int) -> list[str]:
    """As `end_of`, but the fifth line of metrics.jsonl cannot be written."""
    write, lines = os.write, []

    def failing(file, content):
        if os.readlink(f"/proc/self/fd/{file}").endswith(METRICS):
            lines.append(bytes(content))
            if len(lines) == 5:
                raise OSError(fault, os.strerror(fault))
        return write(file, content)

    os.write = failing
    return end_of(run)


def during_an_outage(run: Path) -> list[str]:
    """As `end_of`, but no log of the run can be written or opened from the third line of metrics.jsonl until the
    fifth, except half of a line of each. The second rank cannot write the checkpoint of step 4 either."""
    from univitar_ds.training.checkpoint import saves
    from univitar_ds.training.logging import kept_log

    saves.AGAIN_S = 0.05
    write, pwrite, append, replace, failed = os.write, os.pwrite, kept_log.JsonLines.append, os.replace, set()
    lines = {"samples": 0, "metrics": 0}

    def out() -> bool:
        return 3 <= lines["metrics" if os.environ["RANK"] == "0" else "samples"] < 5

    def appended(log, line):
        lines[log.path.name[:7]] += 1
        append(log, line)

    def written(file, content):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".jsonl") and out():
            write(file, content[: len(content) // 2])
            raise OSError(5, os.strerror(5))
        return write(file, content)

    def saved(file, content, offset):
        if os.environ["RANK"] == "1" and ".tmp-step-00000004" in os.readlink(f"/proc/self/fd/{file}") and not failed:
            failed.add(offset)
            raise OSError(5, os.strerror(5))
        return pwrite(file, content, offset)

    def replaced(old, new):
        if str(new).endswith(".jsonl") and out():
            raise OSError(116, os.strerror(116))
        replace(old, new)

    os.write, os.pwrite, os.replace, kept_log.JsonLines.append = written, saved, replaced, appended
    return end_of(run)


def under_lock(run: Path, word: str) -> list[str]:
    """As `end_of`, with a run lock that another process takes over when the first line of metrics is written."""
    from univitar_ds import run_lock
    from univitar_ds.training.logging.kept_log import JsonLines

    run_lock.RECENT_S = 0.0  # the lock is checked before every line
    lock = RunLock(run)
    lock.watch(word)
    append = JsonLines.append

    def losing(log, line):
        append(log, line)
        if log.path.name == METRICS and json.loads(line)["step"] == 3:
            (run / f".lock-{lock.number + 1:08d}").write_text("{}")

    JsonLines.append = losing
    return end_of(run)


def with_failing_save(run: Path, times: int) -> list[str]:
    """As `end_of`, but the second rank cannot write the checkpoint of step 4, so many times."""
    from univitar_ds.training.checkpoint import saves

    saves.AGAIN_S = 0.05
    pwrite, failures = os.pwrite, []

    def failing(file, content, offset):
        if ".tmp-step-00000004" in os.readlink(f"/proc/self/fd/{file}") and len(failures) < times:
            failures.append(offset)
            raise OSError(5, os.strerror(5))
        return pwrite(file, content, offset)

    if os.environ["RANK"] == "1":
        os.pwrite = failing
    return end_of(run)


def whole(run: Path) -> str:
    last = checkpoint_dir.latest(run / CHECKPOINTS)
    checkpoint_dir.verify(last, checkpoint_dir.read_manifest(last))
    return last.name


def test_a_disk_that_is_full_while_saving_ends_all_ranks_and_the_last_checkpoint_stays_complete(shards, tmp_path):
    with small_disk(tmp_path / "disk", 2.5 * CHECKPOINT_MB) as disk:
        run = create_run(small_config(shards, disk), "test", 2)
        first, second = run_distributed(end_of, 2, run)
        assert sorted([first[0], second[0]]) in (["PeerFailure", "StorageError"], ["StorageError", "StorageError"])
        said = first[1] if first[0] == "StorageError" else second[1]
        assert re.search(
            r"MB are free there, and the checkpoint of step 4 takes 4\d\.\d MB; free some space there", said
        )
        assert whole(run) == "step-00000003"  # at the transition to the second stage
        assert sorted(path.name for path in (run / CHECKPOINTS).iterdir()) == [
            "latest", "step-00000002", "step-00000003",
        ], "the part of a checkpoint that did not fit is removed"  # fmt: skip
        resize(disk, 40 * CHECKPOINT_MB)
        assert run_distributed(end_of, 2, run) == [["", ""]] * 2
        steps = [line["step"] for line in metrics(run)]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("fault", [28, 122], ids=["full", "quota"])
def test_a_log_that_cannot_be_written_ends_all_ranks_with_the_same_error(shards, tmp_path, fault):
    run = create_run(small_config(shards, tmp_path), "test", 2)
    first, second = run_distributed(with_failing_log, 2, run, fault)
    assert first[0] == "StorageError"
    assert f"cannot be written: {os.strerror(fault)}; " in first[1]
    assert second[0] == "PeerFailure"
    assert whole(run) == "step-00000004"


ONE_STAGE = {
    "image": {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}, "token_budget": 96, "lr": 1e-3,
}  # fmt: skip


def test_a_disk_that_fails_for_a_moment_delays_one_save_and_the_logs_and_changes_no_bit(shards, tmp_path):
    config = small_config(shards, tmp_path / "one", stages=[{"name": "images", "samples": 120, **ONE_STAGE}])
    run = create_run(config, "test", 2)
    assert run_distributed(during_an_outage, 2, run) == [["", ""]] * 2
    (event,) = [event for event in events(run) if event["event"] == "save_failed"]
    assert (event["checkpoint"], event["rank"], event["complete"]) == (4, 1, False)
    assert "/.tmp-step-00000004/" in event["reason"]
    assert event["reason"].endswith("cannot be written: Input/output error; check the disk and its connection")
    (tmp_path / "two").mkdir()
    resumed = rewound(run, 4, tmp_path / "two" / "small")
    assert run_distributed(end_of, 2, resumed) == [["", ""]] * 2
    last = whole(run)
    assert int(last.removeprefix("step-")) > 4
    ours, theirs = (read_full(one / CHECKPOINTS / last) for one in (run, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert [line["step"] for line in metrics(run)] == list(range(1, int(last.removeprefix("step-")) + 1))
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(resumed)]
    assert samples(run) == samples(resumed)
    assert events(resumed) == events(run)[: len(events(resumed))]


def test_a_disk_that_fails_one_rank_twice_ends_all_ranks_and_the_last_checkpoint_is_complete(shards, tmp_path):
    run = create_run(small_config(shards, tmp_path), "test", 2)
    first, second = run_distributed(with_failing_save, 2, run, 2)
    assert (first[0], second[0]) == ("PeerFailure", "StorageError")
    for _, said in (first, second):
        assert "cannot be written: Input/output error; check the disk and its connection; the save was repeated" in said
    assert whole(run) == "step-00000003"
    assert [path.name for path in (run / CHECKPOINTS).iterdir() if path.name.startswith(".tmp")] == []


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_run_that_another_process_took_over_stops_on_all_ranks_before_it_saves(shards, tmp_path):
    run = create_run(small_config(shards, tmp_path), "test", 2)
    with RunLock(run) as lock:
        lock.take()
        first, second = run_distributed(under_lock, 2, run, lock.word)
    for kind, said in (first, second):
        assert kind in ("LockLost", "PeerFailure")
        assert "was taken over by another launch" in said
    assert checkpoint_dir.complete(run / CHECKPOINTS) == [], "that of step 2 was being written"
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_a_full_disk_is_an_error_message_and_exit_code_2(shards, tmp_path, nproc):
    with small_disk(tmp_path / "disk", 0.6 * CHECKPOINT_MB) as disk:
        dump_config(small_config(shards, disk), tmp_path / "run.yaml")
        command = [sys.executable, "-m", "univitar_ds", "train", "--config", str(tmp_path / "run.yaml")]
        ended = subprocess.run(
            [*command, "--nproc", nproc],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2, ended.stderr[-3000:]
        assert "Traceback" not in ended.stderr
        (sentence,) = {line for line in ended.stderr.splitlines() if line.startswith("error: ")}
        assert re.search(r"MB are free there, and the checkpoint of step 2 takes 4\d\.\d MB; free some space", sentence)
        assert sentence.endswith("; no checkpoint was written yet")
