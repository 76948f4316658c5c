"""Conversions from every format to every format keep all bits, for runs of any number of ranks and ZeRO stage."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from tests.support.closeness import assert_sums_close
from tests.support.distributed import run_distributed
from tests.support.finished import CAPTIONS, run_config
from tests.support.golden import CASES, golden
from tests.support.standin import pack
from tests.support.training import OBJECTIVE, ds_config
from tests.unit.formats.made import assert_equal
from univitar_ds import Preprocessor
from univitar_ds.config.load import config_fingerprint, dump_config
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.convert.conversion import WRITTEN, Options, convert
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import PRESETS
from univitar_ds.model.from_stored import build_encoder
from univitar_ds.tokenization import load_tokenizer, special_ids, train_tokenizer
from univitar_ds.training.checkpoint.sharded import save_checkpoint
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.step.train_step import StepSettings, train_step

pytestmark = pytest.mark.distributed
WITH_OPTIMIZER = ("universal", "dcp", "megatron")
WORLDS = [(1, 1), (2, 3), (2, 2), (3, 3), (3, 1)]
"""(ranks, ZeRO stage)"""
UPDATES = 2


def write_run_files(folder: Path):
    config = run_config()
    folder.mkdir(parents=True)
    dump_config(config, folder / "config.yaml")
    train_tokenizer(CAPTIONS, config.model.text.vocab_size).save(str(folder / "tokenizer.json"))
    return config


def trained(folder: Path, stages: tuple[int, ...]) -> None:
    """Trains the model of `run_config` for some updates with each ZeRO stage, in the runs `folder/zero<stage>`."""
    world = start_world()
    for stage in stages:
        run = folder / f"zero{stage}"
        if world.is_main:
            write_run_files(run)
        torch.distributed.barrier()
        config = run_config()
        special = special_ids(load_tokenizer(run / "tokenizer.json"))
        model = build_contrastive(config.model, **special.of_text_model, seed=5)
        engine = build_engine(model, OptimizerConfig(), ds_config(1, stage=stage), world)
        for step in range(UPDATES):
            train_step(engine, [pack(step, world.rank)], StepSettings(1e-3), OBJECTIVE)
        state = {
            "fingerprint": config_fingerprint(config),
            "config": config.model_dump(mode="json"),
            "model": model.description(),
            "progress": {"samples": 10, "tokens": 100},
        }
        save_checkpoint(engine, run / "checkpoints", UPDATES, state, {}, keep=1)
        engine._engine.save_checkpoint(str(folder / f"deepspeed{stage}"))
        engine.close()


class Runs:
    """The runs by (ranks, ZeRO stage), which are trained when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, world: tuple[int, int]) -> Path:
        ranks, stage = world
        folder = self.folder / f"of{ranks}"
        if not folder.is_dir():
            run_distributed(trained, ranks, folder, tuple(stage for count, stage in WORLDS if count == ranks))
        return folder / f"zero{stage}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def assert_same(found: StoredModel, wanted: StoredModel, *, optimizer: bool) -> None:
    assert found.encoder == wanted.encoder
    assert found.joint == wanted.joint
    assert_equal(found.tensors, {name: wanted.tensors[name] for name in found.tensors})
    assert found.tensors.keys() == wanted.tensors.keys()
    if optimizer:
        assert found.optimizer.step == wanted.optimizer.step == UPDATES
        for kind in ("exp_avg", "exp_avg_sq"):
            moments, expected = getattr(found.optimizer, kind), getattr(wanted.optimizer, kind)
            assert moments.keys() == expected.keys()
            assert_equal(moments, {name: expected[name] for name in moments})
        for one, other in zip(found.optimizer.groups, wanted.optimizer.groups, strict=True):
            assert {name: one[name] for name in ("lr", "eps", "weight_decay")} == {
                name: other[name] for name in ("lr", "eps", "weight_decay")
            }
            assert list(one["betas"]) == list(other["betas"])
            assert sorted(one["params"]) == sorted(other["params"])


