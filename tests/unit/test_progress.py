"""The waits of the tests themselves: a wait without progress is ended, a slow one is not."""

import ast
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.progress import (
    Stalled,
    cpu_seconds,
    end_tree,
    ended,
    marked,
    output_of,
    run_watched,
    runs,
    wait_until,
)

TESTS = Path(__file__).parents[1]
SHORT = {"idle_s": 2.0}
SLEEPS = "import time\ndef asleep(): time.sleep(600)\nprint('up', flush=True)\nasleep()"
SPINS = "import sys, time\nend = float(sys.argv[1])\nwhile time.process_time() < end: pass\nprint('done')"
CHILD_SPINS = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SPINS!r}, *sys.argv[1:]], check=True)"


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def started(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(python(code, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_command_that_uses_no_cpu_time_is_ended_with_its_stack_and_its_output():
    with pytest.raises(Stalled, match=r"no progress for 2 s \(its processes: \d+\.\d\d s of CPU time\)") as stalled:
        run_watched(python(SLEEPS), limits=SHORT)
    assert "\nup\n" in str(stalled.value)
    assert "in asleep" in str(stalled.value)


@pytest.mark.parametrize("code", [SPINS, CHILD_SPINS], ids=["itself", "a child"])
def test_a_command_that_computes_for_longer_than_the_limit_is_left_alone(code):
    done = run_watched(python(code, "2.5"), check=True, limits=SHORT)  # of CPU time, so no less by the clock
    assert done.stdout == "done\n"


def test_the_time_of_children_that_have_ended_counts():
    code = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {SPINS!r}, '1'])\n" + SLEEPS
    process = started(code)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["done\n", "up\n"]
        assert cpu_seconds(process.pid) >= 1.0
    finally:
        end_tree(process.pid, stacks=False)
        process.communicate()


def test_an_endless_loop_is_ended_by_the_limit_of_the_whole_wait():
    process = started(SPINS, "inf")
    with pytest.raises(Stalled, match=r"the loop: not done after 2 s \(its processes: "):
        output_of(process, "the loop", idle_s=1.0, whole_s=2.0)
    assert process.returncode == -6


def test_a_stalled_command_is_ended_with_its_descendants():
    code = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}])\nchild.wait()"
    with pytest.raises(Stalled):
        run_watched(python(code), env={**os.environ, "TEST_OF_TREES": str(os.getpid())}, limits=SHORT)
    wait_until(lambda: not any(map(runs, marked(f"TEST_OF_TREES={os.getpid()}").values())), "the end of the tree")


def test_a_heartbeat_counts_and_its_end_does_not():
    beats = iter(range(12))  # a beat at every look: 12 of them outlast the limit twice
    last = [0]

    def heartbeat() -> int:
        last[0] = next(beats, last[0])
        return last[0]

    process = started(SLEEPS)
    with pytest.raises(Stalled, match="no progress for 1 s"):
        output_of(process, "a sleeper", idle_s=1.0, heartbeat=heartbeat)
    assert last == [11]


def test_waiting_is_no_progress_of_the_process_that_waits():
    with pytest.raises(Stalled, match="a sign: no progress for 2 s"):
        wait_until(lambda: False, "a sign", **SHORT)


def test_a_thread_that_computes_is_progress_of_its_process():
    done = threading.Event()

    def spin() -> None:
        until = time.thread_time() + 2.5
        while time.thread_time() < until:
            pass
        done.set()

    threading.Thread(target=spin).start()
    wait_until(done.is_set, "the thread", **SHORT)


def test_the_exit_code_of_a_process_is_waited_for_and_a_sleeper_is_named():
    assert ended(started("raise SystemExit(7)"), "the end") == 7
    process = started(SLEEPS)
    with pytest.raises(Stalled, match=r"the trainer: no progress for 2 s \(the trainer: "):
        ended(process, "the trainer", **SHORT)
    process.kill()
    process.communicate()


def test_a_failure_raises_the_error_of_subprocess():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3") as failed:
        run_watched(python("import sys; print('said'); sys.exit(3)"), check=True)
    assert failed.value.stdout == "said\n"
    assert run_watched(python("print(1)"), text=False).stdout == b"1\n"


def test_a_job_that_has_no_process_left_is_ended_with_these_words():
    with pytest.raises(Stalled, match=r"a job: no progress for 0\.5 s \(no process is left\)"):
        wait_until(lambda: False, "a job", of=dict, idle_s=0.5)


TIMED = {"run", "check_output", "check_call", "call", "communicate", "wait", "wait_for", "join", "get", "timeout"}
"""Calls that take a limit in seconds."""


def limits_of_their_own(path: Path) -> list[str]:
    """Places where a file of tests ends a wait by the clock alone."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in TIMED:
            continue
        given = [word.value for word in node.keywords if word.arg in ("timeout", "timeout_s")]
        given += node.args if node.func.attr in ("wait", "join", "communicate", "timeout") else []
        if any(isinstance(value, ast.Constant) and isinstance(value.value, int | float) for value in given):
            found.append(f"{path.relative_to(TESTS)}:{node.lineno}")
    return found


OF_A_CLOCK = {
    "support/progress.py",  # after SIGABRT, for what may hang in the kernel
    "distributed/test_chaos.py",  # one test of twenty starts
}


def test_no_test_ends_a_wait_by_the_clock():
    places = [place for path in sorted(TESTS.rglob("*.py")) for place in limits_of_their_own(path)]
    wrong = [place for place in places if place.partition(":")[0] not in OF_A_CLOCK]
    assert not wrong, f"a busy machine meets these limits; wait with tests/support/progress.py: {wrong}"


def test_a_limit_by_the_clock_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TESTS", tmp_path)
    lines = ["subprocess.run(x, timeout=60)", "thread.join(5)", "barrier.wait(timeout=20)", "pytest.mark.timeout(240)"]
    fine = ["thread.join()", "', '.join(words)", "barrier.wait(timeout=WHOLE_S)", "storage(url, idle_timeout_s=1.0)"]
    path = tmp_path / "test_x.py"
    path.write_text("\n".join([*lines, *fine]))
    assert limits_of_their_own(path) == [f"test_x.py:{number}" for number in range(1, 5)]
