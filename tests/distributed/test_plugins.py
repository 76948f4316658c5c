"""A run with plugins: loss and callbacks on two ranks, an error in a callback, a resume with a new version."""

import json
import logging

import pytest

from tests.support.distributed import run_distributed
from tests.support.runs import metrics, small_config
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.errors import UserError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_state
from univitar_ds.plugins import load_plugins
from univitar_ds.run import create_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PLUGIN = """
import json, os
import torch.nn.functional as F
from univitar_ds.plugins import Callback, register_callback, register_objective

__version__ = "1"

@register_objective("autograd")
class Sigmoid:
    def loss_of_chunk(self, images, texts, scale, bias, positives):
        sign = positives * 2.0 - 1
        return -F.logsigmoid(sign * (images @ texts.T * scale + bias)).sum()

@register_callback
class Written(Callback):
    def note(self, hook, value):
        with open(self.path, "a") as file:
            file.write(json.dumps([os.environ.get("RANK"), hook, value]) + "\\n")

    def on_start(self, run):
        self.path = run.folder / "hooks.txt"
        self.note("start", [run.name, run.step, run.ranks, run.config["name"]])

    def on_step(self, info):
        self.note("step", [info.step, info.stage, info.items, info.loss])
        {}[info.step] if info.step == 3 else None

    def on_checkpoint(self, folder):
        self.note("checkpoint", [folder.name, (folder / "manifest.json").is_file()])

    def on_end(self, summary):
        self.note("end", [summary["completed"], summary["steps"]])
"""


def train_until_error(run) -> str:
    from univitar_ds.training.distributed.process_group import start_world
    from univitar_ds.training.loop import train

    try:
        train(load_config(run / "config.yaml"), run, start_world())
    except UserError as error:
        return str(error)
    return ""


def run_to_its_end(run) -> list[str]:
    """Resumes the run as the program does. Returns the warnings of a rank."""
    from univitar_ds.launch import run_rank
    from univitar_ds.run_lock import RunLock
    from univitar_ds.training.distributed.preemption import NEVER

    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("univitar_ds").addHandler(handler)
    with RunLock(run) as lock:
        lock.take()
        assert run_rank(run, NEVER, lock) == 0
    return said


def hooks(run, name):
    return [
        (rank, value)
        for rank, hook, value in map(json.loads, (run / "hooks.txt").read_text().splitlines())
        if hook == name
    ]


def test_a_callback_that_fails_ends_all_ranks_and_a_new_version_resumes(tmp_path):
    write_demo_shards(tmp_path / "shards")
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    options = {"plugins": [str(plugin)], "objective": {"kind": "autograd", "chunk": 3}}
    options["checkpoint"] = {"every_steps": 2, "keep": 100, "asynchronous": False}  # it is written before step 3
    run = create_run(small_config(tmp_path / "shards", tmp_path, **options), "test", 2)
    load_plugins(())
    ours, theirs = run_distributed(train_until_error, 2, run)
    said = (
        f"the plugin mine ({plugin}) failed in on_step: KeyError: 3 (line 26); correct it, or leave it out of plugins"
    )
    assert (ours, theirs) == (said, f"rank 0 ended the run: {said}")
    lines = metrics(run)
    assert hooks(run, "start") == [("0", ["small", 0, 2, "small"])]
    assert [value[:2] + value[3:] for _, value in hooks(run, "step")] == [
        [line["step"], line["stage"], line["loss"]] for line in lines
    ]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {rank for rank, _ in hooks(run, "step")} == {"0"}
    assert hooks(run, "checkpoint") == [
        ("0", ["step-00000002", True])
    ]  # the stage ends with step 3, which is saved too
    last = checkpoint_dir.latest(run / CHECKPOINTS)
    assert read_state(last)["plugins"] == [{"name": "mine", "version": "1", "objectives": ["autograd"]}]

    plugin.write_text(PLUGIN.replace("info.step == 3", "False").replace('"1"', '"2"'))
    (warnings,) = run_distributed(run_to_its_end, 1, run)
    assert any("mine" in text and "has version 2, and 1 when the checkpoint was written" in text for text in warnings)
    lines = metrics(run)
    assert hooks(run, "start")[1] == ("0", ["small", 3, 1, "small"])
    assert [value[0] for _, value in hooks(run, "step")] == list(range(1, len(lines) + 1))
    assert hooks(run, "end") == [("0", [True, len(lines)])]

    plain = create_run(small_config(tmp_path / "shards", tmp_path, name="plain"), "test", 1)
    run_distributed(train_until_error, 1, plain)
    for line, other in zip(lines, metrics(plain), strict=True):
        assert line["samples_seen"] == other["samples_seen"]
        assert abs(line["loss"] - other["loss"]) < 1e-4 * other["loss"]
