"""A whole small run through every launcher: trained, evaluated, exported, and resumed after a kill."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.finished import run_config
from tests.support.progress import ended, marked, run_watched, wait_until
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import dump_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.formats import checkpoint_dir
from univitar_ds.training.distributed.ports import free_ports
from univitar_ds.training.distributed.preemption import SAVED

pytestmark = pytest.mark.distributed
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    shards = write_demo_shards(folder / "shards", images=48, videos=16, shards=2)
    config = run_config(shards, output=str(folder / "runs"), checkpoint={"every_steps": 2})
    dump_config(config, folder / "run.yaml")
    return folder / "run.yaml"


def environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in names}, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def completed(command: list[str]) -> subprocess.CompletedProcess[str]:
    return run_watched(command, env=environment())


LAUNCHERS = {
    "own": [str(BIN / "univitar-ds"), "train", "--nproc", "2"],
    "plain": [sys.executable, "-m", "univitar_ds", "train"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--master-port", "PORT", "--nproc-per-node", "2",
                 "-m", "univitar_ds", "train"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", "--module", "univitar_ds",
                  "train"],
}  # fmt: skip


@pytest.mark.parametrize(
    "launcher",
    [name if name == "own" else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS],
)
def test_a_run_is_trained_evaluated_and_exported_by(launcher, run_file):
    command = [str(free_ports()[0]) if part == "PORT" else part for part in LAUNCHERS[launcher]]
    done = completed([*command, "--config", str(run_file), f"name={launcher}", "stages.0.samples=40"])
    assert done.returncode == 0, done.stderr[-3000:]
    run = run_file.parent / "runs" / launcher
    summary = json.loads((run / "summary.json").read_text())
    assert summary["completed"] is True
    assert summary["ranks"] == (1 if launcher == "plain" else 2)
    assert set(summary["seconds"]) == {"training", "evaluation", "export"}
    assert (run / "export" / "model.safetensors").is_file()
    assert "x chance" in done.stdout
    assert done.stderr.count("INFO model exported to") == 1
    chosen = [line.split(" INFO ")[1] for line in done.stderr.splitlines() if " INFO attention on" in line]
    assert len(chosen) == len(set(chosen)) > 0, "only one rank logs what all ranks do"


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint_and_ends(run_file):
    run = run_file.parent / "runs" / "killed"
    overrides = ["name=killed", "stages.0.samples=1200", "logging.every_steps=1"]
    start = [*LAUNCHERS["own"], "--config", str(run_file), *overrides]
    process = subprocess.Popen(
        start, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until(
            lambda: len(checkpoint_dir.complete(run / CHECKPOINTS)) >= 2 or process.poll() is not None,
            "the second checkpoint",
            of={"the run": process.pid},
        )
        assert process.poll() is None, "the run ended before it was killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = completed([str(BIN / "univitar-ds"), "train", "--nproc", "1", "--resume", str(run)])
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["completed"] is True
    assert steps == list(range(1, summary["steps"] + 1))


TWO_HOSTS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "HOST",
                 "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", "PORT",
                 "-m", "univitar_ds", "train"],
    "deepspeed": [str(BIN / "deepspeed"), "--hostfile", "HOSTFILE", "--no_ssh", "--node_rank", "HOST", "--master_addr",
                  "127.0.0.1", "--master_port", "PORT", "--module", "univitar_ds", "train"],
}  # fmt: skip


class TwoHosts:
    """A launcher on each of two hosts with one rank each. Both hosts are names of this machine."""

    def __init__(self, launcher: str, hostfile: Path, *arguments: str) -> None:
        hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        port, self.log = str(free_ports()[0]), hostfile.with_suffix(".log")
        self.mark = f"TEST_OF_TWO_HOSTS={hostfile}-{port}".encode()
        name, value = self.mark.decode().split("=")
        self.started = []
        with self.log.open("a") as log:
            for host in ("0", "1"):
                places = {"HOST": host, "PORT": port, "HOSTFILE": str(hostfile)}
                command = [places.get(part, part) for part in TWO_HOSTS[launcher]] + list(arguments)
                self.started.append(
                    subprocess.Popen(command, env={**environment(), name: value}, stdout=log, stderr=log)
                )

    def ends(self) -> list[int]:
        """The exit codes of both launchers."""
        wait_until(
            lambda: all(process.poll() is not None for process in self.started),
            "two launchers",
            of=lambda: marked(self.mark.decode()),
        )
        return [process.returncode for process in self.started]

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        return next(pid for pid, environ in self._processes() if f"RANK={number}".encode() in environ)

    def kill(self) -> None:
        """Kills all remaining processes of the launchers."""
        for pid, _ in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()

    def _processes(self) -> Iterator[tuple[int, list[bytes]]]:
        """Yields (process id, environment), launchers first. Ranks of torchrun have their own sessions."""
        for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
            with suppress(OSError):  # the process has ended in the meantime
                environ = (folder / "environ").read_bytes().split(b"\0")
                if self.mark in environ:
                    yield int(folder.name), environ


@pytest.fixture
def two_hosts(tmp_path):
    """Starts a launcher on each of two hosts with the arguments of `train`."""
    started: list[TwoHosts] = []

    def start(launcher: str, *arguments: str) -> TwoHosts:
        started.append(TwoHosts(launcher, tmp_path / "hosts", *arguments))
        return started[-1]

    yield start
    for hosts in started:
        hosts.kill()


def after_some_steps(run: Path, launchers: list[subprocess.Popen], log: Path | None = None) -> None:
    def reached() -> bool:
        running = all(launcher.poll() is None for launcher in launchers)
        assert running, log.read_text()[-3000:] if log else "the launcher ended before the third step"
        return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 3

    wait_until(reached, "the third step", of={f"launcher {number}": one.pid for number, one in enumerate(launchers)})


def assert_saved_at_its_end(run: Path) -> None:
    """Checks that the run was stopped, with its only checkpoint at its last step."""
    (saved,) = checkpoint_dir.complete(run / CHECKPOINTS)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert saved.name == f"step-{steps[-1]:08d}"
    assert json.loads((run / "summary.json").read_text())["completed"] is False


SOME_STEPS = ["data.lanes=2", "stages.0.samples=250", "logging.every_steps=1", "checkpoint.every_steps=100000"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", TWO_HOSTS)
def test_a_stop_signal_to_one_rank_makes_all_hosts_save_and_the_run_is_resumed(launcher, run_file, two_hosts):
    run = run_file.parent / "runs" / f"asked-{launcher}"
    hosts = two_hosts(launcher, "--config", str(run_file), f"name={run.name}", *SOME_STEPS)
    after_some_steps(run, hosts.started, hosts.log)
    os.kill(hosts.rank(1), signal.SIGUSR1)
    codes = {"deepspeed": SAVED, "torchrun": 1}  # torchrun has one code for all failures
    assert hosts.ends() == [codes[launcher]] * 2, hosts.log.read_text()[-3000:]
    assert_saved_at_its_end(run)
    hosts = two_hosts(launcher, "--resume", str(run))
    assert hosts.ends() == [0, 0], hosts.log.read_text()[-3000:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, json.loads((run / "summary.json").read_text())["steps"] + 1))


@pytest.mark.slow
def test_the_own_launcher_forwards_a_signal_to_the_ranks(run_file):
    run = run_file.parent / "runs" / "asked-own"
    start = [*LAUNCHERS["own"], "--config", str(run_file), f"name={run.name}", *SOME_STEPS]
    process = subprocess.Popen(
        start, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        after_some_steps(run, [process])
        process.terminate()
        assert ended(process, "the run that was asked to stop") == SAVED
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert_saved_at_its_end(run)


def test_an_error_that_rank_0_finds_before_training_ends_all_ranks_with_one_message(run_file):
    command = [str(free_ports()[0]) if part == "PORT" else part for part in LAUNCHERS["deepspeed"]]
    done = completed([*command, "--config", str(run_file), "name=absent", "data.sources.0.path=nowhere"])
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1, done.stderr[-3000:]
    assert "source nowhere: there is no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_error_in_the_data_ends_all_ranks_with_one_message(run_file, tmp_path):
    shards = write_demo_shards(tmp_path / "shards", images=100, videos=16, shards=2)
    shard = sorted(shards.glob("train-image-*.tar"))[0]
    content = bytearray(shard.read_bytes())
    middle = content.find(b'{"captions"', len(content) // 2)
    content[middle] = ord("#")  # one sample, so that only one lane reads it
    shard.write_bytes(content)
    command = [*LAUNCHERS["own"], "--config", str(run_file), "name=faulty", f"data.sources.0.path={shards}"]
    done = completed([*command, "data.on_bad=fail", "data.pool_samples=8", "stages.0.samples=100"])
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1, done.stderr[-3000:]
    assert "data.on_bad is fail" in done.stderr
    assert "its .json does not parse" in done.stderr
    assert "Traceback" not in done.stderr
