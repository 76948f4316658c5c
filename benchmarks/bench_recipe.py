"""Compares fixed size, curriculum, and curriculum with distillation, with equal samples and several seeds.

    python benchmarks/bench_recipe.py WORK [--samples 3000] [--seeds 0 1 2]

The folder WORK gets the demo's scenes, scenes from another seed, a teacher (an encoder of the same size, trained on the
scenes from the other seed), and a run for each arm and seed. Existing results are used again, so an interrupted call
continues where it stopped. Each run is evaluated after a quarter, half, three quarters and all of its samples, on
compositions of colour and shape that no arm has seen. Rows are added to results/bench_recipe.csv.

Runs have one process and one lane: half the demo's batch. All arms have the same share of steps with videos and the
same maximum number of tokens per item. `fixed` resizes all items to one square size. `curriculum` trains on small
squares, then on native images, then on native images and videos. `distilled` is the curriculum with a distillation loss
of decreasing weight.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.rows import RESULTS, add_rows, git_commit, processor
from univitar_ds.config.load import read_yaml, recipe_path
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.data.writing.writer import pack_folder
from univitar_ds.demo.synthetic import write_scenes
from univitar_ds.evaluation.run import evaluate
from univitar_ds.formats.elastic import read_state
from univitar_ds.training.checkpoint import atomic_dir
from univitar_ds.training.checkpoint.offline import open_trained

ARMS = ("fixed", "curriculum", "distilled")
IMAGES, VIDEOS = 1600, 1600
TEACHER_SCENES = 100
"""Seed of the scenes that the teacher is trained on: similar data, but no common samples."""
VIDEO_SHARE = 0.4
SHARES = (0.2, 0.2, 0.6)
"""Share of the samples in each stage of the curriculum. The last stage has all videos."""
POINTS = (0.25, 0.5, 0.75, 1.0)
"""Shares of a run's samples after which the run is evaluated."""
NATIVE_IMAGE = {"min_tokens": 16, "max_tokens": 100, "divisor_px": 14}
NATIVE_VIDEO = {"min_tokens": 32, "max_tokens": 144, "divisor_px": 14}
FIXED_IMAGE, FIXED_VIDEO, SMALL_IMAGE = (({"kind": "fixed", "size_px": px}) for px in (140, 84, 84))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=3000, help="samples of a run, over all stages (default 3000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = parser.parse_args()
    work, samples = arguments.work, arguments.samples
    shards = provide_shards(work, "scenes", seed=0)
    teacher = None
    if "distilled" in arguments.arms:
        teacher = provide_teacher(work, samples)
    for seed in arguments.seeds:  # all arms of a seed first: if time runs out, the results of some seeds are complete
        for arm in arguments.arms:
            config = run_of(arm, work, shards, samples, seed, teacher)
            train(config, work)
            append_rows(rows_of(arm, seed, samples, work / "runs" / config["name"]))


def provide_shards(work: Path, name: str, seed: int) -> Path:
    """Writes scenes like those of the demo, unless they exist. Returns the folder of their shards."""
    shards = work / f"{name}-shards"
    if not (shards / "manifest.json").is_file():
        write_scenes(work / name, images=IMAGES, videos=VIDEOS, seed=seed, progress=True)
        pack_folder(work / name, shards)
    return shards


def provide_teacher(work: Path, samples: int) -> Path:
    """Trains a teacher like the fixed arm, on other scenes. Returns the folder of the exported encoder."""
    shards = provide_shards(work, "teacher-scenes", seed=TEACHER_SCENES)
    config = run_of("fixed", work, shards, samples, TEACHER_SCENES, None) | {"name": "teacher"}
    train(config, work)
    return work / "runs/teacher/export"


def run_of(arm: str, work: Path, shards: Path, samples: int, seed: int, teacher: Path | None) -> dict[str, Any]:
    """Returns the configuration of an arm: that of the demo with other stages."""
    config = read_yaml(recipe_path("demo"))
    (demo_stage,) = config["stages"]
    common = {key: demo_stage[key] for key in ("video_frames", "token_budget", "lr", "final_lr_ratio")}
    config |= {
        "name": f"{arm}-{seed}",
        "output": str(work / "runs"),
        "seed": seed,
        "stages": list(stages_of(arm, samples, common)),
        "checkpoint": {"every_steps": 10, "keep": 1000},
    }
    config["data"] |= {"sources": [{"path": str(shards), "split": "train"}], "lanes": 1}
    config["evaluation"] |= {"sources": [{"path": str(shards), "split": "test"}]}
    if arm == "distilled":
        config["objective"] |= {"teacher": {"path": str(teacher)}}
    return config


def stages_of(arm: str, samples: int, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the stages of an arm. Args: samples: of all stages. common: settings of every stage."""
    warmup = samples // 10
    native = {"image": NATIVE_IMAGE, "video": NATIVE_VIDEO}
    if arm == "fixed":
        sizes = {"image": FIXED_IMAGE, "video": FIXED_VIDEO}
        yield {
            "name": "fixed", "samples": samples, "video_ratio": VIDEO_SHARE, "warmup_samples": warmup, **sizes, **common
        }  # fmt: skip
        return
    first, second, third = (int(samples * share) for share in SHARES)
    constant_lr = {**common, "lr_schedule": "constant"}
    constant_lr.pop("final_lr_ratio")
    stages = [
        {"name": "small", "samples": first, "warmup_samples": warmup, "image": SMALL_IMAGE, **constant_lr},
        {"name": "native", "samples": second, **native, **constant_lr},
        {"name": "video", "samples": third, "video_ratio": round(VIDEO_SHARE / SHARES[2], 3), **native, **common},
    ]
    weights = [{"start": 1.0}, {"start": 0.5}, {"kind": "cosine", "start": 0.5, "end": 0.0}]
    for stage, weight in zip(stages, weights, strict=True):
        yield {**stage, "distill": weight} if arm == "distilled" else stage


def train(config: dict[str, Any], work: Path) -> None:
    """Trains a run unless it is complete. Continues an interrupted run."""
    run = work / "runs" / config["name"]
    if (run / "export/config.json").is_file():
        return
    file = work / f"{config['name']}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    source = ["--resume", str(run)] if (run / CHECKPOINTS / "latest").is_file() else ["--config", str(file)]
    command = [sys.executable, "-m", "univitar_ds", "train", *source]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def rows_of(arm: str, seed: int, samples: int, run: Path) -> Iterator[dict[str, Any]]:
    """Yields a row for each score of the checkpoints nearest to POINTS."""
    folders = atomic_dir.complete(run / CHECKPOINTS)
    seen = [read_state(folder)["progress"]["samples"] for folder in folders]
    for point in POINTS:
        nearest = min(range(len(folders)), key=lambda index: abs(seen[index] - point * samples))
        state = read_state(folders[nearest])
        for score in evaluate(open_trained(folders[nearest]))["figures"]:
            yield {
                "arm": arm,
                "seed": seed,
                "samples_seen": seen[nearest],
                "tokens_seen": state["progress"]["tokens"],
                "train_s": round(state["seconds"], 1),
                "task": score["task"],
                "modality": score.get("modality", ""),
                "measure": score["measure"],
                "value": round(score["value"], 4),
                "chance": round(score["chance"], 4),
                "n": score["n"],
                "date": date.today().isoformat(),
                "commit": git_commit(),
                "cpu": processor(),
            }


def append_rows(rows: Iterator[dict[str, Any]]) -> None:
    """Adds the rows of one run to the results at once, and prints the last eight rows."""
    rows = list(rows)
    add_rows(RESULTS / "bench_recipe.csv", rows)
    for row in rows[-8:]:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