@pytest.mark.parametrize(
    "world",
    [pytest.param(w, id=f"{w[0]} ranks, stage {w[1]}", marks=[pytest.mark.slow] * (w != (2, 3))) for w in WORLDS],
)
def test_a_run_of_any_ranks_and_stage_is_the_same_in_every_format(runs, world, tmp_path):
    run = open_stored(runs[world])
    moved = [name for name, value in run.optimizer.exp_avg.items() if value.any()]
    assert len(moved) > len(run.tensors) // 2
    for to in WRITTEN:
        convert(runs[world], tmp_path / to, to, Options(shard_bytes=2_000_000 if to in ("hf", "release") else None))
        found = open_stored(tmp_path / to)
        assert_same(found, run.encoder_only() if to == "release" else run, optimizer=to in WITH_OPTIMIZER)


def test_the_checkpoint_of_deepspeed_itself_has_the_tensors_of_the_run(runs, tmp_path):
    for ranks, stage in ((2, 3), (2, 2)):
        run = runs[ranks, stage]
        native = run.parent / f"deepspeed{stage}"
        convert(native, tmp_path / f"{stage}", "dcp", Options(part="model"), config_folder=run)
        found, wanted = open_stored(tmp_path / f"{stage}"), open_stored(run)
        assert_equal(found.tensors, {name: wanted.tensors[name] for name in found.tensors})
        for kind in ("exp_avg", "exp_avg_sq"):
            moments, expected = getattr(found.optimizer, kind), getattr(wanted.optimizer, kind)
            assert moments.keys() == expected.keys()
            assert_equal(moments, {name: expected[name] for name in moments})


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of 2 ranks and stage 3 in every format."""
    folder = tmp_path_factory.mktemp("written")
    for to in WRITTEN:
        convert(runs[2, 3], folder / to, to)
    return {to: folder / to for to in WRITTEN}


@pytest.mark.parametrize("to", WRITTEN)
def test_every_format_is_converted_to_every_other_bit_for_bit(runs, written, to, tmp_path):
    run = open_stored(runs[2, 3])
    for source in WRITTEN:
        convert(written[source], tmp_path / source, to)
        encoder = "release" in (source, to)
        kept = not encoder and source in WITH_OPTIMIZER and to in WITH_OPTIMIZER
        assert_same(open_stored(tmp_path / source), run.encoder_only() if encoder else run, optimizer=kept)


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)])
def test_the_released_encoder_has_its_reference_outputs_after_every_conversion(case, tmp_path):
    numbers = golden(case)
    for first, second in product(WRITTEN, WRITTEN):
        if not (tmp_path / first).is_dir():
            convert(numbers.folder, tmp_path / first, first)
        convert(tmp_path / first, tmp_path / f"{first}-{second}", second)
        stored = open_stored(tmp_path / f"{first}-{second}")
        pixels, grids = Preprocessor(stored.encoder)(numbers.items())
        assert grids.tolist() == numbers.grid_thw.tolist()
        with torch.no_grad():
            found = build_encoder(stored)(pixels, grids)
        assert_sums_close(found, numbers.last_hidden_state, numbers.terms, f"tokens after {first} and {second}")


@pytest.mark.slow
def test_the_smallest_published_size_is_the_same_after_every_format(tmp_path):
    from univitar_ds import UniViTAR

    torch.manual_seed(0)
    UniViTAR(PRESETS["0.3b"]).save_pretrained(tmp_path / "release")
    wanted = open_stored(tmp_path / "release")
    previous = tmp_path / "release"
    for to in (*WRITTEN[1:], "release"):
        out = tmp_path / f"as-{to}"
        convert(previous, out, to, Options(shard_bytes=300_000_000 if to in ("hf", "release") else None))
        previous = out
    found = open_stored(previous)
    assert found.encoder == wanted.encoder
    assert_equal(found.tensors, {name: wanted.tensors[name] for name in found.tensors})
    assert found.tensors.keys() == wanted.tensors.keys()
