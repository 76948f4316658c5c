"""Runs the demo: renders scenes, packs shards, trains with ZeRO-3 on local processes, evaluates, exports, and writes a
page of the run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from univitar_ds import launch
from univitar_ds.config.run_folder import EXPORT, MODEL, SUMMARY
from univitar_ds.data.writing.writer import pack_folder
from univitar_ds.demo.folder import PAGE, RUN, claim
from univitar_ds.demo.synthetic import write_scenes
from univitar_ds.demo.use_model import classified
from univitar_ds.evaluation.report import render_times
from univitar_ds.reporting.page import PageOptions, check_page, write_page
from univitar_ds.screen import show

IMAGES, VIDEOS = 1600, 1600
"""Number of scenes of each kind."""


def run_demo(folder: Path, nproc: int, install_seconds: float | None) -> int:
    """Runs all parts of the demo in `folder`, and prints the results and the duration of each part.

    Reuses existing scenes and shards. Removes the run of an earlier demo, so training starts from scratch.
    Args: nproc: number of ranks; install_seconds: duration of the installation, for the table; None: not in the table.
    Returns: the exit status.
    Raises: UserError, for example a ConfigError if the folder contains files that no demo writes.
    """
    with_maps = PageOptions(images=())
    if folder.is_dir():
        check_page(folder / PAGE, with_maps)
    claim(folder)
    os.environ["DS_ACCELERATOR"] = "cpu"  # so that the demo runs on every machine
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
    with launch.timed(after := {}, "drawing the page"):
        *_, page = write_page([run], folder / PAGE, with_maps)
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    rest = times.pop("training, evaluation, export") - sum(summary["seconds"].values())
    show(render_times({**times, "starting processes": round(rest, 1), **summary["seconds"], **after}))
    show("\nThe results differ by a few points between processors, and more between seeds (docs/results.md).")
    show(f"\nUniViTARModel.from_pretrained({str(run / EXPORT / MODEL)!r}).zero_shot(images, names):\n")
    show(classified(run / EXPORT / MODEL, folder / "scenes"))
    show(f"\nFiles are below {folder / 'scenes'}. The model is in {run / EXPORT}; look at the {page}.")
    return 0
