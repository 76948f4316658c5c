"""A run's folder: what a start may replace, what it refuses, and relative paths after the start."""

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.finished import run_config, write_run
from tests.support.shards import write_demo_shards
from univitar_ds.config.keys.places import PATHS, anchored
from univitar_ds.config.load import changed_result, check_config, dump_config, load_config
from univitar_ds.config.run_folder import RUN_ENTRIES
from univitar_ds.errors import ConfigError, StorageError, UserError
from univitar_ds.owned import MARK, foreign
from univitar_ds.run import create_run, describe_run, reopen_run
from univitar_ds.run_lock import RunLock, RunLocked


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=16, videos=8, shards=1)


@pytest.fixture
def config(shards, tmp_path):
    return run_config(shards, output=str(tmp_path))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files; a lock is no content of a user's."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def unfinished(run: Path) -> None:
    """What a start that was killed before its first checkpoint has left, by each name that a run writes."""
    names = [
        "metrics.jsonl", "events.jsonl", "samples-rank0.jsonl", "samples-rank12.jsonl", "skipped-rank0.jsonl",
        "summary.json", "tb/events.out.tfevents.1754.host.12.0", "checkpoints/.tmp-step-00000002/rank00000.safetensors",
        "checkpoints/.tmp-step-00000002/.tmpAbC123", "checkpoints/.tmp-latest", ".config.yaml.partial",
        ".export.partial/model.safetensors",
    ]  # fmt: skip
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("left")


MADE = [MARK, "config.yaml", "deepspeed.json", "model.json", "tokenizer.json"]


def test_an_unfinished_run_s_own_files_are_replaced(config):
    run = create_run(config, "test", 1)
    assert sorted(contents(run)) == MADE
    unfinished(run)
    assert create_run(config, "test", 1) == run
    assert sorted(contents(run)) == MADE
    assert foreign(run, RUN_ENTRIES).startswith(".lock-"), "all other names are in the list"


FOREIGN = ["photo.jpg", "notes.txt", "tb/notes.txt", "tb/sub/events.out.tfevents.1", "checkpoints/notes.txt",
           "checkpoints/.tmp-mine/a.txt", "checkpoints/.tmp-step-00000002/notes.txt", "samples-rank0.jsonl/photo.jpg",
           "samples-rankings.jsonl", ".config.yaml", "metrics.jsonl.bak"]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("marked", [True, False], ids=["ours", "no run"])
def test_a_folder_with_a_file_that_no_run_writes_is_refused_and_not_changed(config, tmp_path, name, marked):
    run = tmp_path / config.name
    if marked:
        create_run(config, "test", 1)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_bytes(b"years of work")
    before = contents(run)
    with pytest.raises(ConfigError) as refused:
        create_run(config, "test", 1)
    (found,) = re.findall(f"{run} holds (.*), which no run", str(refused.value))
    assert name.startswith(found)
    assert "choose another name=... or output=..., or move it elsewhere" in str(refused.value)
    assert contents(run) == before
    assert marked or not list(run.glob(".lock-*")), "nothing is written to it either"


def test_names_alone_do_not_make_a_folder_a_run(config, tmp_path):
    """The files of another project that calls them alike."""
    run = tmp_path / config.name
    run.mkdir()
    for name in ("config.yaml", "tokenizer.json", "summary.json"):
        (run / name).write_text("model: mine")
    before = contents(run)
    with pytest.raises(ConfigError, match=r"holds config\.yaml, which no run has written there"):
        create_run(config, "test", 1)
    assert contents(run) == before


def test_a_run_file_written_by_hand_in_the_run_s_folder_is_not_replaced(config, tmp_path):
    run = tmp_path / config.name
    run.mkdir()
    (run / "config.yaml").write_text("# mine\n" + yaml.safe_dump(config.model_dump(mode="json")))
    before = contents(run)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        create_run(config, str(run / "config.yaml"), 1)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["export/model.safetensors", "evaluation.json"])
