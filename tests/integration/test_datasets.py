"""Data sets in common formats: packed, and as sources of a run."""

import json
import os
import sys

import pytest

from tests.support import datasets
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from tests.support.runs import small_config
from univitar_ds.cli.main import main
from univitar_ds.config.load import dump_config, load_config
from univitar_ds.data.tools.verify import verify

FORMS = {
    "webdataset": datasets.webdataset,
    "img2dataset": lambda folder: datasets.img2dataset(folder, tars=True),
    "img2dataset-files": lambda folder: datasets.img2dataset(folder, tars=False),
    "classes": datasets.class_folders,
    "imagefolder": datasets.imagefolder,
    "csv": lambda folder: datasets.table(folder, "csv"),
    "tsv": lambda folder: datasets.table(folder, "tsv"),
    "jsonl": lambda folder: datasets.table(folder, "jsonl"),
    "json": lambda folder: datasets.table(folder, "json"),
    "parquet": lambda folder: datasets.table(folder, "parquet"),
    "coco": datasets.coco,
    "folder": datasets.labelled,
}
AS_THEY_ARE = ("webdataset", "img2dataset")


def trained(tmp_path, sources):
    """Trains a run of a few steps on these sources. Returns its configuration."""
    listed = [
        {"path": path, "name": name, "split": "val" if "coco" in name else "train", "templates": ["a {}"]}
        for name, path in sources.items()
    ]
    sizes = {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}
    stage = {"name": "all", "samples": 240, "image": sizes, "token_budget": 96, "lr": 1e-3}
    stage["weights"] = dict.fromkeys(sources, 1.0)
    data = {"sources": listed, "lanes": 2, "workers": 0, "pool_samples": 8, "log_samples": True}
    run_file = tmp_path / "run.yaml"
    dump_config(small_config(tmp_path, tmp_path / "runs", data=data, stages=[stage]), run_file)
    command = [sys.executable, "-m", "univitar_ds", "train", "--config", str(run_file), "--nproc", "1"]
    run_watched(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"})
    return load_config(tmp_path / "runs/small/config.yaml")


def keys_by_source(tmp_path, config) -> dict[str, set[str]]:
    """The keys of the samples that a run has trained on, by source."""
    names = [source.label for source in config.data.sources]
    found: dict[str, set[str]] = {name: set() for name in names}
    for path in (tmp_path / "runs/small").glob("samples-rank*.jsonl"):
        for line in path.read_text().splitlines():
            for key in json.loads(line)["keys"]:
                found[names[int(key.partition(":")[0])]].add(key)
    return found


@pytest.mark.slow
def test_a_run_trains_on_each_format_packed_and_unpacked(tmp_path):
    sources = {name: str(make(tmp_path / "sources" / name)) for name, make in FORMS.items()}
    packed = {f"packed {name}": str(tmp_path / "packed" / name) for name in FORMS}
    for name, source in sources.items():
        assert main(["data", "pack", source, packed[f"packed {name}"], "--workers", "1"]) == 0
    config = trained(tmp_path, sources | packed)
    read = keys_by_source(tmp_path, config)
    assert read.keys() == sources.keys() | packed.keys()
    assert all(read.values())
    there = {source.label for source in config.data.sources if source.path == (sources | packed)[source.label]}
    assert there == {*AS_THEY_ARE, *packed}
    report = verify(config.data.sources, workers=1)
    assert report["sound"], report
