"""The command line: help that teaches, and users' mistakes answered in a sentence before anything starts."""

from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.shards import write_demo_shards
from univitar_ds.cli import main
from univitar_ds.config.load import dump_config
from univitar_ds.launch import create_run, reopen_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=16, videos=8, shards=2)


@pytest.fixture
def run_file(shards, tmp_path) -> Path:
    dump_config(run_config(shards, output=str(tmp_path / "runs")), tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must end with status 2 and one error, and returns its message."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["data"], ["data", "pack"], ["data", "inspect"], ["data", "scenes"], ["eval"], ["report"],
     ["convert", "export"], ["demo"]],
)  # fmt: skip
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: univitar-ds" in capsys.readouterr().out


def test_a_run_file_with_faults_lists_them(capsys, run_file):
    message = fails(capsys, "train", "--config", run_file, "data.lnes=4", "seed=-1")
    assert "2 faults" in message
    assert "did you mean 'lanes'" in message


def test_ranks_that_do_not_divide_the_lanes_are_refused(capsys, run_file):
    assert "run 1, 2, 4 ranks" in fails(capsys, "train", "--config", run_file, "--nproc", "3")


def test_a_source_that_is_not_there_is_named(capsys, run_file):
    message = fails(capsys, "train", "--config", run_file, "data.sources.0.path=nowhere")
    assert "source nowhere: there is no such file or folder" in message


def test_a_split_that_is_not_there_names_those_that_are(capsys, run_file):
    message = fails(capsys, "train", "--config", run_file, "data.sources.0.split=validation")
    assert "no split 'validation'; it has test, train" in message


def test_a_cut_shard_is_found_before_anything_starts(capsys, run_file, tmp_path):
    folder = write_demo_shards(tmp_path / "cut", images=16, videos=8, shards=1)
    shard = next(folder.glob("train-image-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    message = fails(capsys, "train", "--config", run_file, f"data.sources.0.path={folder}")
    assert shard.name in message
    assert "its manifest says" in message
    assert not (tmp_path / "runs").exists()


def test_a_missing_shard_is_named(capsys, run_file, tmp_path):
    folder = write_demo_shards(tmp_path / "gone", images=16, videos=8, shards=1)
    shard = next(folder.glob("train-image-*.tar"))
    shard.unlink()
    assert shard.name in fails(capsys, "data", "inspect", "--config", run_file, f"data.sources.0.path={folder}")


def test_an_empty_folder_cannot_be_packed(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has nothing to pack" in fails(capsys, "data", "pack", tmp_path / "empty", tmp_path / "out")


def test_a_folder_that_is_no_run_cannot_be_resumed_evaluated_or_exported(capsys, tmp_path):
    assert "so it is no run" in fails(capsys, "train", "--resume", tmp_path)
    assert "neither a run's folder" in fails(capsys, "eval", tmp_path)
    assert "neither a run's folder" in fails(capsys, "convert", "export", tmp_path, tmp_path / "out")


def test_a_run_with_checkpoints_is_not_started_over(capsys, run_file, tmp_path):
    write_run(tmp_path / "runs" / "tried", run_config())
    assert "univitar-ds train --resume" in fails(capsys, "train", "--config", run_file)


def test_a_resumed_run_refuses_what_would_change_its_result(capsys, run_file, tmp_path):
    run = create_run(run_config(output=str(tmp_path / "runs"), **_sources(run_file)), "test", 1)
    message = fails(capsys, "train", "--resume", run, "stages.0.lr=5", "seed=3")
    assert "seed, stages.0.lr would change the result" in message
    assert reopen_run(run, ["data.workers=3", "logging.every_steps=1"], 2) == run
    assert "workers: 3" in (run / "config.yaml").read_text()


def test_two_owners_of_a_key_are_both_named(capsys, run_file, tmp_path):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 7}')
    message = fails(capsys, "train", "--config", run_file, f"deepspeed={tmp_path / 'own.json'}")
    assert "own.json" in message
    assert "run.yaml" in message


def test_inspect_prints_fill_and_tokens(capsys, run_file):
    assert main(["data", "inspect", "--config", str(run_file), "--packs", "3"]) == 0
    printed = capsys.readouterr().out
    for word in ("stage both, image", "stage both, video", "fill", "tokens an item", "left out"):
        assert word in printed


def _sources(run_file: Path) -> dict:
    from univitar_ds.config.load import load_config

    return {"data": load_config(run_file).data.model_dump()}
