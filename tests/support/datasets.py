"""Small data sets in common formats, each with three images or videos."""

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.support import media


def image(index: int = 0) -> bytes:
    return media.encoded(media.noise(40 + index, 60, index))


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet as files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def embedded(path: Path, rows: list[dict], names: list[str] | None = None, rows_per_group: int = 2) -> Path:
    """A Parquet table as `datasets` writes it: the bytes of images, and labels that are numbers of `names`."""
    import pyarrow
    from pyarrow import parquet as files

    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [("image", image_type), ("label", pyarrow.int64()), ("caption", pyarrow.string())]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(fields, metadata=about if names else None))
    files.write_table(table, path, row_group_size=rows_per_group)
    return path


def parquet_parts(folder: Path) -> Path:
    """A data set in three Parquet tables with two splits, as on the hub."""
    rows = [{"image": {"bytes": image(index), "path": f"{index}.jpg"}, "label": index % 2} for index in range(3)]
    names = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    for name, row in zip(names, rows, strict=True):
        embedded(folder / "data" / f"{name}.parquet", [row], ["cat", "dog"])
    return write(folder, {"README.md": "a data set"})


def images(count: int = 3, folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{index}.jpg": image(index) for index in range(count)}


def webdataset(folder: Path) -> Path:
    for shard, indices in enumerate(((0, 1), (2,))):
        members = [
            (f"s{index}.{extension}", content)
            for index in indices
            for extension, content in (("jpg", image(index)), ("txt", f"caption {index}"), ("cls", str(index)))
        ]
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def img2dataset(folder: Path, *, tars: bool) -> Path:
    samples = [
        (f"{index:09d}.{extension}", content)
        for index in range(3)
        for extension, content in (
            ("jpg", image(index)),
            ("json", json.dumps({"caption": f"caption {index}", "url": "http://x/y.jpg", "status": "success"})),
            ("txt", f"caption {index}"),
        )
    ]
    write(folder, {"00000_stats.json": "{}", "00000.parquet": b"PAR1"})
    if tars:
        write_tar(folder / "00000.tar", samples)
        return folder
    return write(folder, {f"00000/{name}": content for name, content in samples})


def class_folders(folder: Path) -> Path:
    files = {"train/cat/0.jpg": image(0), "train/dog/1.jpg": image(1), "val/cat/2.jpg": image(2)}
    return write(folder, files)


def class_videos(folder: Path) -> Path:
    names = ("run/0.mp4", "run/1.mp4", "jump/2.mp4")
    return write(folder, {name: media.video(media.grey_frames(4 + place)) for place, name in enumerate(names)})


def imagefolder(folder: Path) -> Path:
    files = images(2, "train/") | {"test/2.jpg": image(2)}
    rows = [{"file_name": f"{index}.jpg", "text": f"caption {index}"} for index in range(3)]
    text = "file_name,text\n" + "".join(f"{row['file_name']},{row['text']}\n" for row in rows[:2])
    return write(folder, {**files, "train/metadata.csv": text, "test/metadata.jsonl": lines(rows[2])})


def table(folder: Path, form: str) -> Path:
    """A table of 0.jpg and 1.jpg with captions and 2.mp4 with a label."""
    write(folder, images(2, "media/") | {"media/2.mp4": media.video(media.grey_frames(5))})
    path = folder / f"table.{form}"
    rows = [{"image": f"media/{index}.jpg", "caption": f"caption {index}", "label": None} for index in range(2)]
    rows.append({"image": "media/2.mp4", "caption": None, "label": "run"})
    if form == "parquet":
        return parquet(path, rows)
    if form == "jsonl":
        path.write_text(lines(*rows))
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def coco(folder: Path) -> Path:
    document = {
        "info": {},
        "images": [{"id": 10 + index, "file_name": f"{index}.jpg"} for index in range(3)],
        "annotations": [{"id": n, "image_id": 10 + n % 3, "caption": f"caption {n}"} for n in range(6)],
    }
    write(folder, images(3, "val2017/") | {"annotations/captions_val2017.json": json.dumps(document)})
    return folder / "annotations/captions_val2017.json"


def labelled(folder: Path) -> Path:
    """A folder with a metadata.jsonl of the format `folder`, whose rows have only a label."""
    rows = [{"file": f"{index}.jpg", "label": f"class {index}"} for index in range(3)]
    return write(folder, {**images(), "metadata.jsonl": lines(*rows)})
