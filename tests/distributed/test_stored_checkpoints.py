"""Checkpoints on S3: a run that is interrupted and resumed with a faulty store equals the uninterrupted run."""

import errno
import json
import os

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.runs import metrics, samples, small_config, train_rank
from tests.support.s3 import BUCKET, ENVIRONMENT, faulty, s3_server, some_of
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CHECKPOINTS, METRICS
from univitar_ds.errors import ConfigError, UserError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.checkpoint.store import store_of
from univitar_ds.formats.elastic import read_full
from univitar_ds.formats.run import find_checkpoint
from univitar_ds.run import create_run, reopen_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FAULTS = ["throttle", "error", "reset", "lost", "drop", "cut", "flip"]
STAGE = {"image": {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}, "token_budget": 96, "lr": 1e-3}


@pytest.fixture(scope="module")
def server():
    with s3_server() as started:
        yield started


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=48, videos=0, shards=2)


def config_of(shards, output, url=None, endpoint=None):
    config = small_config(shards, output).model_dump(mode="json")
    config["data"]["s3"] = {"endpoint_url": endpoint, "idle_timeout_s": 1.0, "give_up_s": 20.0}
    checkpoint = {"every_steps": 2, "keep": 2, "folder": url}
    changes = {"stages": [{"name": "images", "samples": 160, **STAGE}], "checkpoint": checkpoint}
    return small_config(shards, output, data=config["data"], **changes)


def trained(run, last=None):
    """Trains as one rank. Returns the result or the error of the run. `last`: the step at which its log fails."""
    from univitar_ds.data.storage import retry
    from univitar_ds.training.logging.kept_log import JsonLines

    os.environ.update(ENVIRONMENT)
    retry.FIRST_PAUSE_S = 0.005
    append = JsonLines.append

    def failing(log, line):
        if last is not None and log.path.name == METRICS and json.loads(line)["step"] == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(log, line)

    JsonLines.append = failing
    try:
        return train_rank(run)
    except UserError as error:
        return [type(error).__name__, str(error)]


def test_a_run_interrupted_and_resumed_with_faults_equals_the_uninterrupted_one(server, shards, tmp_path):
    whole = create_run(config_of(shards, tmp_path / "whole"), "test", 2)
    assert run_distributed(trained, 2, whole) == [True, True]
    with faulty(server, some_of(FAULTS, 0.2, seed=3)) as proxy:
        config = config_of(shards, tmp_path / "stored", f"s3://{BUCKET}/runs", proxy.url)
        run = create_run(config, "test", 2)
        assert [kind for kind, _ in run_distributed(trained, 2, run, 5)] == ["StorageError", "PeerFailure"]
        store = store_of(config)
        assert store.latest() == "step-00000004"
        with pytest.raises(
            ConfigError, match=r"s3://shards/runs/small/step-00000004 is a checkpoint of an earlier run"
        ):
            create_run(config_of(shards, tmp_path / "other", f"s3://{BUCKET}/runs", proxy.url), "test", 2)
        with pytest.raises(ConfigError, match=r"checkpoint\.folder is s3://shards/runs in .* without this override"):
            reopen_run(run, ["checkpoint.folder=s3://shards/elsewhere"], 2)
        reopen_run(run, [], 2)
        assert run_distributed(trained, 2, run) == [True, True]
        assert len(proxy.faults) == len(FAULTS)
        assert samples(run) == samples(whole)
        losses = [[line["loss"] for line in metrics(one)] for one in (run, whole)]
        assert losses[0] == losses[1]
        _, copied = find_checkpoint(run)
    ours, theirs = read_full(copied), read_full(checkpoint_dir.latest(whole / CHECKPOINTS))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(path.name for path in copied.glob("*.safetensors")) == [
        "buffers.safetensors", "rank00000.safetensors", "rank00001.safetensors",
    ]  # fmt: skip
    assert [path.name for path in (run / CHECKPOINTS).iterdir()] == ["latest"], "for scripts that read it"
    assert len(store_of(config_of(shards, tmp_path, f"s3://{BUCKET}/runs", server.url)).complete()) == 2
    resumed_on_another_number_of_ranks(run, server, len(losses[0]))


def resumed_on_another_number_of_ranks(run, server, steps):
    reopen_run(run, [f"data.s3.endpoint_url={server.url}"], 4, extension=["samples=20"])
    assert run_distributed(trained, 4, run) == [True] * 4
    assert load_config(run / "config.yaml").checkpoint.folder == f"s3://{BUCKET}/runs"
    numbers = [line["step"] for line in metrics(run)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > steps


def test_a_store_that_refuses_uploads_ends_all_ranks_and_the_last_checkpoint_is_complete(server, shards, tmp_path):
    def refuses(request):
        return "status 403" if request.method == "PUT" and "step-00000004" in request.key else None

    with faulty(server, refuses) as proxy:
        config = config_of(shards, tmp_path, f"s3://{BUCKET}/refused", proxy.url)
        run = create_run(config, "test", 2)
        ends = run_distributed(trained, 2, run)
        assert {kind for kind, _ in ends} <= {"StorageError", "PeerFailure"}
        for _, sentence in ends:
            assert "the checkpoint of step 4 was not saved" in sentence
            assert "access was refused (the store answered 403" in sentence
        store = store_of(config)
        assert store.complete() == ["step-00000002"]
        folder = store.copied("step-00000002")
    checkpoint_dir.verify(folder, checkpoint_dir.read_manifest(folder))
