"""One training step of a shipped recipe at full size on a simulated GPU: a program that prints a line of JSON.

    python -m tests.support.simulated_gpu.recipe '{"recipe": "univitar_0p3b", "zero": 2, "ranks": 8, "recompute": 1}'

The packs are images of 1,024 tokens with captions of 40. There is no teacher.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from tests.support.paths import ROOT
from univitar_ds.config.deepspeed import resolve_deepspeed
from univitar_ds.config.load import check_config, load_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.geometry import pixel_bytes
from univitar_ds.model.build import describe
from univitar_ds.planning.forecast.step_load import Placement, PlannedModel, load_of, states_of
from univitar_ds.planning.memory import Peak, peak
from univitar_ds.planning.sizes import count_parameters

SIDE = 32
"""Rows and columns of patches of an image."""
CAPTION = 40
KINDS = ("allgather", "reduce_scatter", "allreduce")
FORWARD = ("encoder activations", "text tower", "loss", "pixels", "gathered weights")
"""Parts of the memory that the forward passes and the loss allocate."""


@dataclass(frozen=True)
class Setting:
    """`recompute` is `model.checkpoint_every`; `packs` is the number of packs per rank and step."""

    recipe: str
    zero: int = 2
    ranks: int = 8
    packs: int = 1
    recompute: int = 1
    tokens: int = 32768
    flash: str = "flash3"


def main() -> None:
    setting = Setting(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(setting) | measured(setting)))


def measured(setting: Setting) -> dict[str, Any]:
    """Returns the numbers of the second step."""
    from univitar_ds.simulation import step  # imports Triton

    model, place = _planned(setting)
    found = step.simulated(
        step.Setting(
            config=model.config.model_dump(mode="json"),
            stage=0,
            description=model.description,
            classes=None,
            teacher=None,
            ranks=setting.ranks,
            deepspeed=place.resolved,
            recompute=setting.recompute,
            kept=1,
            modality="image",
            items=setting.tokens // SIDE**2,
            grid=(1, SIDE, SIDE),
            caption=CAPTION,
            flash=setting.flash,
        )
    )
    return {**_numbers(found), "foreseen_gib": round(foreseen(setting).bytes / 2**30, 2)}


def foreseen(setting: Setting) -> Peak:
    """Returns the memory of a rank as `univitar-ds plan` predicts it by formulas."""
    model, place = _planned(setting)
    stage, items = model.config.stages[0], setting.tokens // SIDE**2
    load = load_of(model, stage, setting.ranks, setting.recompute)
    load = replace(
        load, items=items, texts=items * setting.ranks * setting.packs, text=replace(load.text, length=CAPTION),
        pixels=pixel_bytes(setting.tokens, video=False),
    )  # fmt: skip
    return peak(load, states_of(model, stage, place))


def _planned(setting: Setting) -> tuple[PlannedModel, Placement]:
    """Returns the model of a setting, and its DeepSpeed configuration."""
    config = _config(setting)
    described = describe(config.model, None, vocab_size=config.model.text.vocab_size, eos_id=1, pad_id=0)
    counts = count_parameters(config, described, teacher_width=None, classes=None)
    content = json.loads((ROOT / f"ds_configs/zero{setting.zero}.json").read_text(encoding="utf-8"))
    resolved = resolve_deepspeed(config, setting.ranks, content, ("the recipe", "its DeepSpeed configuration"))
    return PlannedModel(config, described, counts), Placement(setting.ranks, setting.ranks, resolved)


def _config(setting: Setting) -> RunConfig:
    """Returns the recipe with one stage and without a teacher."""
    content = load_config(ROOT / f"univitar_ds/recipes/{setting.recipe}.yaml").model_dump(mode="json")
    content["objective"]["teacher"] = None
    content["data"]["lanes"] = setting.ranks * setting.packs
    content["stages"] = [content["stages"][0] | {"distill": {"start": 0.0}, "token_budget": setting.tokens}]
    return check_config(content, setting.recipe)


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    collectives, held = found["collectives"], found["peak"]
    phases = {
        "forward": sum(size for part, size in held.items() if part in FORWARD),
        "backward": held.get("backward pass", 0),
        "update": held.get("update", 0),
    }
    phases = {"build": sum(held.values()) - sum(phases.values())} | phases
    return {
        "launches": found["launches"],
        "fused_launches": found["fused"],
        "collectives": sum(collectives.values()),
        **{f"{kind}s": sum(count for name, count in collectives.items() if kind in name) for kind in KINDS},
        "collective_gb": round(sum(found["collective_bytes"].values()) / 1e9, 2),
        "waits": sum(found["waits"].values()),
        "wait_places": len(found["waits"]),
        "peak_gib": round(sum(held.values()) / 2**30, 2),
        **{f"peak_gib_{phase}": round(size / 2**30, 2) for phase, size in phases.items()},
    }


if __name__ == "__main__":
    main()
