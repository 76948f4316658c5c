"""Makes the data and the runs of bench_recipe.py in a folder, and rows of results from them.

    WORK/scenes, WORK/scenes-shards, WORK/teacher-scenes...     data, made once
    WORK/scenes-7000/{arm}-{seed}.yaml, {arm}-{seed}.cpu        run file; CPU seconds of the training so far
    WORK/scenes-7000/runs/{arm}-{seed}                          run; of its checkpoints the last one stays

Interrupted calls continue: runs resume from their last checkpoint, and a run whose rows exist is not repeated.
"""

from __future__ import annotations

import csv
import json
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from benchmarks.recipe.arms import ARMS, DESIGN, TEACHER, TEACHER_SEED, TEACHER_TIMES, Data, run_file
from benchmarks.rows import RESULTS, add_rows, git_commit, processor
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.data.writing.writer import pack_folder
from univitar_ds.demo.synthetic import write_scenes
from univitar_ds.evaluation.run import evaluate
from univitar_ds.formats.elastic import read_state
from univitar_ds.training.checkpoint import atomic_dir
from univitar_ds.training.checkpoint.offline import open_trained

CSV = RESULTS / "bench_recipe.csv"
IMAGES, VIDEOS = 1600, 1600
POINTS = (0.5, 1.0)
"""Shares of a run's samples after which the run is evaluated."""


@dataclass(frozen=True)
class Bench:
    """What all runs of a call have in common."""

    work: Path
    data: Data
    samples: int

    @property
    def folder(self) -> Path:
        return self.work / f"{self.data.name}-{self.samples}"

    def run(self, arm: str, seed: int) -> Path:
        return self.folder / "runs" / f"{arm}-{seed}"


def scenes(work: Path, name: str = "scenes", seed: int = 0) -> Data:
    """Writes and packs scenes like those of the demo, unless they exist."""
    shards = work / f"{name}-shards"
    if not (shards / "manifest.json").is_file():
        write_scenes(work / name, images=IMAGES, videos=VIDEOS, seed=seed, progress=True)
        pack_folder(work / name, shards)
    return packed(name, shards)


def photos(work: Path, folder: Path) -> Data:
    """Packs a folder of captioned photos with splits train and test, unless it is packed. Its videos are not used."""
    name = f"photos-{folder.resolve().name}"
    shards = work / f"{name}-shards"
    if not (shards / "manifest.json").is_file():
        pack_folder(folder, shards)
    return packed(name, shards, recipe="photos", with_videos=False)


def packed(name: str, shards: Path, *, recipe: str = "demo", with_videos: bool = True) -> Data:
    """Reads the sizes of the training items from shards that `data pack` wrote.

    Raises: SystemExit if a split is missing.
    """
    sizes: dict[str, list[tuple[int, int]]] = {"image": [], "video": []}
    for path in sorted(shards.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".json") else None
                if file is not None:
                    row = json.load(file)
                    sizes[row["kind"]].append((row["height"], row["width"]))
    if not sizes["image"] or not any(shards.glob("test-image-*.tar")):
        raise SystemExit(f"{shards} has no images in its splits train and test; both are needed to train and to score")
    return Data(name, shards, tuple(sizes["image"]), tuple(sizes["video"]) if with_videos else (), recipe)


def provide_teacher(bench: Bench) -> Path:
    """Trains the teacher on other scenes and adds rows of its results. Returns the folder of its encoder."""
    data = scenes(bench.work, "teacher-scenes", TEACHER_SEED)
    config = run_file("teacher", TEACHER, data, TEACHER_TIMES * bench.samples, TEACHER_SEED)
    config["evaluation"]["sources"][0]["path"] = str(bench.data.shards)
    _train_and_score(bench, "teacher", TEACHER_SEED, config)
    return bench.run("teacher", TEACHER_SEED) / "export"


def provide_run(bench: Bench, arm: str, seed: int) -> None:
    """Trains and scores one arm with one seed, unless its rows exist."""
    if is_done(bench, arm, seed):
        return
    teacher = provide_teacher(bench) if ARMS[arm].distilled else None
    config = run_file(f"{arm}-{seed}", ARMS[arm], bench.data, bench.samples, seed, teacher)
    _train_and_score(bench, arm, seed, config)


