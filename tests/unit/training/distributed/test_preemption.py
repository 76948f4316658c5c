"""Signals before, during and after training, in a child process with real signals, threads and exits."""

import platform
import signal
import subprocess
import sys

import pytest

from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.errors import ConfigError
from univitar_ds.training.distributed.preemption import SAVED
from univitar_ds.training.distributed.slurm import adopt_ranks, node_name, nodes_of_step

SLURM = ROOT / "slurm"
LISTENER = """
import os, signal, sys, time
from univitar_ds.processes import SIGNALS
from univitar_ds.training.distributed import preemption

for number in SIGNALS:  # whatever started the tests may ignore some
    signal.signal(number, signal.SIG_DFL)

stop = preemption.listen()
preemption.ECHO_S = float(sys.argv[2])

def sent(name):
    os.kill(os.getpid(), signal.Signals[name])

def until(condition):
    while not condition():
        time.sleep(0.005)

exec(sys.argv[1])
"""


def listened(code: str, echo_s: float = 0.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LISTENER, code, str(echo_s)]
    return run_watched(command)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_only_noted_while_the_run_trains(name):
    ended = listened(f"with stop.deferred(): sent('{name}'); until(lambda: stop.requested); print('went on')")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


def test_a_signal_before_or_after_training_ends_the_process_as_by_default():
    before = listened("sent('SIGUSR1'); time.sleep(600)")
    after = listened("with stop.deferred(): pass\nsent('SIGTERM'); time.sleep(600)")
    assert before.returncode == 128 + signal.SIGUSR1
    assert after.returncode == 128 + signal.SIGTERM
    assert after.stderr == "SIGTERM: exiting immediately, the last checkpoint stays\n"


HANGS = """
import ctypes, threading
with stop.deferred():
    sent("SIGUSR1")
    until(lambda: stop.requested)
    threading.Timer(0.1, sent, ("SIGTERM",)).start()
    # Like a collective operation that waits for a dead rank: a signal does not wake it.
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_the_process_at_once_also_while_it_hangs_outside_python():
    ended = listened(HANGS)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr == "SIGTERM: exiting immediately, the last checkpoint stays\n"


def test_a_second_ctrl_c_ends_the_process_at_once_although_other_repeated_signals_are_ignored():
    code = "preemption.KEY_ECHO_S = 0.0\nwith stop.deferred():\n sent('SIGINT'); until(lambda: stop.requested)\n "
    ended = listened(code + "sent('SIGINT'); time.sleep(20)", echo_s=60.0)
    assert (ended.returncode, ended.stderr) == (130, "SIGINT: exiting immediately, the last checkpoint stays\n")


def test_a_terminal_that_closes_after_ctrl_c_does_not_keep_the_run_from_saving():
    code = "with stop.deferred():\n sent('SIGINT'); until(lambda: stop.requested)\n sent('SIGHUP'); time.sleep(0.2)"
    assert listened(code).returncode == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_signals_that_the_parent_set_to_be_ignored_stay_ignored(name):
    code = f"signal.signal(signal.{name}, signal.SIG_IGN); preemption.listen(); sent('{name}'); time.sleep(0.2)"
    assert listened(code).returncode == 0


def test_a_process_started_while_signals_are_held_gets_them_when_it_listens():
    child = "from univitar_ds.training.distributed import preemption; input(); preemption.listen(); input()"
    code = f"""
import subprocess
from univitar_ds.processes import signals_held
with signals_held():
    child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE)
