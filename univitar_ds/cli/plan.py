"""The command `univitar-ds plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from univitar_ds.cli.common import add_command, add_overrides, expand, positive, shown
from univitar_ds.errors import ConfigError
from univitar_ds.screen import show

if TYPE_CHECKING:
    from univitar_ds.planning.forecast.plan import Plan

_DESCRIPTION = """Predict what a run needs on a cluster: memory of a GPU by part, time of a step and MFU, FLOPs and
bytes, host memory and cores for the loader, checkpoints, reading, days and GPU hours of all stages, and scaling
to 1,024 GPUs. Needs no GPU. Sources are read only if all of them are on this machine: their manifests, and the
labels of a classification run. model.init_from is opened, and copied first if it is at s3:// or on the hub.

  univitar-ds plan --config univitar_0p6b --nodes 32 --gpus-per-node 8 --gpu h100
  univitar-ds plan --config run.yaml --nodes 2 --gpus-per-node 8 --gpu a100 --sweep
  univitar-ds plan --config univitar_1b --nodes 8 --gpu h200 --json stages.1.token_budget=65536

With a CUDA build of torch, memory and collectives of each stage are those of the trainer's own step on a simulated
GPU, which takes a minute or more; --formulas predicts them within seconds, as without such a build. Times follow
from published and chosen rates, none of which was measured on a GPU. All assumptions are printed with their
sources. If the run does not fit into the GPUs, the exit status is 2 and the message has a remedy; with --sweep the
table shows what fits."""


def add_plan(commands) -> None:
    """Adds the command `plan` to `commands`."""
    parser = add_command(
        commands, "plan", _plan, "memory, time and cost of a run on a cluster", _DESCRIPTION, leaves_files=False
    )
    parser.add_argument("--config", required=True, help="a run file, or the name of a shipped recipe")
    parser.add_argument("--nodes", type=positive, default=1, help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="GPUs of each machine (default 8)")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h200 or b200 (default h100)")
    parser.add_argument(
        "--tokens-per-item",
        type=positive,
        metavar="N",
        help="mean tokens of an image at native size (default: from the manifests of the sources, else 1,024)",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also try token budgets x recomputation x ZeRO for a stage"
    )
    parser.add_argument("--stage", metavar="NAME", help="the stage of --sweep (default: the longest)")
    parser.add_argument(
        "--formulas", action="store_true", help="simulate no step: formulas predict memory and collectives"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--png", type=expand, metavar="FILE", help="also draw memory by part and scaling")
    add_overrides(parser)


def _plan(arguments: argparse.Namespace) -> None:
    from univitar_ds.config.load import load_config
    from univitar_ds.planning.forecast.cluster import cluster_of
    from univitar_ds.planning.forecast.items import known_means
    from univitar_ds.planning.forecast.plan import plan_run, scaling
    from univitar_ds.planning.forecast.sweep import check_stage, stage_named, sweep
    from univitar_ds.planning.forecast.text import plan_object, plan_text

    if arguments.stage is not None and not arguments.sweep:
        raise ConfigError(f"--stage {arguments.stage} belongs to --sweep; add it, or leave --stage out")
    cluster = cluster_of(arguments.nodes, arguments.gpus_per_node, arguments.gpu)
    if arguments.png is not None:
        _check_image(arguments.png)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.stage is not None:
        check_stage(config, arguments.stage)
    given = arguments.tokens_per_item
    plan = plan_run(config, cluster, given)
    if not arguments.formulas:
        plan = _simulated(plan)
    trials = sweep(plan, stage_named(plan, arguments.stage)) if arguments.sweep else []
    scales = list(scaling(plan, known_means(config), given))
    if arguments.json:
        show(json.dumps(plan_object(plan, scales, trials), indent=2))
    else:
        show(plan_text(plan, scales, trials))
    if arguments.png is not None:
        _draw(arguments.png, plan, scales)
    if (reason := plan.misfit()) is not None:
        raise ConfigError(reason)


def _simulated(plan: Plan) -> Plan:
    """Returns the plan with simulated steps, or with a note why there are none."""
    from dataclasses import replace

    from univitar_ds.planning.forecast.simulated import simulate_plan
    from univitar_ds.processes import exits_by_signals
    from univitar_ds.simulation.process import NoSimulation

    packs = max(stage.packs for stage in plan.stages)

    def progress(done: int, steps: int) -> None:
        line = f"simulated {done} of {steps} training steps"
        if not done:
            line = (
                f"simulating {steps} training step{'' if steps == 1 else 's'} of a GPU, of {packs:,} "
                f"pack{'' if packs == 1 else 's'}, which takes a minute or more (--formulas: a prediction within "
                "seconds)"
            )
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)

    try:
        with exits_by_signals():  # else SIGTERM would leave the temporary folder
            return simulate_plan(plan, progress)
    except NoSimulation as reason:
        note = f"formulas predict memory and collectives, since no step can be simulated here: {reason}"
        return replace(plan, notes=[*plan.notes, note])


def _check_image(path: Path) -> None:
    """Raises: ConfigError if the name does not end in .png, or the file exists and `plan` did not draw it."""
    from univitar_ds.extras import extra
    from univitar_ds.owned import check_result, drawn_by

    with extra("train"):
        from univitar_ds.planning.forecast.drawing import SOFTWARE
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--png {path} does not end in .png; give the name of an image")
    check_result(path, drawn_by(SOFTWARE))


def _draw(path: Path, plan: Plan, scales: Sequence[Plan]) -> None:
    from univitar_ds.planning.forecast.drawing import draw

    draw(path, plan, scales)
    with suppress(OSError):
        print(f"image in {shown(str(path))}", file=sys.stderr, flush=True)
