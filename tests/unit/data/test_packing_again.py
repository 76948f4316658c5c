"""Packing a folder again gives the same bytes: after changes, damage and kills, and with several processes."""

import json
import textwrap

import pytest

from tests.support import media
from tests.support.packing import contents, numbers_folder, pack, run_script, samples_of, spoil
from univitar_ds.data.writing import writer
from univitar_ds.data.writing.examine import MediaInfo
from univitar_ds.data.writing.writer import read_manifest
from univitar_ds.errors import DataError


@pytest.fixture
def folder(tmp_path):
    return numbers_folder(tmp_path)


def test_packing_again_opens_no_media_and_writes_no_shard(folder, tmp_path):
    first = pack(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    spoil(folder)
    assert pack(folder, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before


def test_a_change_in_the_folder_rewrites_only_the_affected_shards(folder, tmp_path):
    out = tmp_path / "out"
    pack(folder, out)
    (folder / "images/7.jpg").write_bytes(media.encoded(media.noise(99, 99)))
    rows = (folder / "metadata.jsonl").read_text().replace("image 8", "another caption")
    (folder / "metadata.jsonl").write_text(rows)
    test_shard = (out / "test-image-000000.tar").stat().st_mtime_ns
    again = pack(folder, out)
    fresh = pack(folder, tmp_path / "fresh")
    assert again == fresh
    assert contents(out) == contents(tmp_path / "fresh")
    assert (out / "test-image-000000.tar").stat().st_mtime_ns == test_shard
    assert json.loads(samples_of(out, again)["images/8.jpg"]["json"])["captions"] == ["another caption"]


def test_old_shards_are_removed_if_the_shard_size_changes(folder, tmp_path):
    pack(folder, tmp_path / "out", shard_mb=0.005)
    pack(folder, tmp_path / "out")
    pack(folder, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_folder_packed_by_an_earlier_version_is_packed_again(folder, tmp_path):
    """The results of its examination have no duration, and its shards other members."""
    out = tmp_path / "out"
    pack(folder, out)
    whole = contents(out)
    lines = [json.loads(line) for line in (out / ".pack.jsonl").read_text().splitlines()]
    for line in lines:
        line[1].get("finding", {}).pop("duration_s", None) if isinstance(line, list) else line.update(version=1)
    (out / ".pack.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "manifest.json").unlink()  # as if it had been interrupted
    (out / "train-image-000000.tar").write_bytes(b"members of another layout")
    pack(folder, out)
    assert contents(out) == whole


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_or_missing_shard_is_written_again(folder, tmp_path, damage):
    pack(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    shard = tmp_path / "out/train-image-000000.tar"
    if damage is None:
        shard.unlink()
    else:
        shard.write_bytes(damage or before[shard.name][:-1] + b"x")
    pack(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_file_that_changes_between_examination_and_writing_is_an_error(folder, tmp_path, monkeypatch):
    truth = writer.examine_all

    def then_changed(jobs, workers):
        yield from truth(jobs, workers)
        (folder / "images/3.jpg").write_bytes(b"something else")

    monkeypatch.setattr(writer, "examine_all", then_changed)
    with pytest.raises(DataError, match=r"images/3\.jpg changed while it was being packed"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


KILLED = """
import os, signal, sys
from univitar_ds.data.writing import destination, progress_log, writer

def dying(call, left):
    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted

folder, out, *points = sys.argv[1:]
for point in points:
    child = os.fork()
    if child == 0:
        left = [int(point)]
        progress_log.ProgressLog._add = dying(progress_log.ProgressLog._add, left)
        writer._add = dying(writer._add, left)
        destination.replace_bytes = dying(destination.replace_bytes, left)
        writer.pack_folder(folder, out, writer.PackOptions(shard_mb=0.02, workers=1, progress=False))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"packing had ended before point {point}"
    assert not os.path.exists(os.path.join(out, "manifest.json"))
"""


@pytest.mark.slow
def test_packing_gives_the_same_bytes_after_a_kill_at_any_point(folder, tmp_path):
    expected = pack(folder, tmp_path / "whole", shard_mb=0.02)
    assert len(expected["shards"]) > 3
    out = tmp_path / "out"
    # Counted from each restart: examined files, written members, finished shards; the last one is the manifest.
    run_script("-c", KILLED, str(folder), str(out), "0", "10", "40", "15", "30", "31", "17", "0", "0")
    with (out / ".pack.jsonl").open("a") as progress_log:
        progress_log.write('["file images/0.jpg", {"stam')  # a line that was being written
    (out / ".train-image-000009.tar.partial").write_bytes(b"half a shard")
    assert pack(folder, out, shard_mb=0.02) == expected
    assert contents(out) == contents(tmp_path / "whole")


CRASHING = """
import os, sys, time
from multiprocessing import get_context
import numpy as np
from univitar_ds.data.decoding import children
from univitar_ds.data.writing import examine, writer

truth = examine.decode_image

def fragile(data, **limits):
    if data.endswith(b"poison"):
        os.abort()
    if data.endswith(b"greed"):
        np.ones(2 << 30, np.uint8)
    if data.endswith(b"sloth"):
        time.sleep(600)
    return truth(data, **limits)

examine.decode_image = fragile
children.context = lambda preload: get_context("fork")  # so that the workers have the fragile decoder too
examine._SILENCE_S = 5.0
writer._FILES_PER_WORKER = 4
writer.pack_folder(sys.argv[1], sys.argv[2], writer.PackOptions(workers=int(sys.argv[3]), progress=False))
"""


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_image_that_kills_its_decoder_or_makes_it_hang_or_take_all_memory_is_left_out(folder, tmp_path, workers):
    crashed = "corrupt: the decoding process crashed on this file"
    ends = {4: ("poison", crashed), 5: ("poison", crashed), 7: ("greed", "too_large: "), 9: ("sloth", "timeout: ")}
    for number, (end, _) in ends.items():
        with (folder / f"images/{number}.jpg").open("ab") as image:
            image.write(end.encode())
    run_script("-c", CRASHING, str(folder), str(tmp_path / "out"), str(workers))
    manifest = read_manifest(tmp_path / "out")
    reasons = {skipped["file"]: skipped["reason"] for skipped in manifest["skipped"]}
    assert list(reasons) == [f"images/{number}.jpg" for number in ends]
    for number, (_, expected) in ends.items():
        assert reasons[f"images/{number}.jpg"].startswith(expected)
    assert sum(shard["samples"] for shard in manifest["shards"]) == 30


def test_several_workers_write_the_same_shards_as_one(folder, tmp_path):
    script = tmp_path / "packing.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from univitar_ds.data.writing import writer
            writer._FILES_PER_WORKER = 4
            if __name__ == "__main__":
                writer.pack_folder(sys.argv[1], sys.argv[2], writer.PackOptions(workers=2))
            """
        )
    )
    run_script(str(script), str(folder), str(tmp_path / "two"))
    pack(folder, tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_file_whose_processes_were_killed_is_examined_again_by_the_next_packing(tmp_path, monkeypatch):
    folder = numbers_folder(tmp_path)
    expected = pack(folder, tmp_path / "whole")
    examine_all = writer.examine_all

    def killed_at_the_third(jobs, workers):
        for index, info in examine_all(jobs, workers):
            yield index, MediaInfo("corrupt: killed", repeatable=False) if index == 2 else info

    with monkeypatch.context() as patched:
        patched.setattr(writer, "examine_all", killed_at_the_third)
        first = pack(folder, tmp_path / "out")
    assert [one["reason"] for one in first["skipped"]] == ["corrupt: killed"]
    again = pack(folder, tmp_path / "out")
    assert again["skipped"] == []
    assert [shard["sha256"] for shard in again["shards"]] == [shard["sha256"] for shard in expected["shards"]]
