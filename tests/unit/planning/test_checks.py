"""Errors of a run are found before anything is written, and independent ones are reported together."""

import json
from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.shards import write_demo_shards
from tests.unit.drafting import made
from univitar_ds.errors import ConfigError, DataError, Faults, StorageError, UserError
from univitar_ds.planning.checks import check_lengths, check_run, existing_parent
from univitar_ds.run import create_run
from univitar_ds.training.engine import engine


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=12, videos=6, shards=1)


def test_independent_errors_are_reported_together_and_nothing_is_written(tmp_path):
    config = run_config(
        output=str(tmp_path / "runs"),
        deepspeed="zero9",
        data={"sources": [{"path": "nowhere"}, {"path": "no_place"}], "workers": 0},
        evaluation={"sources": [{"path": "elsewhere"}]},
        objective={"teacher": {"path": str(tmp_path)}},
    )
    with pytest.raises(ConfigError) as error:
        create_run(config, "test", 1)
    message = str(error.value)
    assert message.startswith("4 errors:")
    assert message.count("errors:") == 1
    for said in ("no file 'zero9'", "source nowhere", "source no_place", "evaluation.sources: source elsewhere"):
        assert said in message
    assert f"objective.teacher.path {tmp_path}" in message
    assert list(tmp_path.iterdir()) == []


def test_a_single_error_keeps_its_type():
    with pytest.raises(DataError, match="source nowhere"):
        check_run(run_config(evaluation={"sources": []}), "test", 1)


def test_the_disk_of_the_optimizer_is_checked_before_a_run(shards, monkeypatch):
    def check_disk(config):
        raise ConfigError(f"no folder {config['zero_optimization']['offload_optimizer']['nvme_path']}")

    monkeypatch.setattr(engine, "check_disk", check_disk)
    config = run_config(shards, deepspeed="zero3_nvme")
    with pytest.raises(ConfigError, match=r"no folder \$UNIVITAR_DS_NVME"):
        check_run(config, "test", 1)


def test_all_missing_sources_of_a_list_are_named(shards):
    sources = [{"path": "nowhere"}, {"path": str(shards)}, {"path": "elsewhere"}]
    with pytest.raises(DataError, match=r"source nowhere: .*; source elsewhere: ") as error:
        check_run(run_config(shards, data={"sources": sources}), "test", 1)
    assert str(shards) not in str(error.value)


def test_a_source_to_pack_without_its_split_is_named_once(shards, tmp_path):
    photos = made.sidecars(tmp_path / "photos", 2)
    config = run_config(shards, evaluation={"sources": [{"path": str(photos), "split": "test"}]})
    with pytest.raises(DataError, match=r"^evaluation.sources.0: source .*photos: has no split 'test'; it has train;"):
        check_run(config, "test", 1)


@pytest.mark.parametrize("content", [{}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": {"stage": "3"}}])
def test_a_zero_stage_without_checkpoints_is_refused_before_the_folder_is_made(shards, tmp_path, content):
    (tmp_path / "mine.json").write_text(json.dumps(content))
    config = run_config(shards, deepspeed=str(tmp_path / "mine.json"), output=str(tmp_path / "runs"))
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage is .* in .*mine\.json; .* choose one"):
        create_run(config, "test", 1)
    assert not (tmp_path / "runs").exists()


def test_the_checked_inputs_are_returned(shards):
    found = check_run(run_config(shards), "test", 2)
    assert found.resolved["gradient_accumulation_steps"] == 2
    assert {shard.modality for shard in found.shards} == {"image", "video"}
    assert len(found.evaluation) > 0
    assert (found.start, found.teacher, found.joint) == (None, None, None)


def test_the_length_of_a_name_is_checked_before_any_folder_is_made(tmp_path):
    check_lengths(tmp_path / "a" / ("n" * 200))
    with pytest.raises(OSError, match="too long"):
        check_lengths(tmp_path / "a" / ("é" * 200) / "run")
    assert existing_parent(tmp_path / "a" / ("n" * 300)) == tmp_path
    with pytest.raises(StorageError, match="choose a shorter name"):
        create_run(run_config(output=str(tmp_path / "a" / ("é" * 200))), "test", 1)
    assert list(tmp_path.iterdir()) == []


def test_other_exceptions_are_raised_at_once():
    faults = Faults()
    with pytest.raises(ZeroDivisionError):
        faults.of(lambda: 1 // 0)
    assert faults.of(lambda: 7) == 7
    faults.raise_all()


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ({"encoder": "0.3b"}, {}, r"another encoder .*hidden_size .*Set model\.encoder=null"),
        ({"encoder": "0.3b"}, {"objective": {"kind": "classification"}}, "another encoder"),
        ({"pool_heads": 7}, {}, "pool_heads 7 does not divide the encoder's width 192"),
        ({"init_part": "model", "embed_dim": 32}, {}, r"embed_dim is 32, that of model\.init_from"),
    ],
)
def test_a_start_of_another_shape_is_refused_before_the_folder_is_made(shards, tmp_path, model, changes, said):
    write_run(tmp_path / "start", run_config())
    model = {**model, "init_from": str(tmp_path / "start")}
    config = run_config(shards, output=str(tmp_path / "runs"), model=model, **changes)
    with pytest.raises(UserError, match=said):
        create_run(config, "test", 1)
    assert not (tmp_path / "runs").exists()


def test_heads_that_do_not_fit_are_refused_without_a_start_too(shards, tmp_path):
    config = run_config(shards, output=str(tmp_path / "runs"), model={"pool_heads": 7})
    with pytest.raises(ConfigError, match="pool_heads 7"):
        create_run(config, "test", 1)
    assert not (tmp_path / "runs").exists()
