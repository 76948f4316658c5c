"""`make demo`: rendered scenes, shards, ZeRO-3 training on local processes, evaluation, export, one table."""

from __future__ import annotations

import json
import os
from pathlib import Path

from univitar_ds import launch
from univitar_ds.config.run_folder import SUMMARY
from univitar_ds.data.writing.writer import pack_folder
from univitar_ds.demo.folder import RUN, claim
from univitar_ds.demo.synthetic import write_scenes
from univitar_ds.evaluation.report import render_times
from univitar_ds.screen import show

IMAGES, VIDEOS = 1600, 1600


def run_demo(folder: Path, nproc: int, install_seconds: float | None) -> int:
    """Run all parts in `folder` and print the results with the time of each part.

    Existing scenes and shards are used again; the run is started from scratch. Returns the exit status.
    Raises: ConfigError if the folder holds anything that no demo writes.
    """
    claim(folder)
    os.environ["DS_ACCELERATOR"] = "cpu"  # so that it runs on every machine
    times: dict[str, float] = {} if install_seconds is None else {"installation": install_seconds}
    shards, runs = folder / "shards", folder / "runs"
    with launch.timed(times, "rendering the scenes"):
        write_scenes(folder / "scenes", images=IMAGES, videos=VIDEOS, seed=0, progress=True)
    with launch.timed(times, "packing into shards"):
        pack_folder(folder / "scenes", shards)
    with launch.timed(times, "training, evaluation, export"):
        status = launch.train(
            "demo",
            nproc,
            [f"output={runs}", f"data.sources.0.path={shards}", f"evaluation.sources.0.path={shards}"],
        )
    if status:
        return status
    run = folder / RUN
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    rest = times.pop("training, evaluation, export") - sum(summary["seconds"].values())
    show(render_times({**times, "starting processes": round(rest, 1), **summary["seconds"]}))
    show("\nThe results differ by a few points between processors, and more between seeds (README, Two commands).")
    show(f"Look at {run}/examples-image.png and {run}/examples-video.png; the encoder is in {run}/export.")
    return 0
