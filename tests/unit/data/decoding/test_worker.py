"""Real decoding processes: started, ended, killed, and gone when the trainer is."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import media
from tests.support.decoding import decoders, servers
from tests.support.progress import WHOLE_S, run_watched, runs, wait_until
from univitar_ds.data.decoding import forkserver
from univitar_ds.data.decoding.decode_job import DecodeItem, DecodeJob
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.decoding.supervisor import RestartBudget, WorkerSupervisor
from univitar_ds.data.media.frame_sampling import UNIFORM
from univitar_ds.data.media.resize import fit_image
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.storage.base import LOCAL

GRID = (1, 2, 3)


def gone(pid):
    wait_until(lambda: not runs(pid), f"the end of process {pid}")
    return True


@pytest.fixture
def ring():
    ring = SharedSlots.create(2, 3 * 28 * 42 * 3)
    yield ring
    ring.close()


@pytest.fixture
def server(ring):
    server = ForkServer(ring)
    yield server
    server.close()


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(media.encoded(media.noise(50, 70), "PNG"))
    return DecodeJob("image", UNIFORM, DecodeLimits(10**6, 30.0, 60.0), [
        DecodeItem(str(path), 0, path.stat().st_size, GRID, 1)
    ])  # fmt: skip


@pytest.fixture
def stuck(job, tmp_path):
    """A job that never ends: opening a pipe waits for a writer, deaf to signals that can be handled."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return DecodeJob("image", UNIFORM, job.limits, [DecodeItem(str(path), 0, 9, GRID, 1)])


def drawn(ring):
    return ring.view(1).reshape(3, 28, 42, 3)


def greeted(channel):
    channel.send_bytes(json.dumps(LOCAL.to_json()).encode())
    assert channel.recv_bytes() == b"ready"


def test_pixels_come_through_the_ring_from_a_process_that_was_killed_before(server, ring, job):
    supervisor = WorkerSupervisor(0, server, ring, LOCAL, RestartBudget(1))
    expected = fit_image(np.asarray(media.noise(50, 70)), GRID)
    assert supervisor.decode_pack(1, job) == []
    assert (drawn(ring)[0] == expected).all()
    ring.view(1)[:] = 0
    os.kill(*decoders(), signal.SIGKILL)
    assert supervisor.decode_pack(1, job) == []
    assert (drawn(ring)[0] == expected).all()
    assert not drawn(ring)[1:].any()
    assert ring.done.tolist() == [0, 2]
    assert not ring.view(0).any()


class FragileServer:
    """A server whose first processes die of their first job."""

    def __init__(self, server, dying):
        self.server, self.dying = server, dying

    def fork(self):
        pid, channel = self.server.fork()
        self.dying -= 1
        return pid, FragileChannel(pid, channel) if self.dying >= 0 else channel

    def end(self, pid, *, hangs):
        return self.server.end(pid, hangs=hangs)


class FragileChannel:
    def __init__(self, pid, channel):
        self.pid, self.channel, self.ready = pid, channel, False

    def send_bytes(self, message):
        if self.ready:
            os.kill(self.pid, signal.SIGKILL)
            gone(self.pid)
        self.channel.send_bytes(message)

    def recv_bytes(self):
        answer = self.channel.recv_bytes()
        self.ready = True
        return answer

    def __getattr__(self, name):
        return getattr(self.channel, name)


def test_items_done_one_by_one_are_written_where_the_whole_pack_puts_them(server, ring, job, caplog):
    good = job.items[0]
    items = [good, replace(good, length=20), replace(good, grid=(1, 1, 1)), good]
    whole = WorkerSupervisor(0, server, ring, LOCAL, RestartBudget(0)).decode_pack(0, replace(job, items=items))
    after_crashes = WorkerSupervisor(1, FragileServer(server, 2), ring, LOCAL, RestartBudget(2))
    alone = after_crashes.decode_pack(1, replace(job, items=items))
    assert "one by one" in caplog.text
    assert [(index, kind) for index, kind, _ in whole] == [(1, "unreadable")]
    assert alone == whole
    assert (ring.view(0) == ring.view(1)).all()
    used = 2 * 28 * 42 * 3 + 588
    assert ring.view(0)[used - 100 : used].any()
    assert not ring.view(0)[used:].any()


def mapped(pid):
    return Path(f"/proc/{pid}/maps").read_text()


def private_mb(pid):
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private")) / 1024


def test_a_process_for_images_holds_no_library_for_videos_and_can_still_decode_one(ring, job, tmp_path):
    server = ForkServer(ring, ["image"])
    supervisor = WorkerSupervisor(0, server, ring, LOCAL, RestartBudget(0))
    try:
        assert supervisor.decode_pack(0, job) == []
        (pid,) = decoders()
        assert "simplejpeg" in mapped(pid)
        assert "libavcodec" not in mapped(pid)
        video = tmp_path / "clip"
        video.write_bytes(media.video(media.moving_frames(3)))
        item = DecodeItem(str(video), 0, video.stat().st_size, GRID, 2)
        assert supervisor.decode_pack(1, replace(job, modality="video", items=[item])) == []
        assert drawn(ring)[:2].any()
    finally:
        server.close()


