"""Checks of the run file, its sources and the disks, on one rank with real files."""

import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.runs import small_config
from tests.support.s3 import s3_server
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import dump_config
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.doctor import checkpoints, run, run_file, storage
from univitar_ds.doctor.context import Context
from univitar_ds.doctor.findings import FAILED, OK, SKIPPED, Row
from univitar_ds.doctor.ranks import Ranks
from univitar_ds.errors import DataError, StorageError
from univitar_ds.model.config import PRESETS
from univitar_ds.planning.counts.batch import fewest_steps
from univitar_ds.planning.counts.samples import expected_tokens


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


def test_without_a_run_file_the_row_is_skipped():
    (row,) = run_file.rows_of(Context(Ranks(dist.HashStore(), 0, 1, 1.0)))
    assert row.state == SKIPPED
    assert "--config" in row.found


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
