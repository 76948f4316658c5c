"""The recomputation of a stage with `checkpoint_every: auto`, from the memory of the device."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.unit.training.step.test_kept_packs import ALONE, GB, Device
from univitar_ds.config.load import load_config
from univitar_ds.model.blocks.activations import bytes_of_pack
from univitar_ds.model.config import PRESETS
from univitar_ds.training.step import recomputation
from univitar_ds.training.step.recomputation import RESERVED_PER_PARAMETER, recomputation_of


def engine_of(size: str, parameters: int = 1000, text: bool = False):
    """An engine in bfloat16 whose only parameter has 8 elements on this rank, as a part of `parameters`."""
    module = nn.Module()
    module.vision = nn.Module()
    module.vision.config = PRESETS[size]
    module.vision.weight = nn.Parameter(torch.zeros(8))
    module.vision.weight.ds_numel = parameters
    if text:
        shape = SimpleNamespace(hidden_size=1024, num_hidden_layers=12, max_position_embeddings=64)
        module.text = SimpleNamespace(model=SimpleNamespace(config=shape))
    return SimpleNamespace(module=module, dtype=torch.bfloat16, world=ALONE)


def chosen(size: str, gb: float, *overrides: str, stage: int = 1, engine=None, states: int = 0):
    """What a stage of the recipe of a size recomputes on a device with so much free memory."""
    cfg = load_config(f"univitar_{size.replace('.', 'p')}", list(overrides))
    device = Device(states, [], size=int((gb * GB + states) / recomputation.USABLE))
    return recomputation_of(cfg, cfg.stages[stage], engine or engine_of(size), device)


@pytest.mark.parametrize(
    ("size", "gb", "kind"),
    [("0.3b", 60, 0), ("0.3b", 25, "selective"), ("1b", 60, "selective"), ("1b", 46, 2), ("1b", 10, 1)],
)
def test_recipes_recompute_as_little_as_fits(size, gb, kind):
    assert chosen(size, gb) == kind


def test_memory_in_use_and_memory_of_later_allocations_is_not_free():
    need = bytes_of_pack(PRESETS["0.3b"], 0, 32_768, width=2) / GB
    assert chosen("0.3b", need + 0.001) == 0
    assert chosen("0.3b", need - 0.001) == "selective"
    assert chosen("0.3b", need + 0.001, states=7 * GB) == 0
    weights = engine_of("0.3b", parameters=10**9)
    assert chosen("0.3b", need + RESERVED_PER_PARAMETER + 0.001, engine=weights) == 0
    assert chosen("0.3b", need + RESERVED_PER_PARAMETER - 0.001, engine=weights) == "selective"


def test_the_text_tower_takes_its_part_unless_it_is_frozen():
    need = bytes_of_pack(PRESETS["0.3b"], 0, 32_768, width=2) / GB
    text = engine_of("0.3b", text=True)
    most = 32_768 // 576 * 64 * 12 * 18 * 1024 * 2 / GB
    assert chosen("0.3b", need + most + 0.001, engine=text) == 0
    assert chosen("0.3b", need + most - 0.001, engine=text) == "selective"
    assert chosen("0.3b", need + 0.001, "model.text.frozen=true", engine=text) == 0
    assert chosen("0.3b", need + 0.001, "stages.1.frozen=[text]", engine=text) == 0


def test_dropped_tokens_need_no_memory():
    assert chosen("0.3b", 25, "stages.1.patch_dropout=0.5") == 0


def test_the_rank_with_the_least_free_memory_decides(monkeypatch):
    monkeypatch.setattr(recomputation, "gather_numbers", lambda mine, _: torch.tensor([mine, [25e9]]))
    assert chosen("0.3b", 60) == "selective"


@pytest.mark.parametrize("value", [0, 1, 3, "selective"])
def test_a_value_of_the_run_file_is_kept(value):
    assert chosen("1b", 1, f"model.checkpoint_every={value}") == value
    assert chosen("1b", 1, f"stages.1.checkpoint_every={value}") == value
    assert chosen("1b", 60, "model.checkpoint_every=1", "stages.1.checkpoint_every=auto") == "selective"


def test_nothing_is_recomputed_on_a_cpu():
    cfg = load_config("univitar_1b")
    assert recomputation_of(cfg, cfg.stages[0], engine_of("1b")) == 0


@pytest.mark.parametrize(("gb", "level"), [(60, "INFO"), (1, "WARNING")])
def test_the_choice_is_logged_with_its_numbers(gb, level, caplog):
    with caplog.at_level(logging.INFO):
        chosen("0.3b", gb)
    (record,) = caplog.records
    assert record.levelname == level
    assert "stage native recomputes" in record.getMessage()
    assert "a pack of 32768 tokens needs 32.7 GB (nothing), 21.5 GB (norms and gates)" in record.getMessage()
    assert ("lower token_budget" in record.getMessage()) == (level == "WARNING")
