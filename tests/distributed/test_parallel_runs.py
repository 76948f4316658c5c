"""Whole runs whose ranks share weights (model.tensor_parallel) or packs (model.sequence_parallel)."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.distributed import run_distributed
from tests.support.runs import TERMS, metrics, reach_of, samples, small_config, train_rank
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import check_config, load_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_full
from univitar_ds.run import create_run
from univitar_ds.training.engine.optim import GRADIENT_PARTS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SHAPE = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "qkv_bias": True}
CANCELLED = ("k_proj.bias", "pool.kv.bias", "attn.qkv.bias")
"""Biases that softmax cancels, wholly or in part. Their gradient is only rounding error, which Adam scales up."""
PARAMETERS = 400_000
"""Approximate number of parameters, whose squared gradients a norm sums."""


def config_of(folder, name, *, zero=3, **model):
    """The small run with dropped tokens and branches in its second stage, in float32."""
    (folder / f"zero{zero}.json").write_text(json.dumps({"zero_optimization": {"stage": zero}}))
    content = small_config(folder / "shards", folder, name=name).model_dump(mode="json")
    content["model"].update(encoder=SHAPE, **model)
    content["stages"][0]["samples"] = 100
    content["stages"][1].update(patch_dropout=0.4, stochastic_depth=0.3)
    content.update(deepspeed=str(folder / f"zero{zero}.json"), optimizer={"ema_decay": 0.9})
    return check_config(content, "the test")


def trained(folder, name, ranks, **settings):
    run = create_run(config_of(folder, name, **settings), "the test", ranks)
    assert all(run_distributed(train_rank, ranks, run))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    write_demo_shards(folder / "shards")
    run = trained(folder, "whole", 1)
    return SimpleNamespace(folder=folder, run=run, last=checkpoint_dir.complete(run / CHECKPOINTS)[-1])


@pytest.mark.numeric
@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel": 2, "zero": 1},
        {"tensor_parallel": 2, "zero": 3, "checkpoint_every": 1},
        {"sequence_parallel": 4, "zero": 2, "checkpoint_every": 2},
        {"tensor_parallel": 2, "sequence_parallel": 2, "zero": 3, "checkpoint_every": "selective"},
    ],
    ids=str,
)
def test_a_run_on_four_ranks_that_share_weights_or_packs_equals_one_on_one_rank(whole, settings):
    run = trained(whole.folder, "-".join(map(str, settings.values())), 4, **settings)
    assert samples(run) == samples(whole.run)
    lines = metrics(run)
    assert len(lines) >= 10
    for line, wanted in zip(lines, metrics(whole.run), strict=True):
        for name in ("loss", "grad_norm"):
            assert_sums_close(line[name], wanted[name], line["step"] * TERMS, f"{name} of step {line['step']}")
        for name in ("lr", "samples_seen", "tokens_seen", "fill_pct"):
            assert line[name] == wanted[name], name
        assert_sums_close(
            math.hypot(*(line[f"grad_norm_{part}"] for part in GRADIENT_PARTS)), line["grad_norm"], PARAMETERS
        )
        assert line["flop_imbalance_pct"] >= -1e-9
    weights = read_full(checkpoint_dir.complete(run / CHECKPOINTS)[-1])
    wanted = {name: value for name, value in read_full(whole.last).items() if not name.endswith(CANCELLED)}
    reach = reach_of(whole.run)
    assert_all_close({name: weights[name] for name in wanted}, wanted, len(lines) * TERMS, reach=reach)


def resaved(run, source, to, settings):
    """Loads a checkpoint into an engine with other settings, and saves it again."""
    from univitar_ds.training.assembly import build_training
    from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
    from univitar_ds.training.distributed.process_group import start_world

    world = start_world()
    config = load_config(run / "config.yaml")
    config = config.model_copy(update={"model": config.model.model_copy(update=settings)})
    engine, _ = build_training(config, run, world)
    saved = load_checkpoint(engine, source)
    for piece in engine.pieces():
        for kind, tensor in piece.tensors.items():
            assert torch.isfinite(tensor).all(), (piece.name, kind)
    folder = save_checkpoint(engine, to, 1, saved.state, {}, keep=1)
    engine.close()
    return folder


def tensors_of(folder):
    from contextlib import ExitStack

    from univitar_ds.formats.elastic import ElasticReader

    with ExitStack() as files:
        reader = ElasticReader(folder, files)
        return {(name, kind): reader.read(name, kind) for name, kinds in reader.kinds.items() for kind in kinds}


def test_checkpoints_are_resaved_with_another_number_of_slices_bit_for_bit(whole, tmp_path):
    wanted, folder = tensors_of(whole.last), whole.last
    assert {kind for _, kind in wanted} == {"fp32", "exp_avg", "exp_avg_sq", "ema"}
    zero1 = config_of(whole.folder, "zero1", zero=1)
    other = create_run(zero1, "the test", 1)
    chain = [
        (whole.run, 2, {"tensor_parallel": 2}),
        (other, 4, {"tensor_parallel": 4}),
        (whole.run, 4, {"tensor_parallel": 4}),  # the same slices, each in one piece
        (whole.run, 4, {}),
    ]
    for number, (run, ranks, settings) in enumerate(chain):
        (folder,) = set(run_distributed(resaved, ranks, run, folder, tmp_path / str(number), settings))
        found = tensors_of(folder)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), settings
        sizes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert sizes < 1.3 * sum(path.stat().st_size for path in whole.last.glob("*.safetensors"))
