"""Models and data of tasks on S3, as on a disk, and what is said where they cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support import datasets
from tests.support.media import encoded, noise
from tests.support.s3 import S3Server, faulty, s3_server
from univitar_ds.cli.main import main
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import ConfigError
from univitar_ds.tasks.sources import DataOptions, class_list, probe_sources
from univitar_ds.tasks.sources import test_source as source_of


@dataclass(frozen=True)
class Stored:
    """A store with `data`, a folder in CLIP_benchmark's layout, which is also in `local`."""

    server: S3Server
    local: Path
    data: str

    def options(self, *more: str) -> list[str]:
        return ["--s3-endpoint", self.server.url, "--nproc", "1", *more]

    def of(self, place: str, **options: str) -> DataOptions:
        return DataOptions(place, storage=StorageSettings(endpoint_url=self.server.url), **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    folder = tmp_path_factory.mktemp("data") / "pets"
    for number, split in enumerate(("train", "test")):
        members = []
        for index in range(6):
            members.append((f"{index}.png", encoded(noise(28, 42, seed=index + 10 * number), "PNG")))
            members.append((f"{index}.cls", str(index % 3)))
        datasets.write_tar(folder / split / "0.tar", members)
    datasets.write(folder, {"classnames.txt": "cat\ndog\nhorse\n"})
    with s3_server() as server:
        yield Stored(server, folder, server.upload(folder, "data/pets", "**/*"))


@pytest.mark.slow
def test_a_run_and_a_folder_with_splits_give_the_figures_of_local_ones(run, stored, tmp_path, capsys):
    model = stored.server.upload(run, "runs/tried", "**/*")
    found = []
    for name, place, options in ((run, stored.local, []), (model, stored.data, stored.options())):
        given = ["--cache", tmp_path, "--json", *options]
        assert main(["eval", "knn", *map(str, (name, "--data", place, *given))]) == 0
        found.append(json.loads(capsys.readouterr().out)["figures"])
    assert found[0] == found[1]
    assert found[0][0]["n"] == 6
    assert found[0][0]["candidates"] == 3


def test_the_splits_of_a_folder_are_its_folders_of_tars(stored):
    options = stored.of(stored.data)
    assert source_of(options).path == f"{stored.data}/test"
    assert [source.path for source in probe_sources(options)] == [f"{stored.data}/train", f"{stored.data}/test"]
    assert class_list(options) == ("cat", "dog", "horse")
    with pytest.raises(ConfigError, match=r"--split val: s3:.* it has test, train: give one of them"):
        source_of(replace(options, split="val"))
    tars = f"{stored.data}/test"
    assert source_of(stored.of(tars)).path == tars
    with_captions = stored.server.upload(stored.local / "test", "data/captions/test")
    assert source_of(stored.of(with_captions.removesuffix("/test"))).path == with_captions
    stored.server.upload(stored.local, "data/others/pets", "**/*")  # a folder of folders, and nothing to read itself
    assert source_of(stored.of("s3://shards/data/others")).path == "s3://shards/data/others"


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("RUN", "s3://shards/none", "s3://shards/none: there is no such file or folder; check the path"),
        ("RUN", "s3://none/pets", "s3://none/pets: there is no such bucket; check the address"),
        ("RUN", "s3://", "source s3://: names no bucket; write s3://BUCKET/PREFIX"),
        ("s3://shards/none", "DATA", "s3://shards/none/ has no files of its own; check the address"),
        ("s3://none/run", "DATA", "s3://none/run/: there is no such bucket; check the address"),
        ("s3://", "DATA", "s3:// names no bucket; write s3://BUCKET/FOLDER"),
        ("DATA", "DATA", "s3://shards/data/pets holds no model in a known format"),
    ],
)
def test_what_is_not_there_is_named(run, stored, tmp_path, capsys, model, data, said):
    places = {"RUN": str(run), "DATA": stored.data}
    given = [places.get(model, model), "--data", places.get(data, data), "--cache", str(tmp_path)]
    assert main(["eval", "zero-shot", *given, *stored.options()]) == 2
    assert said in capsys.readouterr().err


def test_access_that_is_refused_is_reported_with_the_options_that_change_it(run, stored, tmp_path, capsys, monkeypatch):
    given = ["eval", "zero-shot", str(run), "--data", stored.data, "--cache", str(tmp_path)]
    with faulty(stored.server, lambda request: "status 403") as proxy:
        assert main([*given, "--s3-endpoint", proxy.url]) == 2
    assert "access was refused (the store answered 403" in (said := capsys.readouterr().err)
    assert "--s3-profile" in said
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert main([*given, *stored.options("--s3-region", "eu-west-1")]) == 2
    assert "no credentials were found; set data.s3.profile or --s3-profile" in capsys.readouterr().err
    assert main([*given, "--templates", "s3://shards/templates.txt"]) == 2
    assert "--templates s3://shards/templates.txt: is read from a local disk only" in capsys.readouterr().err