def is_done(bench: Bench, arm: str, seed: int) -> bool:
    """Whether the results have the rows of this run, which are written together."""
    wanted = (str(DESIGN), bench.data.name, str(bench.samples), arm, str(seed))
    return any(
        (row["design"], row["data"], row["run_samples"], row["arm"], row["seed"]) == wanted for row in read_rows()
    )


def read_rows(path: Path | None = None) -> list[dict[str, str]]:
    """Returns the rows of results; [] without a file."""
    path = path or CSV
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def result_row(bench: Bench, arm: str, seed: int, progress: Mapping[str, Any], score: Mapping[str, Any]) -> dict:
    """Returns a row of the CSV. Args: progress: samples, tokens, seconds and cpu_s, None if not known."""
    cpu_s = progress["cpu_s"]
    return {
        "arm": arm,
        "seed": seed,
        "samples_seen": progress["samples"],
        "tokens_seen": progress["tokens"],
        "train_s": round(progress["seconds"], 1),
        "task": score["task"],
        "modality": score.get("modality", ""),
        "measure": score["measure"],
        "value": round(score["value"], 4),
        "chance": round(score["chance"], 4),
        "n": score["n"],
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "cpu": processor(),
        "design": DESIGN,
        "data": bench.data.name,
        "run_samples": bench.samples,
        "cpu_s": "" if cpu_s is None else round(cpu_s, 1),
        "set": score.get("set") or "",
    }


def append_rows(rows: list[dict[str, Any]]) -> None:
    """Adds the rows of one run to the results at once, and prints the last eight."""
    add_rows(CSV, rows)
    for row in rows[-8:]:
        print(json.dumps(row), flush=True)


def run_process(command: list[str], record: Path, *, fresh: bool) -> None:
    """Runs a command and adds its CPU seconds, with those of its children, to the file `record`.

    The sum is not known, and "None" is written, if an earlier part of the work was interrupted before it was recorded.
    """
    before = float(record.read_text(encoding="utf-8")) if record.is_file() and not fresh else 0.0
    record.write_text("nan", encoding="utf-8")
    start = _children_s()
    print(" ".join(command), flush=True)
    result = subprocess.run(command, check=False)
    record.write_text(str(before + _children_s() - start), encoding="utf-8")
    if result.returncode:
        raise SystemExit(f"exit code {result.returncode} of: {' '.join(command)}")


def cpu_seconds(record: Path) -> float | None:
    """Returns the CPU seconds that `run_process` has recorded; None if they are not known."""
    value = float(record.read_text(encoding="utf-8")) if record.is_file() else float("nan")
    return value if value == value else None


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _train_and_score(bench: Bench, arm: str, seed: int, config: dict[str, Any]) -> None:
    run = bench.run(arm, seed)
    config |= {"name": run.name, "output": str(run.parent)}
    record = bench.folder / f"{run.name}.cpu"
    if not (run / "export/config.json").is_file():
        run.parent.mkdir(parents=True, exist_ok=True)
        file = bench.folder / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        resumes = (run / CHECKPOINTS / "latest").is_file()
        source = ["--resume", str(run)] if resumes else ["--config", str(file)]
        run_process([sys.executable, "-m", "univitar_ds", "train", *source], record, fresh=not resumes)
    if not is_done(bench, arm, seed):
        samples = sum(stage["samples"] for stage in config["stages"])
        append_rows(list(_rows_of(bench, arm, seed, samples, cpu_seconds(record))))
    for folder in atomic_dir.complete(run / CHECKPOINTS)[:-1]:
        shutil.rmtree(folder)


def _rows_of(bench: Bench, arm: str, seed: int, samples: int, cpu_s: float | None) -> Iterator[dict[str, Any]]:
    """Yields a row for each score of the checkpoints nearest to POINTS. CPU seconds are those of the whole training."""
    folders = atomic_dir.complete(bench.run(arm, seed) / CHECKPOINTS)
    seen = [read_state(folder)["progress"]["samples"] for folder in folders]
    for point in POINTS:
        nearest = min(range(len(folders)), key=lambda index: abs(seen[index] - point * samples))
        state = read_state(folders[nearest])
        done = nearest == len(folders) - 1
        progress = {**state["progress"], "seconds": state["seconds"], "cpu_s": cpu_s if done else None}
        for score in evaluate(open_trained(folders[nearest]))["figures"]:
            yield result_row(bench, arm, seed, progress, score)