child.send_signal(signal.SIGINT)
child.stdin.write(b"listen\\n"); child.stdin.flush()
print(child.wait())
"""
    ended = listened(code)
    assert ended.stdout.split() == [str(128 + signal.SIGINT)], ended.stderr
    assert ended.stderr == "SIGINT: exiting immediately, the last checkpoint stays\n"


def test_only_rank_0_prints_a_message(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ended = listened("sent('SIGTERM'); time.sleep(20)")
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "")


def test_one_request_made_twice_is_one_request():
    code = "with stop.deferred():\n sent('SIGUSR1'); until(lambda: stop.requested)\n sent('SIGTERM'); time.sleep({})"
    assert listened(code.format(0.2), echo_s=3600.0).returncode == 0
    assert listened(code.format(600), echo_s=0.0).returncode == 128 + signal.SIGTERM


def test_a_process_that_is_ending_keeps_its_exit_code():
    code = "preemption.ignore(); sent('SIGTERM'); sent('SIGUSR1'); time.sleep(0.1); sys.exit(preemption.SAVED)"
    ended = listened(code)
    assert ended.returncode == SAVED


def test_processes_that_a_listener_starts_die_of_signals_as_usual():
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '600']); child.terminate(); print(child.wait())\n"
    ended = listened(code + "time.sleep(0.1); print(stop.requested)")
    assert ended.stdout.split() == ["-15", "False"]


def vote_of_rank_1() -> list[bool]:
    from univitar_ds.training.distributed.process_group import all_ranks_or_none, start_world

    world = start_world()
    answers = []
    for rank in (None, 1):
        with all_ranks_or_none(world, ask=lambda rank=rank: world.rank == rank) as vote:
            pass
        answers.append(vote.yes)
    return answers


@pytest.mark.distributed
def test_a_stop_request_to_one_rank_reaches_all_ranks():
    assert run_distributed(vote_of_rank_1, 2) == [[False, True], [False, True]]


TASK = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("shown", "local"), [(None, "1"), ("0,1,2,3", "1"), ("3", "0"), ("", "1")])
def test_a_task_of_srun_is_a_rank(shown, local):
    environment = {**TASK, **MASTER, **({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})}
    adopt_ranks(environment)
    ranks = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    assert ranks == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local}


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {**TASK, "RANK": "0", "WORLD_SIZE": "2"},
    ],
    ids=["a batch script", "a shell by srun --pty", "another launcher inside srun"],
)
def test_a_single_task_keeps_its_environment(environment):
    before = dict(environment)
    adopt_ranks(environment)
    assert environment == before


def test_the_error_of_tasks_without_an_address_of_rank_0_has_a_remedy():
    with pytest.raises(ConfigError, match=r"8 tasks and MASTER_PORT is not set; export .* as slurm/train.sbatch does"):
        adopt_ranks({**TASK, "MASTER_ADDR": "node1"})


@pytest.mark.parametrize("script", ["train", "preflight"])
@pytest.mark.parametrize("number", [7, 11_999, 12_345_678, 39_999, 67_108_863])
def test_the_port_of_a_job_is_none_that_linux_may_have_given_to_a_connection(script, number):
    (line,) = (
        line for line in (SLURM / f"{script}.sbatch").read_text().splitlines() if line.startswith("MASTER_PORT=")
    )
    port = subprocess.run(
        ["bash", "-c", f"{line}\necho $MASTER_PORT"], env={"SLURM_JOB_ID": str(number)}, capture_output=True, check=True
    )
    assert 1024 <= int(port.stdout) < 32_768


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", []),
        ("login", ["login"]),
        ("univitar-a,univitar-b", ["univitar-a", "univitar-b"]),
        ("n[1-3,7],x", ["n1", "n2", "n3", "n7", "x"]),
        ("gpu[008-011]-ib", ["gpu008-ib", "gpu009-ib", "gpu010-ib", "gpu011-ib"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
        ("n[a-b]", []),
        ("n[1-99999999999]", []),
        ("n[3-1]", []),
    ],
)
def test_the_nodes_of_a_step_are_those_that_scontrol_shows(text, nodes):
    assert nodes_of_step({"SLURM_STEP_NODELIST": text}) == nodes


def test_a_node_has_the_name_that_slurm_gives_it():
    assert node_name({"SLURMD_NODENAME": "gpu7"}) == "gpu7"
    assert node_name({}) == platform.node()
