"""Surveys and sources for the tests of drafted run files."""

import json
from pathlib import Path

import yaml

from tests.support import media
from tests.support.datasets import write, write_tar
from univitar_ds.config.load import check_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.shards.captions import Texts
from univitar_ds.data.tools.survey import Survey
from univitar_ds.drafting.machine import Machine

CPU = Machine(cores=2, memory=16e9)
NODE = Machine(cores=64, memory=512e9, gpus=8, gpu_memory=80e9)
COLOURS = ("red", "green", "blue")


def image(index: int) -> bytes:
    return media.encoded(media.noise(56, 84 + 14 * (index % 3), index))


def classes(folder: Path, count: int = 24) -> Path:
    """Class folders with a split `val`."""
    return write(
        folder, {f"{'val' if i % 4 == 0 else 'train'}/{COLOURS[i % 3]}/{i}.jpg": image(i) for i in range(count)}
    )


def table(folder: Path, count: int = 24) -> Path:
    rows = [f"media/{i}.jpg,a {COLOURS[i % 3]} thing {i},{'test' if i % 4 == 0 else 'train'}\n" for i in range(count)]
    write(
        folder, {f"media/{i}.jpg": image(i) for i in range(count)} | {"t.csv": "file,caption,split\n" + "".join(rows)}
    )
    return folder / "t.csv"


def coco(folder: Path, count: int = 24) -> Path:
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(count)],
        "annotations": [{"image_id": i, "caption": f"a {COLOURS[i % 3]} thing"} for i in range(count)],
    }
    write(folder, {f"val2017/{i}.jpg": image(i) for i in range(count)})
    return (
        write(folder, {"annotations/captions_val2017.json": json.dumps(document)}) / "annotations/captions_val2017.json"
    )


def tars(folder: Path, count: int = 24) -> Path:
    """Two tars with images, and a video in every third sample."""
    for shard in range(2):
        members = []
        for i in range(shard, count, 2):
            video = i % 6 < 2
            content = media.video(media.grey_frames(6)) if video else image(i)
            members += [(f"{i}.{'mp4' if video else 'jpg'}", content), (f"{i}.txt", f"a {COLOURS[i % 3]} thing")]
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def sidecars(folder: Path, count: int = 24) -> Path:
    files = {f"{i}.{end}": image(i) if end == "jpg" else f"a thing {i}" for i in range(count) for end in ("jpg", "txt")}
    return write(folder, files)


SOURCES = {"classes": classes, "table": table, "coco": coco, "tars": tars, "folder": sidecars}


def survey(images: int = 0, videos: int = 0, *, side: int = 280, label: str | None = None, **given) -> Survey:
    """A survey of a packed folder whose samples have one size, and a caption or this label."""
    sizes = [MediaSize("image", side, side, 1)] * 8 * bool(images)
    sizes += [MediaSize("video", side, side, 60, 2.0)] * 8 * bool(videos)
    texts = tuple(Texts((f"a thing {i}",) if label is None else (), label and f"{label} {i % 2}") for i in range(8))
    about = {
        "path": "data/here",
        "title": "a packed folder",
        "counts": {"train": {"image": images, "video": videos}},
        "exact": True,
        "training": "train",
        "media": tuple(sizes),
        "texts": texts,
        "packed": True,
        "labels": frozenset((one.set, one.label) for one in texts if one.label is not None),
    }
    return Survey(**{**about, **given})


def loaded(text: str) -> RunConfig:
    return check_config(yaml.safe_load(text), "test")