def test_results_whose_checkpoints_were_removed_are_kept(config, name):
    run = create_run(config, "test", 1)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("the result")
    with pytest.raises(ConfigError, match="holds the results of an earlier run"):
        create_run(config, "test", 1)
    assert (run / name).read_text() == "the result"


@pytest.mark.parametrize("entry", ["run", "tb", "config.yaml", "checkpoints"])
def test_nothing_is_removed_through_a_link(config, tmp_path, entry):
    run = create_run(config, "test", 1)
    unfinished(run)
    real = tmp_path / "elsewhere"
    place = run if entry == "run" else run / entry
    place.rename(real)
    place.symlink_to(real)
    before = contents(real) if real.is_dir() else real.read_bytes()
    with pytest.raises(ConfigError, match="link" if entry == "run" else f"holds {entry}, which no run has written"):
        create_run(config, "test", 1)
    assert (contents(real) if real.is_dir() else real.read_bytes()) == before
    assert place.is_symlink()


def test_an_empty_folder_or_a_link_to_one_is_taken(config, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / config.name).symlink_to(tmp_path / "scratch")
    create_run(config, "test", 1)
    assert sorted(contents(tmp_path / "scratch")) == MADE


def test_runs_of_an_earlier_version_have_no_mark_and_are_started_over_and_resumed(config, tmp_path):
    run = create_run(config, "test", 1)
    (run / MARK).unlink()
    unfinished(run)
    create_run(config, "test", 1)
    assert sorted(contents(run)) == MADE
    shutil.rmtree(run)
    write_run(run, config)
    (run / "deepspeed.json").write_text("{}")
    assert reopen_run(run, [], 1) == run
    assert (run / MARK).is_file()


def test_a_folder_in_use_is_refused_before_any_other_error(config, tmp_path):
    run = tmp_path / config.name
    write_run(run, config)
    before = contents(run)
    with RunLock(run) as lock:
        lock.take()
        with pytest.raises(RunLocked, match=rf"in use by process {os.getpid()} on host"):
            create_run(config, "test", 1)
        with pytest.raises(RunLocked, match=rf"in use by process {os.getpid()} on host"):
            reopen_run(run, ["seed=4"], 1)
    assert contents(run) == before


