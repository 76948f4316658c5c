"""Compares arms of the recipe on scenes that anyone can render, with several seeds: what helps, and what does not.

    python benchmarks/bench_recipe.py WORK [--samples 7000] [--seeds 0 1 2 3 4] [--arms fixed curriculum ...]
    python benchmarks/bench_recipe.py WORK --timm-python PYTHON     # also timm's NaFlexViT
    python benchmarks/bench_recipe.py WORK --photos FOLDER          # a second table, of captioned photos
    python benchmarks/bench_recipe.py WORK --table

The arms are in `recipe/arms.py`, the questions that they answer in `recipe/table.py`. Each run is evaluated after half
and after all of its samples, on compositions of colour and shape that no arm has seen. The folder WORK gets scenes, a
teacher and the runs. All arms of a seed come first. An interrupted call continues where it stopped, and runs whose rows
are in results/bench_recipe.csv are not repeated; calls with different arms may run at the same time in one WORK.

Runs have one process. CPU seconds are those of the whole command `train`, with start, evaluation and export. A run of
7,000 samples takes 3 to 6 minutes of CPU time. PYTHON is that of an environment with timm
(`pip install torch==2.14.1 torchvision==0.29.1 timm`); its arms need those of `video-0` with the same seed. FOLDER has
captioned photos with splits train and test, in a form that `univitar-ds data pack` reads; its videos are not used.
`--table` prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.recipe.arms import ARMS, PHOTO_ARMS
from benchmarks.recipe.naflex import NAFLEX_ARMS, provide_naflex
from benchmarks.recipe.runs import Bench, photos, provide_run, read_rows, scenes
from benchmarks.recipe.table import tables
from univitar_ds.cli.common import positive
from univitar_ds.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--samples", type=positive, default=7000, help="samples of a run, over all stages (default 7000)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *NAFLEX_ARMS], help="default: all that the data allows")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="captioned photos in place of scenes")
    parser.add_argument("--timm-python", metavar="PYTHON", help="Python of an environment with timm")
    parser.add_argument("--table", action="store_true", help="print the tables of the results and exit")
    arguments = parser.parse_args()
    if arguments.table:
        rows = read_rows()
        for data in sorted({row["data"] for row in rows}, key=lambda name: (name != "scenes", name)):
            print(tables(rows, data, arguments.samples), end="\n\n")
        return
    possible = list(PHOTO_ARMS) if arguments.photos else list(ARMS)
    if arguments.timm_python and not arguments.photos:
        possible += NAFLEX_ARMS
    arms = arguments.arms or possible
    if impossible := [arm for arm in arms if arm not in possible]:
        reason = "there are none with photos" if arguments.photos else "they need --timm-python"
        parser.error(f"arms {' '.join(impossible)}: {reason}")
    work = arguments.work
    try:
        data = photos(work, arguments.photos) if arguments.photos else scenes(work)
    except UserError as error:
        parser.error(str(error))
    bench = Bench(work, data, arguments.samples)
    for seed in arguments.seeds:  # all arms of a seed first: if time runs out, the results of some seeds are complete
        for arm in arms:
            if arm in NAFLEX_ARMS:
                provide_naflex(bench, arm, seed, arguments.timm_python)
            else:
                provide_run(bench, arm, seed)


if __name__ == "__main__":
    main()