@pytest.mark.parametrize(("needs", "found"), [(["image"], False), (["image", "s3"], True)])
def test_what_reads_from_s3_is_imported_once_and_only_where_shards_lie_there(monkeypatch, capfd, ring, needs, found):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    server = ForkServer(ring, needs)
    try:
        server.fork()
        imported = capfd.readouterr().err
        assert "univitar_ds.data.media.jpeg_header\n" in imported
        assert ("univitar_ds.data.storage.s3_client\n" in imported) == found
        assert "boto" not in imported  # a decoder makes a request only for what no local copy has
    finally:
        server.close()


def test_a_process_for_videos_shares_their_library_with_the_one_it_was_forked_from(server, ring, job):
    pid, channel = server.fork()
    greeted(channel)
    assert "libavcodec" in mapped(pid)
    channel.close()


def test_large_images_leave_no_memory_behind(server, ring, job, tmp_path):
    supervisor = WorkerSupervisor(0, server, ring, LOCAL, RestartBudget(0))
    supervisor.decode_pack(0, job)
    (pid,) = decoders()
    before = private_mb(pid)
    items = []
    for side in (
        1500,
        2500,
        1500,
        2000,
        1800,
        2400,
        1000,
    ):  # up to 18 MiB decoded; glibc by itself keeps 13 MiB of them
        path = tmp_path / f"{side}.png"
        path.write_bytes(media.encoded(Image.new("RGB", (side, side)), "PNG"))
        items.append(DecodeItem(str(path), 0, path.stat().st_size, GRID, 1))
    limits = replace(job.limits, max_image_px=10**7)
    for item in items:
        assert supervisor.decode_pack(0, replace(job, limits=limits, items=[item])) == []
    assert (left := private_mb(pid) - before) < 8, left


def test_a_decoding_process_is_held_to_the_memory_that_decoding_may_take(server, ring, job):
    supervisor = WorkerSupervisor(0, server, ring, LOCAL, RestartBudget(0))
    supervisor.start()
    assert supervisor.decode_pack(0, job) == []
    (pid,) = decoders()
    (line,) = [text for text in Path(f"/proc/{pid}/limits").read_text().splitlines() if "data size" in text]
    soft = int(line.split()[3])
    supervisor.stop()
    assert 1 << 30 < soft < 3 << 29


def test_processes_end_with_their_channel_and_their_exit_code_is_known(server):
    pid, channel = server.fork()
    greeted(channel)
    channel.close()
    assert server.end(pid, hangs=False) == 0
    assert gone(pid)
    pid, channel = server.fork()
    greeted(channel)
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(EOFError):
        channel.recv_bytes()
    assert server.end(pid, hangs=False) == -signal.SIGSEGV
    pid, channel = server.fork()
    greeted(channel)
    assert server.end(pid, hangs=True) == -signal.SIGKILL
    assert gone(pid)


def test_when_the_server_is_killed_its_processes_go_and_the_next_call_starts_another(server, ring, job, stuck):
    supervisor = WorkerSupervisor(0, server, ring, LOCAL, RestartBudget(1))
    assert supervisor.decode_pack(0, job) == []
    pid, channel = server.fork()
    greeted(channel)
    channel.send_bytes(json.dumps({"slot": 1, "start": 0, "decode": stuck.to_json()}).encode())
    os.kill(*servers(), signal.SIGKILL)
    assert gone(pid)
    assert supervisor.decode_pack(0, job) == []
    assert server.end(pid, hangs=True) is None
    assert supervisor.decode_pack(0, job) == []
    assert server.end(os.getpid(), hangs=True) is None


def test_closing_ends_a_process_in_the_middle_of_its_work_and_is_safe_again(started, server, stuck, monkeypatch):
    monkeypatch.setattr(forkserver, "CLOSE_S", WHOLE_S)  # on a busy machine the server may need longer than 10 s
    pid, channel = server.fork()
    greeted(channel)
    channel.send_bytes(json.dumps({"slot": 0, "start": 0, "decode": stuck.to_json()}).encode())
    server.close()
    server.close()
    assert [process.returncode for process in started] == [0]
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises((EOFError, OSError)):
        server.fork()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
def test_a_decoder_in_the_middle_of_its_work_does_not_outlive_the_trainer(stuck, end):
    script = f"""
import json, os, signal, sys
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.processes import children
server = ForkServer(SharedSlots.create(1, 9999))
pid, channel = server.fork()
channel.send_bytes(json.dumps(LOCAL.to_json()).encode())
channel.recv_bytes()
channel.send_bytes({json.dumps({"slot": 0, "start": 0, "decode": stuck.to_json()}).encode()!r})
print(pid, *children(os.getpid()), flush=True)
{end}
"""
    result = run_watched([sys.executable, "-c", script])
    assert not result.stderr
    assert all(gone(int(pid)) for pid in result.stdout.split())


def test_decoding_processes_start_without_torch_and_share_most_of_their_memory(server):
    (pid, channel), (_, other) = server.fork(), server.fork()
    greeted(channel)
    greeted(other)
    rollup = dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    assert int(rollup["Private_Dirty:"]) < 16 << 10
    assert int(rollup["Anonymous:"]) > 40 << 10
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch_cpu" in maps
    assert "libtorch_python" not in maps
