"""`data probe` reports how a run would read a file."""

import os

import pytest

from tests.support.loading import only_lane
from tests.support.shards import image, video, write_tar
from univitar_ds.config.data import DataConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.tools import media_report
from univitar_ds.data.tools.media_report import report

STAGE = StageConfig(
    name="s",
    samples=10,
    lr=1e-3,
    image={"min_tokens": 4, "max_tokens": 40, "divisor_px": 14},
    video={"min_tokens": 4, "max_tokens": 60, "divisor_px": 14},
    video_frames=4,
    token_budget=120,
)


def settings(**fields):
    return DataConfig(**{"sources": [{"path": "nowhere"}], **fields})


@pytest.fixture
def files(tmp_path):
    contents = {
        "first.jpg": b"no image",
        "wide.jpg": image(60, 120),
        "small.png": image(42, 42, form="PNG"),
        "named.png": image(42, 42),
        "cut.jpg": image(60, 120)[:-100],
        "clip.mp4": video(64, 48, frames=9),
        "clip.jpg": video(64, 48),
        "empty.jpg": b"",
        "text.txt": b"words",
        "plain": image(60, 120),
        "a." + "x" * 200: image(60, 120),
        "noise.mp4": bytes(range(256)) * 9,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in contents]


def test_every_file_is_reported_in_order_with_its_size_or_its_error(files, tmp_path):
    rows = list(report([*files, tmp_path / "gone.jpg", tmp_path], settings(), STAGE))
    assert [row.file for row in rows] == [str(path) for path in [*files, tmp_path / "gone.jpg", tmp_path]]
    found = {os.path.basename(row.file): row for row in rows}
    good = [name for name, row in found.items() if row.ok]
    assert good == ["wide.jpg", "small.png", "named.png", "clip.mp4"]
    assert [(found[n].kind, found[n].width, found[n].height, found[n].frames) for n in good] == [
        ("image", 120, 60, 1),
        ("image", 42, 42, 1),
        ("image", 42, 42, 1),
        ("video", 48, 64, 9),
    ]
    assert found["small.png"].grid == (1, 3, 3)
    assert found["small.png"].tokens == 9
    assert found["clip.mp4"].grid[0] == 2, "4 frames, 2 per token"
    assert found["clip.mp4"].tokens <= 60
    assert {name: row.error for name, row in found.items() if not row.ok} == {
        "first.jpg": "unreadable",
        "cut.jpg": "corrupt",
        "clip.jpg": "wrong_kind",
        "empty.jpg": "unreadable",
        "text.txt": "no_media",
        "plain": "no_media",
        "a." + "x" * 200: "no_media",
        "noise.mp4": "unreadable",
        "gone.jpg": "unreadable",
        tmp_path.name: "unreadable",
    }
    assert found["cut.jpg"].kind == "image", "its header can be read"
    assert all((row.message is None) == row.ok == (row.error is None) for row in rows)


def test_a_downscaled_item_is_reported_as_such(tmp_path):
    (tmp_path / "large.jpg").write_bytes(image(300, 500))
    (tmp_path / "small.jpg").write_bytes(image(42, 42))
    rows = list(report([tmp_path / "large.jpg", tmp_path / "small.jpg"], settings(), STAGE))
    assert [row.downscaled for row in rows] == [True, False]
    assert rows[0].tokens <= 40
    assert "made smaller" in rows[0].sentence()
    assert "made smaller" not in rows[1].sentence()


@pytest.mark.parametrize(
    ("limit", "name", "content"),
    [
        ({"max_image_px": 1000}, "a.jpg", image(60, 120)),
        ({"max_video_s": 0.5}, "a.mp4", video(64, 48, frames=8)),
        ({"max_sample_mb": 1}, "a.jpg", b"\xff" * (1 << 20) + b"\xff"),
    ],
)
def test_the_limits_of_the_run_apply(tmp_path, limit, name, content):
    (tmp_path / name).write_bytes(content)
    (row,) = report([tmp_path / name], settings(**limit), STAGE)
    assert row.error == "too_large"
    assert next(iter(limit)) in row.message


def test_the_grid_is_the_same_as_in_a_pack_of_a_run(files, tmp_path):
    rows = [row for row in report(files[1:4], settings(), STAGE) if row.ok]
    samples = [(path.stem, {path.suffix[1:]: path.read_bytes(), "txt": b"t"}) for path in files[1:4]]
    shard = write_tar(tmp_path / "shards" / "a.tar", samples)
    data = settings(sources=[{"path": str(shard)}], lanes=1, workers=0)
    with only_lane(data, STAGE, "image") as loader:
        (pack,) = next(loader)
    packed = {key.rpartition("/")[2]: tuple(grid) for key, grid in zip(pack.keys, pack.grid_thw.tolist(), strict=True)}
    assert packed == {os.path.basename(row.file).partition(".")[0]: row.grid for row in rows}


def test_a_file_above_the_sample_size_limit_is_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as stream:
        stream.truncate(1 << 31)
    (row,) = report([tmp_path / "a.jpg"], settings(max_sample_mb=1), STAGE)
    assert row.message == "the file has 2147483648 bytes, above data.max_sample_mb = 1 (MiB)"


def test_pipes_and_devices_are_left_out_without_being_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    rows = list(report([tmp_path / "a.jpg", tmp_path / "b.jpg"], settings(), STAGE))
    assert {(row.error, row.message) for row in rows} == {
        ("unreadable", "the file cannot be read: is not a regular file")
    }


def test_no_file_is_copied(files, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for row in report(files, settings(), STAGE):
        if row.ok:
            assert [path for path in scratch.rglob("*") if path.is_file()] == []


def test_the_report_of_no_files_is_empty():
    assert list(report([], settings(), STAGE)) == []


def test_a_file_that_is_truncated_after_its_header_was_read_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(image(60, 120))
    read = media_report.read_samples

    def read_and_truncate(*args):
        found = read(*args)
        path.write_bytes(b"")
        return found

    monkeypatch.setattr(media_report, "read_samples", read_and_truncate)
    (row,) = report([path], settings(), STAGE)
    assert (row.ok, row.error, row.width) == (False, "unreadable", 120)


def test_headers_are_read_in_another_process(files, monkeypatch):
    """A hostile header could exhaust the memory of this process or crash it."""
    monkeypatch.setattr("univitar_ds.data.media.probe.probe", None)
    assert [row.ok for row in report(files[1:3], settings(), STAGE)] == [True, True]
