"""`deepspeed: auto`: its choice by model, GPUs, packs and recomputation, and what a run reports of it."""

import json
import logging

import pytest

from tests.support.finished import run_config, write_run
from tests.support.shards import write_demo_shards
from univitar_ds.cli.main import main
from univitar_ds.config.deepspeed import read_deepspeed
from univitar_ds.config.load import dump_config, load_config, recipe_path
from univitar_ds.config.schema import RunConfig
from univitar_ds.drafting import machine
from univitar_ds.drafting.machine import Machine
from univitar_ds.errors import ConfigError
from univitar_ds.model.build import describe
from univitar_ds.planning import deepspeed_auto
from univitar_ds.planning.deepspeed_auto import Ranks, choose, ranks_of
from univitar_ds.planning.sizes import Counts, count_parameters
from univitar_ds.run import create_run, reopen_run

GB = 1e9
CPU, NODE = Machine(2, 16 * GB), Machine(64, 512 * GB, 8, 80 * GB)


def chosen(ranks: Ranks, *overrides: str, recipe: str = "univitar_1b"):
    config = load_config(recipe, ["data.lanes=1024", *overrides])
    special = {"vocab_size": config.model.text.vocab_size, "eos_id": 1, "pad_id": 0}
    described = describe(config.model, None, **special)
    counts = count_parameters(config, described, teacher_width=None, classes=None)
    return choose(config, described, counts, ranks)


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (Ranks(1, 1, 140 * GB), "zero2"),
        (Ranks(1, 1, 80 * GB), "zero3_offload"),  # a step has the pixels of 1,024 packs, 20 GB
        (Ranks(8, 8, 80 * GB), "zero1"),
        (Ranks(256, 8, 80 * GB), "zero1"),
        (Ranks(512, 8, 80 * GB), "zero2"),
        (Ranks(8, 8, 28 * GB), "zero2"),
    ],
)
def test_the_1b_recipe_gets_the_configuration_with_the_fewest_messages_that_fits(ranks, name):
    choice = chosen(ranks)
    assert (choice.name, choice.fits) == (name, True)
    assert f"{ranks.size} GPU" in choice.reason


def test_larger_states_are_shared_and_then_offloaded():
    """A model of 4 billion parameters, whose activations are those of `tiny`."""
    config = run_config(data={"sources": [{"path": "x"}], "lanes": 1024})
    described = {"encoder": describe(config.model, None, vocab_size=300, eos_id=1, pad_id=0)["encoder"]}
    counts = Counts({"blocks": 4_000_000_000})
    take = lambda size, memory: choose(config, described, counts, Ranks(size, min(size, 8), memory * GB))  # noqa: E731
    assert take(1024, 24).name == "zero2"
    assert take(16, 16.5).name == "zero3_node"
    assert take(16, 10.5).name == "zero3"
    assert take(8, 20).name == "zero3"
    assert take(8, 12).name == "zero3_offload"
    assert take(1, 40).name == "zero3_offload"
    none = take(8, 4)
    assert (none.name, none.fits) == ("zero3", False)
    assert "token_budget" in none.reason
    assert "zero1 41" in take(8, 20).reason, "what would not fit is named with its size"


def test_recomputation_makes_room():
    ranks = Ranks(1024, 8, 40 * GB)
    full, kept = chosen(ranks), chosen(ranks, "model.checkpoint_every=0")
    assert full.fits
    assert full == chosen(ranks, "model.checkpoint_every=1"), "auto recomputes all where it must"
    assert not kept.fits
    assert "checkpoint_every" in kept.reason


def test_a_run_on_gpus_gets_no_cpu_configuration_by_default():
    assert RunConfig.model_fields["deepspeed"].default == "auto"
    for memory in (4, 16, 80):
        for size in (1, 8, 64):
            choice = chosen(Ranks(size, min(8, size), memory * GB), recipe="photos")
            assert read_deepspeed(choice.name)["bf16"]["enabled"]
    assert chosen(Ranks(4, 4, 0.0)).name == "zero3_cpu"
    with pytest.raises(ConfigError, match="3 ranks"):
        chosen(Ranks(3, 3, 80 * GB))


