"""Sizes of samples: from metadata or from headers, and what happens if metadata differs from its file."""

import json
import tarfile

import pytest
import torch

from tests.support.loading import STAGE, only_lane, same, take
from tests.support.shards import image, sidecar, video, write_demo_shards, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data.media import probe


def test_headers_of_other_shards_are_read_by_a_decoding_process_and_packs_are_the_same(tmp_path, monkeypatch):
    samples = [(f"k{n:02d}", {"jpg": image(40 + 3 * n, 60, n), "txt": b"t"}) for n in range(20)]
    samples += [(f"v{n}", {"mp4": video(48, 64, 6 + n), "txt": b"v"}) for n in range(4)]
    samples.insert(7, ("junk", {"jpg": b"no image", "txt": b"t"}))
    foreign = write_tar(tmp_path / "foreign" / "a.tar", samples).parent
    expected = take(6, foreign)
    assert sum(pack.bad.get("unreadable", 0) for step in expected for pack in step) >= 1

    def refused(data, extension):
        raise AssertionError(f"the trainer reads the header of a .{extension}")

    monkeypatch.setattr(probe, "probe", refused)
    with pytest.raises(AssertionError, match=r"the header of a \.jpg"):
        take(1, foreign)
    for ours, theirs in zip(take(6, foreign, workers=1), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert same(one, other)


def test_packs_are_the_same_whether_sizes_come_from_metadata_or_headers(tmp_path_factory, tmp_path):
    """The same shards without the metadata of `data pack`."""
    folder = write_demo_shards(tmp_path_factory.mktemp("demo"), images=60, videos=12, shards=3)
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in [name for name in members if name.endswith(".json")]:
            fields = json.loads(members[name])
            assert {"width", "height", "frames"} <= fields.keys()
            texts = json.dumps({key: fields[key] for key in ("captions", "label")})
            members[name] = texts.ljust(
                len(members[name])
            ).encode()  # random numbers depend on offsets, so keep the length
        write_tar(tmp_path / path.name, [(name, {"": content}) for name, content in members.items()])
    manifest = json.loads((folder / "manifest.json").read_text())
    for row in manifest["shards"]:
        row["bytes"] = (tmp_path / row["file"]).stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for ours, theirs in zip(take(8, tmp_path), take(8, folder), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.keys, one.captions, one.bad) == (other.keys, other.captions, other.bad)
            assert torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.grid_thw, other.grid_thw)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_its_metadata_does_not_describe_is_a_bad_sample(tmp_path, workers):
    samples = []
    for number in range(20):
        size = (80, 61, 1) if number % 4 == 0 else (80, 60, 1)
        about = json.loads(sidecar([f"caption {number}"], None, "image", size, "f.jpg"))
        own = json.dumps({**about, "set": None, "crc32": None}).encode()
        samples.append((f"k{number:02d}", {"jpg": image(80, 60, number), "json": own}))
    write_tar(tmp_path / "a.tar", samples)
    with only_lane(DataConfig(sources=[SourceConfig(path=str(tmp_path))], workers=workers), STAGE, "image") as packs:
        steps = [next(packs)[0] for _ in range(4)]
    assert sum(pack.bad.get("wrong_size", 0) for pack in steps) >= 3
    assert all(int(key[-2:]) % 4 for pack in steps for key in pack.keys)
