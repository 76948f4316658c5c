"""The pipeline with small programs, which use the worker's protocol, in place of decoding processes."""

import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from socket import socketpair

import numpy as np
import pytest
import torch

from tests.support.memory import memory_shards, small_config
from tests.support.progress import run_watched
from univitar_ds.data.decoding import pipeline
from univitar_ds.data.decoding.decode_job import DecodeItem, DecodeJob
from univitar_ds.data.decoding.pipeline import Pipeline, PipelineConfig
from univitar_ds.data.media.frame_sampling import UNIFORM
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.sampler.cursor import LaneCursor
from univitar_ds.data.sampler.lanes import Lane
from univitar_ds.errors import DataError

SLOT = 40 * 588
PREAMBLE = """
import json, mmap, os, sys, time
from multiprocessing.connection import Connection
import numpy as np
from univitar_ds.data.decoding.shared_slots import SharedSlots
c = Connection(int(sys.argv[1]))
slots = SharedSlots(*map(int, sys.argv[2:]))
settings = c.recv_bytes()
def ready():
    c.send_bytes(b"ready")
def job():
    return json.loads(c.recv_bytes())
def draw(r):
    "Fill the pixels of every item with a byte that depends on its offset."
    room = slots.view(r["slot"])[r["start"]:]
    for path, offset, length, (_, h, w), *_ in r["decode"]["items"]:
        room[:h * w * 588] = offset // 512 % 251
        room = room[h * w * 588:]
        slots.done[r["slot"]] += 1
def answer(r, **what):
    c.send_bytes(json.dumps({"failures": [], **what}).encode())
def offsets(r):
    return [item[1] for item in r["decode"]["items"]]
"""
HONEST = """
ready()
while True:
    r = job(); draw(r); answer(r)
"""


class FakeServer:
    """Replaces ForkServer: every process runs `program`."""

    def __init__(self, program):
        self.program = program
        self.started = []

    def __call__(self, slots, needs):
        self._slots = slots
        return self

    def fork(self):
        ours, theirs = socketpair()
        with theirs:
            slots = self._slots
            numbers = (theirs.fileno(), slots.descriptor, slots.slots, slots.slot_bytes)
            command = [sys.executable, "-c", PREAMBLE + self.program, *map(str, numbers)]
            self.started.append(subprocess.Popen(command, pass_fds=[theirs.fileno(), slots.descriptor]))
        return self.started[-1].pid, Connection(ours.detach())

    def end(self, pid, *, hangs):
        (process,) = [one for one in self.started if one.pid == pid]
        if hangs:
            process.kill()
        return process.wait()

    def close(self):
        for process in self.started:
            process.kill()
            process.wait()


def play(monkeypatch, program):
    """Let the pipeline run `program` as decoding process; returns the list of started processes."""
    server = FakeServer(program)
    monkeypatch.setattr(pipeline, "ForkServer", server)
    return server.started


def plans(n=6):
    lane = Lane({"image": small_config(memory_shards([40]))}, LaneCursor(0, 1, 0, "f"))
    return iter([lane.next_plan("image", index) for index in range(n)])


def job_of(plan):
    items = [DecodeItem("m0", one.media_offset, one.media_length, one.grid, 1) for one in plan.samples]
    return DecodeJob("image", UNIFORM, DecodeLimits(10**6, 0.1, 60.0), items, plan.name)


def run(given=None, **changed):
    config = {"workers": 1, "prefetch_packs": 2, "slot_bytes": SLOT, "max_image_px": 10**6, **changed}
    given = plans() if given is None else given
    return Pipeline(lambda probe: given, job_of, PipelineConfig(**config))