def test_every_recipe_has_deepspeed_auto():
    recipes = sorted(recipe_path("demo").parent.glob("*.yaml"))
    assert len(recipes) > 5
    assert {load_config(str(file)).deepspeed for file in recipes} == {"auto"}


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x16)"}, 4),
        ({"LOCAL_WORLD_SIZE": "900"}, 64),
        ({"LOCAL_WORLD_SIZE": "many"}, 8),
        ({"LOCAL_WORLD_SIZE": "0"}, 1),
    ],
)
def test_the_launcher_determines_the_number_of_ranks_on_a_machine(environment, node):
    assert ranks_of(64, NODE, environment) == Ranks(64, node, 80 * GB)


def test_ranks_on_a_cpu_have_no_gpu_memory():
    assert ranks_of(2, CPU, {}) == Ranks(2, 2, 0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=16, videos=8, shards=2)


def with_auto(shards, tmp_path):
    config = run_config(shards, output=str(tmp_path / "runs"), deepspeed="auto")
    dump_config(config, tmp_path / "run.yaml")
    return config


def on(monkeypatch, found: Machine) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: found)


def test_a_dry_run_prints_the_choice_and_its_reason(capsys, monkeypatch, shards, tmp_path):
    with_auto(shards, tmp_path)
    for found, said in (
        (NODE, ["4 processes, ZeRO-2, bf16 (auto: zero2)", "deepspeed: auto chooses zero2", "4 GPUs of 80 GB"]),
        (CPU, ["4 processes, ZeRO-3, fp32 (auto: zero3_cpu)", "since no GPU is used"]),
    ):
        on(monkeypatch, found)
        assert main(["train", "--dry-run", "--config", str(tmp_path / "run.yaml"), "--nproc", "4"]) == 0
        text = capsys.readouterr().out
        assert [part for part in said if part not in text] == []


def test_a_run_keeps_its_choice_and_a_resumed_one_may_choose_another(caplog, monkeypatch, shards, tmp_path):
    caplog.set_level(logging.INFO)
    config = with_auto(shards, tmp_path)
    on(monkeypatch, CPU)
    run = create_run(config, "run.yaml", 1)
    assert json.loads((run / "deepspeed.json").read_text()) == read_deepspeed("zero3_cpu")
    assert load_config(run / "config.yaml").deepspeed == "auto"
    kept = (run / "deepspeed.json").read_text()
    run = tmp_path / "done"
    write_run(run, config)
    (run / "deepspeed.json").write_text(kept)
    caplog.clear()
    reopen_run(run, (), 1)
    assert "auto chooses zero3_cpu" in caplog.text
    assert "another configuration" not in caplog.text
    on(monkeypatch, NODE)
    reopen_run(run, (), 4)
    assert json.loads((run / "deepspeed.json").read_text()) == read_deepspeed("zero2")
    assert "auto chooses zero2" in caplog.text
    assert "another configuration until now; its checkpoints are read with any" in caplog.text
    reopen_run(run, ["deepspeed=zero3"], 4)
    assert json.loads((run / "deepspeed.json").read_text()) == read_deepspeed("zero3")


def test_a_file_of_that_name_is_no_configuration(monkeypatch, shards, tmp_path):
    (tmp_path / "auto").write_text("{}")
    monkeypatch.chdir(tmp_path)
    on(monkeypatch, CPU)
    run = create_run(with_auto(shards, tmp_path), "run.yaml", 1)
    assert load_config(run / "config.yaml").deepspeed == "auto"
    assert json.loads((run / "deepspeed.json").read_text()) == read_deepspeed("zero3_cpu")


def test_the_candidates_are_shipped():
    for name in (*deepspeed_auto.ON_GPUS, deepspeed_auto.ON_CPU):
        assert read_deepspeed(name)
