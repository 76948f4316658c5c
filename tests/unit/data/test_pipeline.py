"""Decoding processes that misbehave, played by small programs that speak the worker's protocol."""

import subprocess
import sys
from multiprocessing.connection import Connection
from socket import socketpair

import pytest

from tests.support.memory import memory_shards, small_rules
from univitar_ds.data import pipeline
from univitar_ds.data.cursor import LaneCursor
from univitar_ds.data.lanes import Lane
from univitar_ds.data.pipeline import Pipeline
from univitar_ds.data.render import DecodeLimits, RenderItem, RenderJob
from univitar_ds.data.sampling import UNIFORM
from univitar_ds.errors import DataError

PREAMBLE = (
    "import json, sys, time; from multiprocessing.connection import Connection; c = Connection(int(sys.argv[1]));"
)


def play(monkeypatch, program):
    """Let `program` be what decodes; it has the channel as c."""

    def start(ring):
        ours, theirs = socketpair()
        with theirs:
            command = [sys.executable, "-c", PREAMBLE + program, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return process, Connection(ours.detach())

    monkeypatch.setattr(pipeline.worker, "start", start)


def plans(n=6):
    lane = Lane({"image": small_rules(memory_shards([40]))}, LaneCursor(0, 1, 0, "f"))
    return iter([lane.next_plan("image", index) for index in range(n)])


def job_of(plan):
    items = [
        RenderItem("m0", item.sample.media_offset, item.sample.media_length, item.sample.grid, 1) for item in plan.items
    ]
    return RenderJob("image", UNIFORM, DecodeLimits(10**6, 0.1), items)


def run(**given):
    fields = {"workers": 1, "prefetch_packs": 2, "slot_bytes": 40 * 588, **given}
    return Pipeline(plans(), job_of, **fields)


ANSWER = "r = json.loads(c.recv_bytes()); c.send_bytes(json.dumps({'failures': []}).encode())"


def test_packs_come_in_the_order_of_the_plans_whoever_is_faster(monkeypatch):
    play(monkeypatch, f"\nwhile True:\n  time.sleep(0.02 * (id(c) % 3)); {ANSWER}")
    with run(workers=3, prefetch_packs=4) as packs:
        assert [pack.plan.index for pack in packs] == list(range(6))


def test_a_process_that_gives_no_answer_is_an_error_after_a_while(monkeypatch):
    monkeypatch.setattr(pipeline, "_PATIENCE_S", 0.3)
    play(monkeypatch, "time.sleep(600)")
    with (
        run() as packs,
        pytest.raises(DataError, match=r"gave no answer in time on the pack of lane 0, step 0 .*m0/0-"),
    ):
        next(packs)


def test_a_process_that_ends_by_itself_is_told_with_its_exit_code(monkeypatch):
    play(monkeypatch, f"{ANSWER}; c.recv_bytes(); sys.exit(3)")
    with run() as packs:
        next(packs)
        with pytest.raises(DataError, match=r"ended with exit code 3 while it had the pack of lane 0, step 1"):
            next(packs)


def test_a_fault_of_the_program_keeps_its_traceback_and_its_turn(monkeypatch):
    fault = "r = json.loads(c.recv_bytes()); c.send_bytes(json.dumps({'fault': 'Traceback: ValueError'}).encode())"
    play(monkeypatch, f"{ANSWER}; {fault}; c.recv_bytes()")
    with run() as packs:
        assert next(packs).plan.index == 0
        with pytest.raises(RuntimeError, match="Traceback: ValueError"):
            next(packs)


def test_what_the_planner_raises_comes_after_the_packs_it_planned(monkeypatch):
    play(monkeypatch, f"\nwhile True: {ANSWER}")

    def cut():
        yield from plans(3)
        raise DataError("shard x: cut off at byte 7")

    with Pipeline(cut(), job_of, workers=1, prefetch_packs=2, slot_bytes=40 * 588) as packs:
        assert [next(packs).plan.index for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(DataError, match="cut off at byte 7"):
                next(packs)


def test_no_more_is_planned_ahead_than_the_ring_and_the_queue_hold(monkeypatch):
    play(monkeypatch, f"\nwhile True: {ANSWER}")
    drawn = []

    def counted():
        for plan in plans(30):
            drawn.append(plan.index)
            yield plan

    with Pipeline(counted(), job_of, workers=1, prefetch_packs=2, slot_bytes=40 * 588) as packs:
        for step in range(20):
            next(packs)
            assert len(drawn) <= step + 1 + 2 + 2 + 1