def test_a_run_that_another_start_made_in_the_meantime_is_not_changed(config, tmp_path):
    """Both saw no folder; this one is the slower."""
    run = tmp_path / config.name

    class Slow(RunLock):
        def take(self):
            create_run(config, "test", 1)
            (run / "checkpoints" / "step-00000002").mkdir(parents=True)
            (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
            super().take()

    with Slow(run) as lock, pytest.raises(ConfigError, match=f"{config.name} holds the checkpoints of an earlier run"):
        create_run(config, "test", 1, lock)
    assert (run / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_a_job_that_torchrun_has_started_again_continues_what_it_saved(config, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with RunLock(tmp_path / config.name) as lock:
        run = create_run(config, "test", 1, lock)
        (run / "checkpoints" / "step-00000002").mkdir(parents=True)
        (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        before = contents(run)
        with RunLock(run) as second:
            assert create_run(config, "test", 1, second) == run
            assert contents(run) == before
            with pytest.raises(UserError, match="taken over by another launch"):
                lock.check()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(ConfigError, match="holds the checkpoints of an earlier run"):
        create_run(config, "test", 1)


def test_a_dry_run_beside_an_earlier_run_reports_errors_of_the_run_file_too(config, tmp_path):
    (tmp_path / config.name / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / config.name / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^[^\n]*holds the checkpoints of an earlier run[^\n]*$"):
        describe_run(config, "test", 1)
    missing = run_config(tmp_path / "nowhere", output=str(tmp_path))
    with pytest.raises(ConfigError) as error:
        describe_run(missing, "test", 1)
    title, used, *others = str(error.value).splitlines()
    assert title == f"{1 + len(others)} errors:"
    assert used.startswith(f"  - {tmp_path / config.name} holds the checkpoints of an earlier run; ")
    assert all(one.startswith("  - ") and "nowhere" in one for one in others)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"output": "a/b/" + "n" * 300},
            StorageError,
            r"a/b/n{57}\.\.\./tried .*File name too long; choose a shorter name",
        ),
        ({"output": "file"}, StorageError, "file/tried.*: Not a directory"),
        ({"output": ".", "name": "file"}, ConfigError, "file is a file; choose another name"),
        ({"output": "/proc"}, StorageError, "/proc/tried"),
        ({"output": "/sys/kernel"}, StorageError, "cannot be written: (Operation not|Permission|Read-only)"),
    ],
    ids=["long", "below a file", "a file", "no disk", "no right"],
)
def test_a_folder_that_cannot_be_written_is_an_error_message(shards, tmp_path, monkeypatch, changes, error, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(error, match=said):
        create_run(run_config(shards, **changes), "test", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_relative_paths_refer_to_the_folder_of_the_start(shards, tmp_path, monkeypatch):
    home = tmp_path / "start"
    home.mkdir()
    (home / "data").symlink_to(shards)
    monkeypatch.chdir(home)
    run = create_run(run_config("data", output="runs"), "test", 1).absolute()
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    assert reopen_run(moved, ["logging.every_steps=3"], 1) == moved
    stored = load_config(moved / "config.yaml")
    assert stored.data.sources[0].path == str(home / "data")
    assert stored.evaluation.sources[0].path == str(home / "data")
    (tmp_path / "other").symlink_to(shards)
    reopen_run(moved, ["data.sources.0.path=other"], 1)
    assert load_config(moved / "config.yaml").data.sources[0].path == str(tmp_path / "other")


def test_every_path_of_a_run_file_becomes_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text("{}")
    source = {"path": "s", "class_names": "names.txt", "table": {"images": "i"}}
    base = run_config().model_dump(mode="json")
    base |= {"output": "o", "deepspeed": "my.json", "evaluation": {"sources": [source]}}
    base["data"] |= {"sources": [source, {"path": "s3://bucket/x"}], "cache": {"folder": "c"}}
    base["model"] |= {"init_from": "enc"}
    base["model"]["text"] |= {"tokenizer": "t.json", "path": "text"}
    base["objective"]["teacher"] = {"path": "facebook/dinov2-base", "cache": "f"}
    config = anchored(check_config(base, "the test"))
    here = f"{tmp_path}/"
    assert config.output == here + "o"
    assert config.deepspeed == here + "my.json"
    assert [one.path for one in config.data.sources] == [here + "s", "s3://bucket/x"]
    assert config.evaluation.sources[0].class_names == here + "names.txt"
    assert config.data.cache.folder == here + "c"
    assert config.model.text.tokenizer == here + "t.json"
    assert (config.model.text.path, config.model.init_from) == ("text", "enc"), "there is none"
    assert config.objective.teacher.path == "facebook/dinov2-base"
    assert config.objective.teacher.cache == here + "f"
    assert config.data.sources[0].table.images == config.evaluation.sources[0].table.images == here + "i"
    assert len(PATHS) == 14
    assert anchored(config) == config


def test_a_path_that_was_stored_relative_is_no_other_result(tmp_path, monkeypatch):
    """Checkpoints of earlier versions hold relative paths, and config.yaml has absolute ones by now."""
    base = run_config().model_dump(mode="json")

    def with_teacher(path: str):
        return check_config(base | {"objective": {"teacher": {"path": path}}}, "the test")

    assert changed_result(with_teacher("models/dino"), with_teacher("/home/me/models/dino")) == []
    assert changed_result(with_teacher("/home/me/models/dino"), with_teacher("./models/dino")) == []
    for other in ("/home/me/models/siglip", "other/dino", "/mymodels/dino"):
        assert changed_result(with_teacher("models/dino"), with_teacher(other)) == ["objective.teacher.path"]


def test_a_stored_run_file_reads_back_as_it_was(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PRICE", "no")
    (tmp_path / "cash$PRICE").mkdir()
    changed = config.model_copy(update={"output": str(tmp_path / "cash$PRICE")})
    dump_config(changed, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == changed
