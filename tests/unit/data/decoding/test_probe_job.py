"""Sizes read from headers in a separate process, which a header may crash."""

import json

import pytest

from tests.support import media
from tests.support.decoding import KillingServer
from univitar_ds.data.decoding.probe_job import ProbeItem, ProbeJob
from univitar_ds.data.decoding.supervisor import RestartBudget, WorkerSupervisor
from univitar_ds.data.media.prober import MediaAddress, probe_each
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.errors import DataError, SampleError

MAX_PX = 10**6


@pytest.fixture
def items(tmp_path):
    """An image, a video, other bytes, an empty file and a rotated image, one after another in a file."""
    turned = media.encoded(media.noise(40, 60), exif=media.exif(6))
    contents = {
        "png": media.encoded(media.noise(50, 70), "PNG"),
        "mp4": media.video(media.moving_frames(5)),
        "jpg": b"not an image",
        "webp": b"",
        "jpeg": turned,
    }
    path = tmp_path / "shard"
    path.write_bytes(b"".join(contents.values()))
    found, start = [], 0
    for extension, content in contents.items():
        found.append(ProbeItem(str(path), start, len(content), extension))
        start += len(content)
    return found


def comparable(found):
    return [(one.kind, str(one)) if isinstance(one, SampleError) else one for one in found]


def test_a_process_returns_the_same_sizes_as_probe_each(slots, server, items):
    supervisor = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(0))
    here = probe_each([MediaAddress(LocalStorage(), *item) for item in items])
    assert [type(one).__name__ for one in here] == ["MediaSize", "MediaSize", "SampleError", "SampleError", "MediaSize"]
    assert (here[4].height, here[4].width) == (60, 40)
    assert here[1].duration_s > 0
    assert comparable(supervisor.probe(0, ProbeJob(items, MAX_PX))) == comparable(here)
    assert slots.done.tolist() == [len(items), 0]


def test_a_file_that_ends_its_process_is_a_bad_sample_and_the_others_have_sizes(slots, server, items):
    deadly = KillingServer(
        server, lambda message: list(items[1]) in json.loads(message).get("probe", {}).get("items", [])
    )
    supervisor = WorkerSupervisor(0, deadly, slots, LOCAL, RestartBudget(4))
    found = supervisor.probe(0, ProbeJob(items, MAX_PX))
    here = probe_each([MediaAddress(LocalStorage(), *item) for item in items])
    assert (found[1].kind, "SIGKILL" in str(found[1])) == ("crash", True)
    assert comparable(found[:1] + found[2:]) == comparable(here[:1] + here[2:])


def test_a_missing_shard_is_a_data_error_and_not_a_bad_sample(slots, server, items):
    supervisor = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(0))
    gone = items[0]._replace(path=items[0].path + "x")
    with pytest.raises(DataError, match="cannot be read"):
        supervisor.probe(0, ProbeJob([gone], MAX_PX))


def test_a_job_survives_json(items):
    job = ProbeJob(items, MAX_PX)
    assert ProbeJob.from_json(json.loads(json.dumps(job.to_json()))) == job
