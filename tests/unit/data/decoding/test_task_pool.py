"""A task pool loses only the items that crash or hang a process."""

import os
import signal
import time
from pathlib import Path

import pytest

from univitar_ds.data.decoding.task_pool import Done, Lost, Next, Reached, Task, TaskPool
from univitar_ds.errors import DataError


def play(task: Task, report) -> None:
    """A work function over five items that follows a script {item: action}; "before" is an action before the first."""
    start = task.start or 0
    if start == 0 and "prepared" in task.job:
        report("prepared")
        report(Reached(0.0))
        if task.job["prepared"] == "dies" and task.start is None:
            os._exit(3)
    if task.job.get("before") == "dies":
        os._exit(3)
    if task.job.get("before") == "refuses":
        raise DataError("no such file; name another")
    for item in range(int(start), 5):
        report(Next(f"item {item}", item, item + 1))
        happening = task.job.get(item)
        if happening == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(happening, Path) and not happening.exists():
            report("half of an item")
            happening.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if happening == "hangs":
            time.sleep(600)
        if happening == "faults":
            raise KeyError("odd")
        report(item)


def played(*jobs, workers=2, silence_s=60.0):
    """The events of each job, by job."""
    events = [[] for _ in jobs]
    with TaskPool(play, workers, silence_s) as pool:
        for number, event in pool.run(Task(number, job) for number, job in enumerate(jobs)):
            events[number].append(event)
    return events


def results(events):
    return [event for event in events if isinstance(event, int)]


def test_the_items_of_every_task_are_processed_in_order():
    for events in played(*[{}] * 5, workers=3):
        assert results(events) == [0, 1, 2, 3, 4]
        assert [event.item for event in events if isinstance(event, Next)] == [f"item {item}" for item in range(5)]
        assert events[-1] == Done()


def test_a_task_is_taken_from_the_iterator_only_when_a_process_is_free():
    """So there may be millions of tasks."""
    taken = []
    tasks = (taken.append(number) or Task(number, {}) for number in range(9))
    done = 0
    with TaskPool(play, 2, 60.0) as pool:
        for _, event in pool.run(tasks):
            done += event == Done()
            assert len(taken) <= done + 2
    assert taken == list(range(9))


def test_only_the_present_item_of_a_process_that_dies_is_lost():
    jobs = {1: "dies", 2: "dies"}, {}, {4: "dies"}
    detail = "the process that worked on it died (exit code -9)"
    for events, dead in zip(played(*jobs), [[1, 2], [], [4]], strict=True):
        assert results(events) == [item for item in range(5) if item not in dead]
        lost = [event for event in events if isinstance(event, Lost)]
        assert lost == [Lost(f"item {item}", "crash", detail) for item in dead]
        assert events[-1] == Done()


def test_an_item_whose_first_process_was_killed_is_tried_again_and_reported_once(tmp_path):
    """The system may kill any process."""
    for events in played({0: tmp_path / "a", 3: tmp_path / "b"}, {4: tmp_path / "c"}):
        assert results(events) == [0, 1, 2, 3, 4]
        assert [event.item for event in events if isinstance(event, Next)] == [f"item {item}" for item in range(5)]
        assert "half of an item" not in events
        assert events[-1] == Done()


def test_only_the_present_item_of_a_process_that_hangs_is_lost():
    (events,) = played({2: "hangs"}, silence_s=3.0)
    (lost,) = [event for event in events if isinstance(event, Lost)]
    assert lost[:2] == ("item 2", "timeout")
    assert "3 seconds" in lost.detail
    assert results(events) == [0, 1, 3, 4]
    assert events[-1] == Done()


def test_another_process_continues_at_the_last_reported_position():
    (events,) = played({"prepared": "dies"})
    assert events.count("prepared") == 2, "said before the process died and by the next one, which begins at 0.0"
    assert results(events) == [0, 1, 2, 3, 4]
    assert not any(isinstance(event, Reached) for event in events)


def test_a_task_that_kills_two_processes_before_its_first_item_is_given_up():
    first, second = played({"before": "dies"}, {})
    assert "died (exit code 3), twice" in first[-1].error
    assert len(first) == 1
    assert second[-1] == Done()


def test_a_task_that_cannot_be_finished_has_an_error_and_the_others_continue():
    first, second = played({"before": "refuses"}, {})
    assert first == [Done("no such file; name another")]
    assert second[-1] == Done()


def test_a_bug_in_a_process_is_raised():
    with pytest.raises(RuntimeError, match=r"(?s)task number 0:.*KeyError: 'odd'"):
        played({3: "faults"})


def test_no_process_is_started_without_tasks():
    with TaskPool(play, 2, 60.0) as pool:
        assert list(pool.run([])) == []
