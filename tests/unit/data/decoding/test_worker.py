"""Real decoding processes: they start, end, can be killed, and do not outlive the trainer."""

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
from tests.support.decoding import KillingServer, decoders, gone, servers
from tests.support.progress import WHOLE_S, run_watched
from univitar_ds.data.decoding import forkserver
from univitar_ds.data.decoding.decode_job import DecodeItem, DecodeJob
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.supervisor import RestartBudget, WorkerSupervisor
from univitar_ds.data.media.frame_sampling import UNIFORM
from univitar_ds.data.media.resize import fit_image
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.storage.base import LOCAL

GRID = (1, 2, 3)


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(media.encoded(media.noise(50, 70), "PNG"))
    return DecodeJob("image", UNIFORM, DecodeLimits(10**6, 30.0, 60.0), [
        DecodeItem(str(path), 0, path.stat().st_size, GRID, 1)
    ])  # fmt: skip


@pytest.fixture
def stuck(job, tmp_path):
    """A job that never ends: opening a pipe waits for a writer, and handled signals do not interrupt it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return DecodeJob("image", UNIFORM, job.limits, [DecodeItem(str(path), 0, 9, GRID, 1)])


def drawn(slots):
    return slots.view(1).reshape(3, 28, 42, 3)


def greeted(channel):
    channel.send_bytes(json.dumps(LOCAL.to_json()).encode())
    assert channel.recv_bytes() == b"ready"


def test_a_supervisor_decodes_into_its_slot_also_after_its_process_was_killed(server, slots, job):
    supervisor = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(1))
    expected = fit_image(np.asarray(media.noise(50, 70)), GRID)
    assert supervisor.decode_pack(1, job) == []
    assert (drawn(slots)[0] == expected).all()
    slots.view(1)[:] = 0
    os.kill(*decoders(), signal.SIGKILL)
    assert supervisor.decode_pack(1, job) == []
    assert (drawn(slots)[0] == expected).all()
    assert not drawn(slots)[1:].any()
    assert slots.done.tolist() == [0, 2]
    assert not slots.view(0).any()


def test_items_decoded_one_by_one_have_the_same_offsets_as_in_a_whole_pack(server, slots, job, caplog):
    good = job.items[0]
    items = [good, good._replace(length=20), good._replace(grid=(1, 1, 1)), good]
    whole = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(0)).decode_pack(0, replace(job, items=items))
    deaths = iter([True, True])
    dying = KillingServer(server, lambda message: b'"decode"' in message and next(deaths, False))
    after_crashes = WorkerSupervisor(1, dying, slots, LOCAL, RestartBudget(2))
    alone = after_crashes.decode_pack(1, replace(job, items=items))
    assert "one by one" in caplog.text
    assert [(index, kind) for index, kind, _ in whole] == [(1, "unreadable")]
    assert alone == whole
    assert (slots.view(0) == slots.view(1)).all()
    used = 2 * 28 * 42 * 3 + 588
    assert slots.view(0)[used - 100 : used].any()
    assert not slots.view(0)[used:].any()


def mapped(pid):
    return Path(f"/proc/{pid}/maps").read_text()


def private_mb(pid):
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private")) / 1024


def test_a_process_for_images_does_not_preload_the_video_library_but_can_decode_a_video(slots, job, tmp_path):
    server = ForkServer(slots, ["image"])
    supervisor = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(0))
    try:
        assert supervisor.decode_pack(0, job) == []
        (pid,) = decoders()
        assert "simplejpeg" in mapped(pid)
        assert "libavcodec" not in mapped(pid)
        video = tmp_path / "clip"
        video.write_bytes(media.video(media.moving_frames(3)))
        item = DecodeItem(str(video), 0, video.stat().st_size, GRID, 2)
        assert supervisor.decode_pack(1, replace(job, modality="video", items=[item])) == []
        assert drawn(slots)[:2].any()
    finally:
        server.close()


@pytest.mark.parametrize(("needs", "found"), [(["image"], False), (["image", "s3"], True)])
def test_the_s3_storage_is_preloaded_only_for_shards_on_s3(monkeypatch, capfd, slots, needs, found):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    server = ForkServer(slots, needs)
    try:
        server.fork()
        imported = capfd.readouterr().err
        assert "univitar_ds.data.media.jpeg_header\n" in imported
        assert ("univitar_ds.data.storage.s3_client\n" in imported) == found
        assert "boto" not in imported  # a decoder makes requests only for shards without a local copy
    finally:
        server.close()


def test_the_video_library_is_loaded_before_forking(server, slots, job):
    pid, channel = server.fork()
    greeted(channel)
    assert "libavcodec" in mapped(pid)
    channel.close()


def test_the_memory_of_large_images_is_returned_to_the_system(server, slots, job, tmp_path):
    supervisor = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(0))
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
    ):  # up to 18 MiB decoded, of which glibc keeps 13 MiB by default
        path = tmp_path / f"{side}.png"
        path.write_bytes(media.encoded(Image.new("RGB", (side, side)), "PNG"))
        items.append(DecodeItem(str(path), 0, path.stat().st_size, GRID, 1))
    limits = replace(job.limits, max_image_px=10**7)
    for item in items:
        assert supervisor.decode_pack(0, replace(job, limits=limits, items=[item])) == []
    assert (left := private_mb(pid) - before) < 8, left


def test_the_memory_of_a_decoding_process_is_limited(server, slots, job):
    supervisor = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(0))
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


def test_processes_end_with_a_killed_server_and_the_next_call_starts_another(server, slots, job, stuck):
    supervisor = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(1))
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


def test_close_ends_a_process_in_the_middle_of_its_job_and_may_be_repeated(started, server, stuck, monkeypatch):
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
def test_a_process_in_the_middle_of_its_job_does_not_outlive_the_trainer(stuck, end):
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
