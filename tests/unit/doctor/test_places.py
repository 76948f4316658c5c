"""Checks of the run file, its sources and the disks, on one rank with real files."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.full import small_disk
from tests.support.peers import save_peer
from tests.support.runs import small_config
from tests.support.s3 import s3_server
from tests.support.shards import write_demo_shards
from tests.support.teachers import image_model
from univitar_ds.cli.main import main
from univitar_ds.config.load import dump_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.doctor import checkpoints, run, run_file, storage
from univitar_ds.doctor.context import Context
from univitar_ds.doctor.findings import FAILED, OK, REMEDIES, SKIPPED, Row
from univitar_ds.doctor.ranks import Ranks
from univitar_ds.errors import ConfigError, DataError, StorageError
from univitar_ds.model.config import PRESETS
from univitar_ds.planning import checks
from univitar_ds.planning.counts.batch import fewest_steps
from univitar_ds.planning.counts.samples import expected_tokens
from univitar_ds.run import create_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    write_demo_shards(folder / "shards", images=16, videos=8, shards=2)
    dump_config(small_config(folder / "shards", folder / "runs"), folder / "run.yaml")
    return folder


def context(folder, *overrides: str, recipe: str = "run.yaml", size: int = 1) -> Context:
    ranks = Ranks(dist.HashStore(), 0, size, 60.0)
    ranks.nodes = ["a"] * size
    return Context(ranks, str(folder / recipe), overrides)


def read(given: Context) -> list[Row]:
    return [*run_file.rows_of(given), *run_file.rows_of_parts(given)]


def found(folder, *overrides: str, **options) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for row in read(context(folder, *overrides, **options)):
        rows.setdefault(row.check, []).append(row)
    return rows


def test_a_good_run_file_has_no_failed_row(folder):
    rows = found(folder, size=2)
    assert {row.state for some in rows.values() for row in some} == {OK}
    assert list(rows) == ["run file", "installation", "lanes", "deepspeed", "sources"]
    assert "data.lanes = 4 fits 2 ranks, 2 for each; it fits 1, 2, 4 ranks" in rows["lanes"][0].found
    assert "4 shards of 1 source fit the stages" in rows["sources"][0].found


@pytest.mark.parametrize(
    ("override", "check", "said", "remedy"),
    [
        ("data.lanes=3", "lanes", "data.lanes is 3 and cannot be shared evenly by 2 ranks", "run 1, 3 ranks"),
        ("deepspeed=zero9", "deepspeed", "no file 'zero9'", "give the path of a JSON"),
        ("objective.teacher.path=nowhere", "teacher", "nowhere is neither a folder", ""),
        ("model.text.tokenizer=nowhere.json", "text tower", "nowhere.json", ""),
        ("model.init_from=nowhere", "model.init_from", "nowhere", ""),
        ("data.sources.0.path=nowhere", "sources", "nowhere: there is no such file or folder", ""),
        ("data.lines=3", "run file", "data.lines", ""),
    ],
)
def test_each_error_has_a_row_with_a_remedy_and_hides_no_other(folder, monkeypatch, override, check, said, remedy):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = found(folder, override, size=2)
    failed = [row for some in rows.values() for row in some if row.state == FAILED]
    assert [row.check for row in failed] == [check]
    assert said in failed[0].found + failed[0].remedy
    assert failed[0].remedy
    assert remedy in failed[0].remedy
    if check != "run file":
        assert rows["run file"][0].state == OK


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("data.lanes", "run file"),
        ("data.lanes.x=3", "run file"),
        ("data.lanes=[", "run file"),
        ("seed=x", "run file"),
        ("model.text.tokenizer=.", "text tower"),
        ("model.init_from=a b", "model.init_from"),
        ("objective.teacher.path=a b", "teacher"),
        ("data.sources.0.path=train-{0..3}", "sources"),
        ("plugins=[a b]", "plugins"),
    ],
)
def test_a_remedy_is_no_part_of_what_was_found_and_says_what_to_do(folder, monkeypatch, override, check):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed = [row for rows in found(folder, override).values() for row in rows if row.state == FAILED]
    assert {row.check for row in failed} == {check}
    for row in failed:
        assert "\n" not in row.found
        assert row.remedy not in row.found
        assert re.match(r"(check|correct|edit|fetch|give|name|pack|restore|run|start|write) ", row.remedy), row


def test_a_check_of_the_run_file_whose_error_has_no_remedy_gives_its_own(folder, monkeypatch):
    names = {
        "check_libraries": "installation", "check_plugins": "plugins", "check_zero_stage": "deepspeed",
        "check_teacher": "teacher", "check_text": "text tower", "open_start": "model.init_from",
        "check_shapes": "model", "check_sources": "sources",
    }  # fmt: skip
    for name in names:
        monkeypatch.setattr(checks, name, lambda *_: _raise(ConfigError("this is wrong")))
    monkeypatch.setattr(run_file, "packs_per_rank", lambda *_: _raise(ConfigError("this is wrong")))
    rows = [row for row in read(context(folder, "deepspeed=zero1")) if row.state == FAILED]
    assert {row.check for row in rows} == {*names.values(), "lanes"}
    assert {row.check: row.remedy for row in rows} == {row.check: REMEDIES[row.check] for row in rows}


DEEP = b"[" * 100_000
"""More levels than a parser of JSON can enter."""
IO_ERROR = "/proc/self/mem"
"""A file whose first byte cannot be read: Input/output error."""


def damage(file: Path, how: bytes | str | float) -> None:
    """Replaces a file by bytes or a link to the path `how`, or keeps the share `how` of it."""
    content = file.read_bytes()
    file.unlink()
    if isinstance(how, str):
        file.symlink_to(how)
    else:
        file.write_bytes(content[: int(how * len(content))] if isinstance(how, float) else how)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher and of a text tower with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    image_model("dinov2").save_pretrained(folder / "teacher")
    save_peer("clip", folder / "text")
    return folder


@pytest.mark.parametrize(
    ("name", "key", "check"),
    [
        ("teacher/model.safetensors", "objective.teacher.path", "teacher"),
        ("teacher/config.json", "objective.teacher.path", "teacher"),
        ("text/model.safetensors", "model.text.path", "text tower"),
        ("text/config.json", "model.text.path", "text tower"),
        ("text/tokenizer.json", "model.text.path", "text tower"),
    ],
)
def test_damaged_models_are_a_row_with_a_remedy_and_no_traceback(folder, models, tmp_path, capfd, name, key, check):
    for number, how in enumerate((0.5, b"", b"\xff" * 4096, DEEP, IO_ERROR)):
        place = tmp_path / str(number)
        shutil.copytree(models, place)
        damage(place / name, how)
        given = f"{key}={place / name.partition('/')[0]}", "model.text.context_length=8"
        (row,) = [row for row in read(context(folder, *given)) if row.state == FAILED]
        assert row.check == check
        assert str(place) in row.found
        assert re.match("fetch it again|name another", row.remedy), row
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_shards_are_a_row_although_their_sizes_are_those_of_the_manifest(folder, tmp_path):
    size = (folder / "shards" / "train-image-000000.tar").stat().st_size
    for number, content in enumerate((os.urandom(size), bytes(size), None)):
        shards = tmp_path / str(number)
        shutil.copytree(folder / "shards", shards)
        shard = shards / "train-image-000000.tar"
        shard.write_bytes(shard.read_bytes()[: size - 1024] + os.urandom(1024) if content is None else content)
        given = context(folder, f"data.sources.0.path={shards}")
        assert {row.state for row in read(given)} == {OK}
        (row,) = storage.CHECK.run(given).rows
        assert (row.check, row.state) == ("storage", FAILED)
        assert "train-image-000000.tar" in row.found
        assert "univitar-ds data verify" in row.remedy
    damage(shards / "manifest.json", DEEP)
    (row,) = [row for row in read(context(folder, f"data.sources.0.path={shards}")) if row.state == FAILED]
    assert (row.check, row.remedy) == ("sources", "pack the folder again: univitar-ds data pack FOLDER OUT")


def test_the_folder_of_a_run_that_cannot_continue_is_a_row(folder, tmp_path, capfd):
    whole = create_run(small_config(folder / "shards", tmp_path), "test", 1)

    def row_of(**changes) -> Row:
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole, run)
        for name, how in changes.items():
            damage(run / name.replace("_", "."), how)
        given = context(run, recipe="")
        given.recipe = str(run)
        run_file.take_run(given)
        rows = [row for row in read(given) if row.state == FAILED or row.check == "run folder"]
        return rows[0]

    assert row_of().state == OK
    for name in ("tokenizer_json", "deepspeed_json"):
        for how in (DEEP, IO_ERROR, b""):
            row = row_of(**{name: how})
            assert (row.check, row.state) == ("run folder", FAILED)
            assert row.remedy
    for how in (IO_ERROR, os.urandom(3000), DEEP):
        assert row_of(config_yaml=how).check == "run file"
    step = whole / CHECKPOINTS / "step-00000002"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text('{"version": 1, "files": {"a": {"bytes": 5, "sha256": "x"}}}')
    assert "step-00000002 is damaged: a has 0 bytes instead of 5" in row_of().found
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_file_that_may_not_be_read_or_whose_name_is_too_long_is_a_row(folder, monkeypatch, capfd):
    for number in (errno.EACCES, errno.EIO):
        monkeypatch.setattr(Path, "is_file", lambda path, number=number: _raise(OSError(number, "", str(path))))
        (row,) = run.run_within_limit(run_file.CHECK, context(folder)).rows
        assert (row.check, row.state) == ("run file", FAILED)
        assert f"run.yaml cannot be read: {os.strerror(number)}" in row.found
        assert row.remedy
    monkeypatch.undo()
    given = context(folder, recipe="x" * 300)
    run_file.take_run(given)
    (row,) = run.run_within_limit(run_file.CHECK, given).rows
    assert (row.state, row.remedy) == (FAILED, "choose a shorter name")
    assert "Traceback" not in capfd.readouterr().err


def _raise(error: Exception):
    raise error


def test_a_full_disk_is_a_row_and_the_command_fails(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CHECKS", (run_file.CHECK, run_file.PARTS_CHECK, checkpoints.CHECK))
    with small_disk(tmp_path / "disk", 1) as disk:
        assert main(["doctor", "--config", str(folder / "run.yaml"), f"output={disk}"]) == 1
    printed = capsys.readouterr().out
    assert f"{disk} cannot be written: No space left on device" in printed
    assert "remedy: free some space there, or name another place" in printed


def test_without_a_run_file_the_row_is_skipped():
    (row,) = run_file.rows_of(Context(Ranks(dist.HashStore(), 0, 1, 1.0)))
    assert row.state == SKIPPED
    assert "--config" in row.found


def test_a_folder_of_the_name_of_a_recipe_is_no_run_without_a_run_file(folder):
    (folder / "demo").mkdir()
    given = context(folder, recipe="demo")
    for recipe in ("demo", str(folder / "demo")):
        given.recipe, given.run = recipe, None
        run_file.take_run(given)
        assert (given.run is None) == (recipe == "demo")


def test_the_folder_of_a_run_is_a_run_file_too(folder):
    given = context(folder, recipe="shards")
    run_file.take_run(given)
    assert (given.run, given.recipe) == (folder / "shards", str(folder / "shards" / "config.yaml"))
    assert given.folder == folder / "shards"


def test_the_sources_are_read_and_a_missing_one_is_an_error(folder):
    given = context(folder)
    read(given)
    values = storage.CHECK.run(given).values
    size = sum(path.stat().st_size for path in (folder / "shards").glob("train*.tar"))
    assert values["mb"] == size / 1e6
    assert values["mb_s"] > 0
    os.rename(given.shards[0].path, folder / "away")
    try:
        with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)"):
            storage.CHECK.run(given)
    finally:
        os.rename(folder / "away", given.shards[0].path)


def test_the_folder_of_checkpoints_is_written_and_no_file_is_left(folder):
    given = context(folder)
    read(given)
    before = sorted(folder.iterdir())
    answer = checkpoints.CHECK.run(given)
    assert sorted(folder.iterdir()) == before
    assert answer.values["mb"] > 1
    (row,) = answer.rows
    assert row.state == OK
    assert re.search(rf"101 checkpoints need [\d.]+ GB, [\d.]+ .B are free in {folder}", row.found)


def test_checkpoints_that_stay_and_the_best_one_need_space_too(folder):
    kept = ("checkpoint.keep=2", "checkpoint.keep_every_steps=4", "evaluation.every_samples=1000")
    given = context(folder, *kept, "stages.0.samples=6000")
    read(given)
    (row,) = checkpoints.CHECK.run(given).rows
    means = expected_tokens(given.config, given.shards)
    steps = sum(fewest_steps(stage, 4, PRESETS["tiny"], means) for stage in given.config.stages)
    assert given.checkpoints == 4 + steps // 4 > 4, "the last two, the best, and the one that is being written"
    assert row.found.startswith(f"{given.checkpoints} checkpoints need")


def test_a_wrong_run_file_is_the_first_row_and_hides_no_check_of_the_machine(folder):
    first, *others = run.CHECKS
    given = context(folder, "data.lines=3")
    (row,) = first.run(given).rows
    assert (row.check, row.state) == ("run file", FAILED)
    assert not run_file.PARTS_CHECK.run(given).rows
    assert run_file.PARTS_CHECK in others


def test_too_little_space_fails_with_what_is_needed(tmp_path):
    row = checkpoints.space(tmp_path, 1e14, count=4)
    assert row.state == FAILED
    assert row.found.startswith("4 checkpoints need 400 TB")
    assert "checkpoint.keep" in row.remedy


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name():
    with pytest.raises(StorageError, match=r"/proc/self.* cannot be written"):
        checkpoints.write_rate(Path("/proc/self"))


def test_sources_and_checkpoints_in_a_store_are_reached_with_the_credentials(folder, monkeypatch):
    with s3_server() as server:
        source = server.upload(folder / "shards", "shards")
        before = server.keys()
        given = context(
            folder,
            f"data.sources.0.path={source}",
            f"data.s3.endpoint_url={server.url}",
            f"checkpoint.folder={source.rpartition('/')[0]}/runs",
        )
        assert {row.state for row in read(given)} == {OK}
        assert storage.CHECK.run(given).values["mb"] > 0.01
        (row,) = checkpoints.CHECK.run(given).rows
        assert row.state == OK
        assert "/runs accepts these credentials; this check writes nothing there" in row.found
        assert server.keys() == before
        with pytest.raises(DataError, match="absent-bucket"):
            checkpoints.in_store("s3://absent-bucket/runs", StorageSettings.of(given.config.data))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        rows = read(context(folder, *given.overrides, "data.s3.region=eu-central-1"))
        failed = [row for row in rows if row.state == FAILED]
        assert [row.check for row in failed] == ["sources"]
        assert "no credentials were found" in failed[0].found
        assert "data.s3.profile" in failed[0].remedy
