"""Features are computed once: for several tasks, after an interruption, and by any number of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import datasets
from tests.support.media import encoded, noise
from univitar_ds.cli.main import main
from univitar_ds.errors import CheckpointError
from univitar_ds.inference import embed_files
from univitar_ds.inference.embed_files import ModelOptions
from univitar_ds.tasks import sources
from univitar_ds.tasks.cached import feature_cache
from univitar_ds.tasks.cached.feature_cache import Vectors, features
from univitar_ds.tasks.models import open_model
from univitar_ds.tasks.sources import DataOptions

COUNT = 12


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "wds_pets"
    for split in ("train", "test"):
        members = []
        for index in range(COUNT):
            seed = index + 50 * (split == "test")
            members += [(f"{index}.png", encoded(noise(28, 42, seed=seed), "PNG")), (f"{index}.cls", str(index % 3))]
        datasets.write_tar(folder / split / "0.tar", members)
    datasets.write(folder, {"classnames.txt": "cat\ndog\nhorse\n"})
    return folder


@pytest.fixture
def packs(monkeypatch) -> list[int]:
    """The number of items of each pack whose features were computed."""
    computed: list[int] = []
    compute = embed_files.compute

    def counted(setup, units, processes, finished):
        yield from compute(setup, units, processes, lambda count: (computed.append(count), finished(count)))

    monkeypatch.setattr(embed_files, "compute", counted)
    return computed


def measured(capsys, task: str, *arguments: str | Path) -> dict:
    assert main(["eval", task, *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def of_test(run: Path, pets: Path, cache: Path) -> Vectors:
    opened = open_model(str(run), ModelOptions(nproc=1, workers=1))
    source = sources.test_source(DataOptions(str(pets)))
    return features(opened, opened.setup(texts=False), source, cache, progress=False)


def test_a_second_task_computes_no_features_and_has_the_same_result(run, pets, tmp_path, capsys, packs):
    given = [run, "--data", pets, "--cache", tmp_path / "cache"]
    first = measured(capsys, "knn", *given)
    assert sum(packs) == 2 * COUNT
    assert measured(capsys, "knn", *given)["figures"] == first["figures"]
    linear = measured(capsys, "linear", *given)
    assert sum(packs) == 2 * COUNT
    shutil.rmtree(tmp_path / "cache" / "features")
    assert measured(capsys, "linear", *given)["figures"] == linear["figures"]
    assert sum(packs) == 4 * COUNT


def test_names_of_classes_are_read_again(run, pets, tmp_path, capsys, packs):
    given = [run, "--data", pets, "--cache", tmp_path / "cache"]
    assert measured(capsys, "zero-shot", *given)["figures"][0]["candidates"] == 3
    datasets.write(pets, {"classnames.txt": "cat\ndog\ndog\n"})
    assert measured(capsys, "zero-shot", *given)["figures"][0]["candidates"] == 2
    datasets.write(pets, {"classnames.txt": "cat\ndog\nhorse\nbird\nfish\n"})  # two of which no item is
    figure = measured(capsys, "zero-shot", *given)["figures"][0]
    assert (figure["candidates"], figure["chance"]) == (5, pytest.approx(0.2))
    assert sum(packs) == COUNT


def test_other_data_weights_and_types_are_computed(run, pets, tmp_path, packs):
    cache = tmp_path / "cache"
    before = of_test(run, pets, cache)
    shard = pets / "test" / "0.tar"
    members = [(f"{index}.png", encoded(noise(28, 42, seed=index), "PNG")) for index in range(COUNT)]
    members = [part for index, one in enumerate(members) for part in (one, (f"{index}.cls", str(index % 3)))]
    datasets.write_tar(shard, members)  # as long, and equal at its beginning but for the pixels
    assert not torch.equal(of_test(run, pets, cache).values, before.values)
    assert sum(packs) == 2 * COUNT
    opened = open_model(str(run), ModelOptions(nproc=1, workers=1, dtype=torch.bfloat16))
    features(opened, opened.setup(texts=False), sources.test_source(DataOptions(str(pets))), cache, progress=False)
    assert sum(packs) == 3 * COUNT
    assert len([one for one in cache.iterdir() if one.is_dir()]) == 3


class Killed(BaseException):
    pass


def kill(run: Path, pets: Path, cache: Path) -> None:
    """Interrupts a call after its first part of 5 items."""
    finish = embed_files.Destination.finish

    def killed(self, number, part, about):
        if number == 1:
            raise Killed
        finish(self, number, part, about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_files.Destination, "finish", killed)
        with pytest.raises(Killed):
            of_test(run, pets, cache)


def test_a_killed_call_continues_with_the_first_unfinished_part(run, pets, tmp_path, monkeypatch, packs):
    monkeypatch.setattr(feature_cache, "PART_ROWS", 5)
    cache = tmp_path / "cache"
    wanted = of_test(run, pets, cache / "whole")
    kill(run, pets, cache / "killed")
    del packs[:]
    found = of_test(run, pets, cache / "killed")
    assert sum(packs) == COUNT - 5
    assert found.keys == wanted.keys
    assert torch.equal(found.values, wanted.values)


@pytest.mark.parametrize(
    ("name", "content"),
    [("features-00000.safetensors", b""), (".features.safetensors.progress/part-00000.json", b"{}")],
)
def test_what_a_killed_call_left_damaged_is_computed_again(
    run, pets, tmp_path, monkeypatch, packs, caplog, name, content
):
    monkeypatch.setattr(feature_cache, "PART_ROWS", 5)
    kill(run, pets, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    file.write_bytes(content)
    del packs[:]
    assert of_test(run, pets, tmp_path / "cache").keys == [f"0/{index}" for index in range(COUNT)]
    assert sum(packs) == COUNT
    assert "are damaged and computed again" in caplog.text


@pytest.mark.parametrize("name", ["features-00000.safetensors", "features.safetensors.index.json", "complete.json"])
def test_a_damaged_entry_is_computed_again_and_reported(run, pets, tmp_path, packs, caplog, name):
    cache = tmp_path / "cache"
    wanted = of_test(run, pets, cache)
    (file,) = cache.glob(f"*/{name}")
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    found = of_test(run, pets, cache)
    assert torch.equal(found.values, wanted.values)
    assert sum(packs) == 2 * COUNT
    assert "are damaged and computed again" in caplog.text


def test_files_of_others_are_not_removed(run, pets, tmp_path, caplog):
    cache = tmp_path / "cache"
    of_test(run, pets, cache)
    (part,) = cache.glob("*/features-00000.safetensors")
    part.write_bytes(b"damaged")
    (part.parent / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(feature_cache.StorageError, match="other files than this program's"):
        of_test(run, pets, cache)
    assert (part.parent / "notes.txt").exists()


def test_the_least_recently_used_entries_are_removed(run, pets, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    of_test(run, pets, cache)
    (first,) = (one for one in cache.iterdir() if one.is_dir())
    (cache / "mine").mkdir()
    monkeypatch.setattr(feature_cache, "KEPT_BYTES", 1)
    opened = open_model(str(run), ModelOptions(nproc=1, workers=1))
    features(opened, opened.setup(texts=True), sources.test_source(DataOptions(str(pets))), cache, progress=False)
    assert not first.exists()
    assert len([one for one in cache.iterdir() if one.is_dir()]) == 2


def test_a_split_that_does_not_exist_is_reported_before_features_are_computed(
    run, pets, tmp_path, capsys, caplog, packs
):
    """Also one of a packed folder, and of a folder that is packed: by the names that the user gave, and once."""
    packed = tmp_path / "packed"
    assert main(["data", "pack", str(pets / "test" / "0.tar"), str(packed)]) == 0
    folders = datasets.class_folders(tmp_path / "folders")
    capsys.readouterr()
    for data, has in ((pets, "test, train"), (packed, "train"), (folders, "train, val")):
        for option in ("--split", "--train-split"):
            given = {"--data": data, "--cache": tmp_path / "c", "--split": has.split(", ")[-1], option: "nope"}
            assert main(["eval", "knn", str(run), *(str(one) for pair in given.items() for one in pair)]) == 2
            said = capsys.readouterr().err
            lines, _ = [one for one in caplog.messages if one.startswith("source ")], caplog.clear()
            assert f"error: {option} nope: {data} has no split of this name; it has {has}: give one of them\n" in said
            assert len(lines) == (data == folders)
    assert packs == []


def test_tars_without_splits_are_not_learned_from_and_scored(run, pets, tmp_path, capsys, packs):
    members = [(f"{name}.{end}", one) for name in "ab" for end, one in (("jpg", datasets.image()), ("cls", name))]
    datasets.write_tar(tmp_path / "t/0.tar", members)
    (tmp_path / "link").symlink_to(tmp_path / "t")
    for train in ((), ("--train-data", str(tmp_path / "link")), ("--train-data", f"{tmp_path}/./t/0.tar")):
        given = ["--data", str(tmp_path / "t"), "--cache", str(tmp_path / "c"), *train]
        assert main(["eval", "knn", str(run), *given]) == 2
        said = capsys.readouterr().err
        assert f"scored on: both are in {tmp_path}/t/0.tar, since tars without a manifest have no splits" in said
    assert main(["eval", "knn", str(run), "--data", str(tmp_path / "none"), "--cache", str(tmp_path / "c")]) == 2
    assert "init SOURCE" not in capsys.readouterr().err
    assert packs == []


def test_splits_of_other_classes_are_reported_before_features_are_computed(run, pets, tmp_path, capsys, packs):
    datasets.write(tmp_path / "birds", {"test/0.tar": (pets / "test" / "0.tar").read_bytes()})
    datasets.write(tmp_path / "birds", {"classnames.txt": "crow\nduck\ngull\n"})
    for task in ("knn", "attentive", "tokens --by knn"):
        name, *options = task.split()
        given = ["--data", tmp_path / "birds", "--cache", tmp_path / "c", "--train-data", pets, *options]
        assert main(["eval", name, str(run), *map(str, given)]) == 2
        assert "has a label of the training split" in capsys.readouterr().err
    assert packs == []


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(run, pets, tmp_path, capsys, monkeypatch):
    """And the same bits: packs follow from the units of work. One thread each, since its number changes sums."""
    monkeypatch.setattr(embed_files, "_UNIT_ITEMS_OF_VECTORS", 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results, files = [], []
    for nproc in ("1", "2"):
        given = ["--data", pets, "--cache", tmp_path / nproc, "--nproc", nproc, "--workers", "1"]
        results.append(measured(capsys, "knn", run, *given)["figures"])
        files.append(sorted(part.read_bytes() for part in (tmp_path / nproc).glob("features/*/*.safetensors")))
    torch.set_num_threads(threads)
    assert results[0] == results[1]
    assert len(files[0]) == 2
    assert files[0] == files[1]


def test_features_that_are_not_finite_are_refused(run, pets, tmp_path, monkeypatch):
    read = feature_cache._read

    def broken(*given):
        found = read(*given)
        if found is not None:
            found.values[1] = torch.nan
        return found

    monkeypatch.setattr(feature_cache, "_read", broken)
    with pytest.raises(CheckpointError, match="not finite in 1 of"):
        of_test(run, pets, tmp_path / "cache")


@pytest.mark.parametrize("damaged", ["index", "no index", "no part", "settings"])
def test_damaged_files_of_an_interrupted_call_are_computed_again(run, pets, tmp_path, damaged):
    first = of_test(run, pets, tmp_path / "cache")
    (entry,) = (path.parent for path in (tmp_path / "cache").rglob("complete.json"))
    (entry / "complete.json").unlink()
    index = entry / "features.safetensors.index.json"
    if damaged == "index":
        index.write_text("{")
    elif damaged == "no index":
        index.unlink()
    elif damaged == "no part":
        (entry / "features-00000.safetensors").unlink()
    else:
        index.unlink()
        (entry / ".features.safetensors.progress").mkdir()
        (entry / ".features.safetensors.progress" / "settings.json").write_text("{")
    again = of_test(run, pets, tmp_path / "cache")
    assert torch.equal(again.values, first.values)
    assert again.keys == first.keys
