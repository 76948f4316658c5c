"""Phases add up to the step, with any clock, and show where a rank is."""

import threading

import pytest

from univitar_ds.training.watch import phases
from univitar_ds.training.watch.phases import (
    BACKWARD,
    CHECKPOINT,
    COLLECTIVES,
    DATA,
    FIRST_STEPS,
    FORWARD,
    OTHER,
    PHASES,
    SETTLING,
    STEP,
    DeviceMarks,
    StepClock,
    active,
    phase,
)


class Clock:
    """Marks of a clock that the test sets."""

    def __init__(self) -> None:
        self.now, self.ready = 0.0, True

    def mark(self):
        return self.now

    def passed(self, mark):
        return self.ready

    def seconds(self, first, last):
        return last - first

    def reuse(self, mark):
        pass


def spent(clock: StepClock) -> dict[str, float]:
    steps, *seconds = clock.take()
    return {"steps": steps} | {name: value for name, value in zip(PHASES, seconds, strict=True) if value}


def one_step(clock: StepClock, marks: Clock) -> None:
    with active(clock):
        clock.begin_step(1)
        with phase(DATA):
            marks.now += 1
            with phase(COLLECTIVES, "all_reduce"):
                marks.now += 10
        with phase(FORWARD):
            marks.now += 100
        marks.now += 1000
        with phase(BACKWARD):
            marks.now += 10_000
            with phase(COLLECTIVES, "all_gather"), phase(COLLECTIVES, "waiting"):
                marks.now += 100_000
            marks.now += 10_000
        clock.end_step()


STEP_OF_ALL = {DATA: 1.0, COLLECTIVES: 100_010.0, FORWARD: 100.0, OTHER: 1000.0, BACKWARD: 20_000.0}


def test_a_phase_inside_another_counts_for_itself_alone():
    marks = Clock()
    clock = StepClock(marks)
    one_step(clock, marks)
    one_step(clock, marks)
    assert spent(clock) == {"steps": 2.0} | {name: 2 * value for name, value in STEP_OF_ALL.items()}
    assert spent(clock) == {"steps": 0.0}


def test_steps_that_the_device_has_not_done_are_taken_later():
    marks = Clock()
    clock, marks.ready = StepClock(marks), False
    one_step(clock, marks)
    assert spent(clock) == {"steps": 0.0}
    marks.ready = True
    assert spent(clock) == {"steps": 1.0} | STEP_OF_ALL


def test_a_step_that_did_not_end_counts_nothing():
    marks = Clock()
    clock = StepClock(marks)
    clock.begin_step(1)
    marks.now += 7
    clock.start()
    clock.end_step()
    one_step(clock, marks)
    assert spent(clock) == {"steps": 1.0} | STEP_OF_ALL


def test_without_a_clock_marks_do_nothing():
    with phase(FORWARD), phases.section(CHECKPOINT):
        pass


def test_a_position_names_section_step_phase_and_call():
    clock = StepClock(Clock())
    with active(clock):
        for number in range(1, SETTLING + 2):
            clock.begin_step(number)
            with phase(DATA), phase(COLLECTIVES, "all_reduce"):
                where = clock.position
                assert (where.step, where.phase, where.call, where.calls) == (number, DATA, "all_reduce", number)
                assert where.section == (STEP if number > SETTLING else FIRST_STEPS)
            assert (clock.position.phase, clock.position.call) == (OTHER, "")
            clock.end_step()
        with phases.section(CHECKPOINT), phase(COLLECTIVES, "gather"):
            assert (clock.position.section, clock.position.phase, clock.position.call) == (CHECKPOINT, OTHER, "gather")
        clock.start()
        assert clock.position.section == phases.START


class Cuda:
    """Streams and events of a stand-in for torch.cuda, in which the device is behind the host."""

    def __init__(self) -> None:
        self.stream, self.made, self.enqueued, self.done = "compute", 0, 0.0, 0.0

    def current_stream(self):
        return self.stream

    def Event(self, enable_timing):
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.at = cuda, None

    def record(self, stream):
        assert stream == "compute"
        self.at = self.cuda.enqueued

    def query(self):
        return self.at <= self.cuda.done

    def elapsed_time(self, other):
        assert all(event.query() for event in (self, other)), "the host would wait for the device"
        return 1000 * (other.at - self.at)


def test_events_are_read_without_waiting_and_used_again():
    cuda = Cuda()
    clock = StepClock(DeviceMarks(cuda))
    for _ in range(5):
        with active(clock):
            clock.begin_step(1)
            with phase(FORWARD):
                cuda.enqueued += 2
                cuda.stream = "reduce"  # what runs beside the step is no phase of it
                with phase(COLLECTIVES, "reduce_scatter"):
                    assert clock.position.call == "reduce_scatter"
                cuda.stream = "compute"
            clock.end_step()
        assert spent(clock) == {"steps": 0.0}
        cuda.done = cuda.enqueued
        assert spent(clock) == {"steps": 1.0, FORWARD: 2.0}
    assert cuda.made == 4  # of one step


def test_a_thread_that_the_step_waits_for_marks_the_same_step():
    marks = Clock()
    clock = StepClock(marks)

    def hook() -> None:
        with phase(COLLECTIVES, "reduce_scatter"):
            marks.now += 5

    with active(clock):
        clock.begin_step(1)
        with phase(BACKWARD):
            thread = threading.Thread(target=hook)
            thread.start()
            thread.join()
            marks.now += 2
        clock.end_step()
    assert spent(clock) == {"steps": 1.0, BACKWARD: 2.0, COLLECTIVES: 5.0}


def test_an_error_leaves_its_phases():
    clock = StepClock(Clock())
    with pytest.raises(ValueError, match="broken"), active(clock), phase(FORWARD), phase(COLLECTIVES, "send"):
        raise ValueError("broken")
    assert (clock.position.phase, clock.position.call) == (OTHER, "")