def expected(plan, failures=()):
    """The pixels that the program HONEST writes."""
    without = {index for index, _, _ in failures}
    kept = [item for index, item in enumerate(plan.samples) if index not in without]
    parts = [np.full(item.tokens * 588, item.media_offset // 512 % 251, np.uint8) for item in kept]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def deadly(condition):
    """A program that decodes like HONEST, but runs DIE for items whose offset `o` satisfies a condition."""
    return f"""
ready()
while True:
    r = job()
    if any({condition} for o in offsets(r)): DIE
    draw(r); answer(r)
"""


def offset_of(step, index):
    return list(plans())[step].samples[index].media_offset


def test_packs_come_in_the_order_of_the_plans(monkeypatch):
    play(monkeypatch, "import random; ready()\nwhile True:\n  r = job(); time.sleep(0.02 * random.random()); answer(r)")
    with run(workers=3, prefetch_packs=4) as packs:
        assert [pack.plan.index for pack in packs] == list(range(6))


def test_a_process_that_died_is_restarted_and_its_pack_is_complete(monkeypatch, tmp_path):
    died = tmp_path / "died"
    once = f"""
ready()
while True:
    r = job()
    if {offset_of(2, 0)} in offsets(r) and not os.path.exists({str(died)!r}):
        open({str(died)!r}, "w"); slots.view(r["slot"])[:] = 7; os.kill(os.getpid(), 9)
    draw(r); answer(r)
"""
    started = play(monkeypatch, once)
    with run(restarts=1) as packs:
        for pack in packs:
            assert not pack.failures
            assert np.array_equal(pack.pixels, expected(pack.plan))
    assert len(started) == 2


def test_no_item_is_lost_if_processes_are_killed(monkeypatch):
    started = play(monkeypatch, HONEST.replace("draw(r)", "draw(r); time.sleep(0.01)"))
    with run(plans(24), workers=2, prefetch_packs=3, restarts=100) as packs:
        for number, pack in enumerate(packs):
            assert pack.plan.index == number
            assert not pack.failures
            assert np.array_equal(pack.pixels, expected(pack.plan))
            if number % 6 == 5:
                started[-1].send_signal(signal.SIGKILL)
    assert len(started) > 2


@pytest.mark.parametrize(
    ("death", "kind", "words"),
    [
        ("os.kill(os.getpid(), 11)", "crash", "was ended by SIGSEGV; 2 attempts"),
        ("os._exit(3)", "crash", "ended with exit code 3; 2 attempts"),
        ("time.sleep(600)", "timeout", "finished no item in 1.5 s; 2 attempts"),
    ],
)
def test_an_item_that_repeatedly_ends_its_process_is_one_bad_sample(monkeypatch, death, kind, words):
    play(monkeypatch, deadly(f"o == {offset_of(1, 1)}").replace("DIE", death))
    # Long enough that a working process on a busy machine does not count as hung.
    with run(plans(3), restarts=4, patience_s=1.5 if kind == "timeout" else 600.0) as packs:
        outcomes = list(packs)
    assert [pack.plan.index for pack in outcomes] == [0, 1, 2]
    assert [len(pack.failures) for pack in outcomes] == [0, 1, 0]
    ((index, what, message),) = outcomes[1].failures
    assert (index, what) == (1, kind)
    assert words in message
    for pack in outcomes:
        assert np.array_equal(pack.pixels, expected(pack.plan, pack.failures))


def test_restarts_caused_by_bad_samples_do_not_count_for_the_limit(monkeypatch):
    wanted = [offset_of(step, 0) for step in range(2)]
    started = play(monkeypatch, deadly(f"o in {wanted}").replace("DIE", "os._exit(1)"))
    with run(plans(3), restarts=4) as packs:
        assert [[index for index, _, _ in pack.failures] for pack in packs] == [[0], [0], []]
    assert len(started) == 9


def test_the_error_for_processes_that_die_too_often_names_the_pack(monkeypatch):
    play(monkeypatch, "ready(); r = job(); draw(r); answer(r); r = job(); os.kill(os.getpid(), 9)")
    with run(restarts=1) as packs:
        assert np.array_equal(next(packs).pixels, expected(next(plans())))
        next(packs)
        for _ in range(2):
            with pytest.raises(
                DataError,
                match=r"decoding process 0 \(pid \d+\) was ended by SIGKILL while processing the pack of lane 0, "
                r"step 2 \(\d+ samples, m0/0-.*\), and no restart is left \(data.worker_restarts is 1\); if memory ran "
                r"out, lower data.workers",
            ):
                next(packs)


def test_processes_that_cannot_start_end_the_run(monkeypatch):
    started = play(monkeypatch, "sys.exit(4)")
    with run(restarts=2) as packs, pytest.raises(DataError, match=r"ended with exit code 4, and no restart is left"):
        next(packs)
    assert len(started) == 3


def test_a_process_that_keeps_finishing_items_does_not_count_as_hung(monkeypatch):
    slow = "\nfor _ in range(5): time.sleep(0.5); slots.done[r['slot']] += 1\n"
    started = play(monkeypatch, f"ready(); r = job(){slow}draw(r); answer(r); job()")
    with run(plans(1), patience_s=2.0) as packs:
        assert np.array_equal(next(packs).pixels, expected(next(plans())))
    assert len(started) == 1


def test_a_bug_in_a_process_is_raised_with_its_traceback_in_the_place_of_its_pack(monkeypatch):
    play(monkeypatch, "ready(); answer(job()); answer(job(), fault='Traceback: ValueError'); job()")
    with run() as packs:
        assert next(packs).plan.index == 0
        for _ in range(2):
            with pytest.raises(RuntimeError, match="Traceback: ValueError"):
                next(packs)


def test_the_error_for_an_unreadable_shard_is_raised_in_the_place_of_its_pack(monkeypatch):
    play(monkeypatch, "ready(); answer(job()); answer(job(), data_error='shard x: gone'); job()")
    with run() as packs:
        assert next(packs).plan.index == 0
        with pytest.raises(DataError, match="shard x: gone"):
            next(packs)


def test_an_error_of_the_planner_is_raised_after_the_packs_it_planned(monkeypatch):
    play(monkeypatch, HONEST)

    def cut():
        yield from plans(3)
        raise DataError("shard x: cut off at byte 7")

    with run(cut()) as packs:
        assert [next(packs).plan.index for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(DataError, match="cut off at byte 7"):
                next(packs)


def test_no_more_is_planned_ahead_than_slots_and_queue_hold(monkeypatch):
    play(monkeypatch, HONEST)
    drawn = []

    def counted():
        for plan in plans(30):
            drawn.append(plan.index)
            yield plan

    with run(counted()) as packs:
        for step in range(20):
            next(packs)
            assert len(drawn) <= step + 1 + 2 + 2 + 1 + pipeline.PLANNED_TOGETHER


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("held", [0, 1, 3, 12])
def test_held_packs_keep_their_pixels_while_decoding_continues(monkeypatch, held, shared):
    play(monkeypatch, HONEST)
    kept = []
    with run(plans(30), workers=2, shared_slots=shared) as packs:
        for pack in packs:
            kept.append((pack.plan, torch.from_numpy(pack.pixels)))
            for plan, pixels in kept:
                assert np.array_equal(pixels.numpy(), expected(plan))
            kept = kept[len(kept) - held :]
    for plan, pixels in kept:
        assert np.array_equal(pixels.numpy(), expected(plan))


@pytest.mark.parametrize("max_held_slots", [1, 2, 4])
def test_a_slot_is_reused_once_no_view_of_its_pixels_exists(monkeypatch, max_held_slots):
    play(monkeypatch, HONEST)
    with run(plans(30), max_held_slots=max_held_slots) as packs:
        views = [next(packs).pixels[5:][2:] for _ in range(max_held_slots)]
        assert packs._held == max_held_slots
        slots = {view.__array_interface__["data"][0] for view in views}
        assert next(packs).pixels.flags.owndata
        views.pop()
        pixels = next(packs).pixels
        assert packs._held == max_held_slots
        assert not pixels.flags.owndata
        del pixels, views
        assert packs._held == 0
        assert len(slots) == max_held_slots


def test_with_a_shared_slot_fewer_packs_are_decoded_ahead_while_the_trainer_holds_the_most(monkeypatch):
    play(monkeypatch, HONEST)
    with run(plans(30), prefetch_packs=3, max_held_slots=2, shared_slots=1) as packs:

        def soon(undelivered):
            def reached():
                return len(packs._done) == packs._undelivered == undelivered

            while not reached():
                time.sleep(0.01)
            time.sleep(0.1)  # until the thread that decoded the last one waits for the next
            return reached()

        assert soon(3)
        held = [next(packs), next(packs)]
        assert soon(2)
        assert not packs._free
        assert not packs._may_decode()
        held.pop()
        assert soon(3)


@pytest.mark.parametrize("program", ["time.sleep(600)", "ready(); job(); time.sleep(600)", HONEST])
def test_close_ends_processes_in_any_state(monkeypatch, program):
    started = play(monkeypatch, program)
    packs = run(workers=2)
    while len(started) < 2:
        time.sleep(0.01)
    packs.close()
    packs.close()
    assert all(process.poll() == -signal.SIGKILL for process in started)
    assert not [thread for thread in threading.enumerate() if thread.name in ("planner", "decoder")]


def test_pipeline_and_lanes_import_no_library_for_videos():
    code = (
        "import sys; from univitar_ds.data.decoding import pipeline; from univitar_ds.data.sampler import lanes;"
        "print([name for name in ('av', 'torch') if name in sys.modules])"
    )
    result = run_watched([sys.executable, "-c", code], check=True)
    assert result.stdout.strip() == "[]"
