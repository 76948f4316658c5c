"""Shards that webdataset writes are read, and shards that `data pack` writes are read by webdataset."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.support import media
from tests.support.loading import STAGE, only_lane
from tests.support.packing import pack
from tests.support.shards import video
from univitar_ds.cli.main import main
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data.loader import eval_packs
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.tools.verify import verify

CLASSES = ("cat", "dog", "bird")
IMAGES, VIDEOS = 12, 4


class Opened:
    """An object whose pickle creates the file `trace` when it is loaded."""

    def __init__(self, trace: str) -> None:
        self._trace = trace

    def __reduce__(self):
        return os.mkdir, (self._trace,)


def others(trace: str) -> dict:
    """A member of each kind that webdataset writes and this package does not read. Half of them run code when
    loaded."""
    hostile = pickle.dumps(Opened(trace))
    objects = io.BytesIO()
    np.save(objects, np.array([Opened(trace)], object), allow_pickle=True)
    return {
        "pyd": hostile,
        "pickle": hostile,
        "pkl": hostile,
        "pth": hostile,
        "npy": objects.getvalue(),
        "npz": {"a": np.arange(3)},
        "msgpack": b"\x81\xa1a\x01",
        "cbor": b"\xa1aa\x01",
        "ten": [np.arange(3)],
        "seg.npy": np.zeros((2, 2), np.uint8),
    }


def image_of(index: int) -> Image.Image:
    return media.noise(60 + index, 80, index)


def written_by_webdataset(folder, trace: str) -> None:
    """Images with a .txt and a .cls, then with a .json, and videos with a .json; in shards of five."""
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=5, verbose=0) as writer:
        for index in range(IMAGES):
            text = {"txt": f"image {index}", "cls": index % 3}
            if index % 2:
                text = {"json": {"caption": f"image {index}", "label": CLASSES[index % 3]}}
            form = "png" if index % 4 else "jpg"
            writer.write({"__key__": f"{index:04d}", form: image_of(index), **text, **others(trace)})
        for index in range(VIDEOS):
            fields = {"caption": f"video {index}", "label": CLASSES[index % 3]}
            writer.write({"__key__": f"v{index:04d}", "mp4": video(48, 64, seed=index), "json": fields, "pyd": b"x"})


@pytest.fixture
def foreign(tmp_path):
    """(source of shards that webdataset has written, the folder that one of their members would create)."""
    written_by_webdataset(tmp_path / "shards", str(tmp_path / "opened"))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return SourceConfig(path=str(tmp_path / "shards"), class_names=str(tmp_path / "classes.txt")), tmp_path / "opened"


def wanted(kind: str, count: int) -> dict:
    return {f"{kind} {index}": CLASSES[index % 3] for index in range(count)}


@pytest.mark.parametrize(("modality", "count"), [("image", IMAGES), ("video", VIDEOS)])
def test_an_evaluation_reads_what_webdataset_wrote(foreign, modality, count):
    source, opened = foreign
    assert len(find_shards([source])) == 4
    packs = eval_packs(
        [source],
        modality=modality,
        resolution=STAGE.resolution(modality),
        video_frames=4,
        token_budget=300,
        tokenizer=None,
        context_length=8,
        data=DataConfig(sources=[source], workers=0),
    )
    found = {}
    for one in packs:
        assert not one.bad
        found |= dict(zip(one.captions, one.labels, strict=True))
    assert found == wanted(modality, count)
    assert not opened.exists()


@pytest.mark.parametrize(("modality", "count"), [("image", IMAGES), ("video", VIDEOS)])
def test_training_reads_what_webdataset_wrote(foreign, modality, count):
    source, opened = foreign
    found = {}
    with only_lane(DataConfig(sources=[source], workers=1), STAGE, modality) as loader:
        for (one,) in loader:
            assert not one.bad
            found |= dict(zip(one.captions, one.labels, strict=True))
            if len(found) == count:
                break
    assert found == wanted(modality, count)
    assert not opened.exists()


def test_members_that_are_not_read_are_counted_and_never_loaded(foreign, tmp_path, capsys):
    source, opened = foreign
    found = verify([source], progress=False)
    assert found["sound"]
    names = [f".{name}" for name in others("")]
    assert found["unread"] == {name: IMAGES + (VIDEOS if name == ".pyd" else 0) for name in sorted(names)}
    assert sum(shard["unread"][".pyd"] for shard in found["shards"]) == IMAGES + VIDEOS
    report = tmp_path / "report.json"
    assert main(["data", "verify", source.path, "--no-decode", "--workers", "1", "--report", str(report)]) == 0
    assert "members that are not read: 16 .pyd, 12 .cbor, 12 .msgpack, 12 .npy" in capsys.readouterr().out
    assert json.loads(report.read_text())["unread"] == found["unread"]
    assert not opened.exists()
    pickle.loads(others(str(opened))["pyd"])
    assert opened.is_dir(), "a loaded member leaves no trace, so the test could not fail"


@pytest.fixture
def packed(tmp_path):
    """(folder of media, packed folder): images in several formats, and videos."""
    files = {f"{i}.png": media.encoded(image_of(i), "PNG") for i in range(6)}
    files |= {f"{i} photo ü.jpg": media.encoded(image_of(i)) for i in range(6, 12)}
    files |= {f"{i}.mp4": video(48, 64, seed=i) for i in range(3)}
    rows = [{"file": name, "captions": [f"a {name}", "b"], "label": CLASSES[i % 3]} for i, name in enumerate(files)]
    folder = media.write_folder(tmp_path / "folder", files, rows)
    pack(folder, tmp_path / "packed", shard_mb=0.05)
    return folder, tmp_path / "packed"


def test_webdataset_reads_what_is_packed_here(packed):
    folder, out = packed
    rows = {row["file"]: row for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())}
    shards = sorted(map(str, out.glob("*.tar")))
    assert len(shards) == 3
    read = set()
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pil"):
        fields = sample["json"]
        row = rows[fields["file"]]
        assert (fields["captions"], fields["label"]) == (row["captions"], row["label"])
        extension = row["file"].rpartition(".")[2]
        if extension == "mp4":
            assert sample["mp4"] == (folder / row["file"]).read_bytes()
        else:
            with Image.open(folder / row["file"]) as image:
                assert np.array_equal(np.asarray(sample[extension]), np.asarray(image.convert("RGB")))
        read.add(row["file"])
    assert read == set(rows)


def test_the_bytes_of_shards_depend_on_no_user_time_or_folder(packed):
    """So that folders that an earlier version has packed do not change."""
    for path in packed[1].glob("*.tar"):
        again = io.BytesIO()
        with tarfile.open(path) as tar, tarfile.open(fileobj=again, mode="w|", format=tarfile.USTAR_FORMAT) as truth:
            for member in tar:
                plain = tarfile.TarInfo(member.name)
                plain.size = member.size
                truth.addfile(plain, tar.extractfile(member))
        assert path.read_bytes() == again.getvalue()
