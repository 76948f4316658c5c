"""Conversions: the same tensors in another format, and nothing of the user's lost."""

import os
from pathlib import Path

import pytest
import torch

from tests.support.finished import run_config, write_run
from tests.support.golden import CASES, golden
from univitar_ds import UniViTAR
from univitar_ds.convert import conversion
from univitar_ds.convert.conversion import Options, convert
from univitar_ds.errors import CheckpointError, StorageError
from univitar_ds.formats.recognise import open_stored


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    write_run(folder, run_config())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_the_released_encoders_are_the_same_after_a_conversion(case, tmp_path):
    said = convert(golden(case).folder, tmp_path / "out", "release", Options(verify=True, shard_bytes=100_000))
    assert "verified" in said
    wanted = UniViTAR.from_pretrained(golden(case).folder)
    found = UniViTAR.from_pretrained(tmp_path / "out")
    assert found.config == wanted.config
    assert all(torch.equal(found.state_dict()[name], value) for name, value in wanted.state_dict().items())


def test_the_source_stays_and_the_type_is_the_one_asked_for(run, tmp_path):
    before = files(run)
    convert(run, tmp_path / "out", "release", Options(dtype=torch.bfloat16, verify=True))
    assert files(run) == before
    source, half = open_stored(run).tensors, open_stored(tmp_path / "out").tensors
    assert {info.dtype for info in half.infos.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], source[name].bfloat16()) for name in half)


def test_an_earlier_result_is_replaced_with_force_only(run, tmp_path):
    out = tmp_path / "out"
    convert(run, out, "release", Options(shard_bytes=100_000))
    before = files(out)
    with pytest.raises(CheckpointError, match="--force"):
        convert(run, out, "release")
    assert files(out) == before
    convert(run, out, "release", Options(replace=True))
    assert "model.safetensors" in files(out)
    assert not any("-of-" in name for name in files(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        convert(run, out, "release", Options(replace=True))


def test_too_little_space_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    free = os.statvfs_result((4096, 4096, 10, 10, 10, 10, 10, 10, 0, 255))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free.f_bavail * 4096})())
    with pytest.raises(StorageError, match=r"needs 0\.1 GB and .* has 0\.0 GB free"):
        convert(run, tmp_path / "out", "release")
    assert not any(tmp_path.iterdir())


def test_a_failing_conversion_leaves_nothing(run, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise CheckpointError("a fault")

    monkeypatch.setattr(conversion, "write", failing)
    with pytest.raises(CheckpointError, match="a fault"):
        convert(run, tmp_path / "out", "release")
    assert not any(tmp_path.iterdir())


def test_a_damaged_result_is_found_by_verify(run, tmp_path, monkeypatch):
    write = conversion.write

    def damaging(model, folder, to, options):
        tensors = dict(model.tensors)
        tensors["vision.encoder.layers.0.attn.qkv.weight"] *= 1.001
        write(type(model)(**{**vars(model), "tensors": type(model.tensors).of(tensors)}), folder, to, options)

    monkeypatch.setattr(conversion, "write", damaging)
    with pytest.raises(CheckpointError, match=r"the tokens of .* differ by up to"):
        convert(run, tmp_path / "out", "release", Options(verify=True))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "options", "said"), [
    ("onyx", Options(), "'onyx' is no format"),
    ("release", Options(part="model"), "an encoder alone"),
])  # fmt: skip
def test_what_a_format_cannot_hold_is_refused(run, tmp_path, to, options, said):
    with pytest.raises(CheckpointError, match=said):
        convert(run, tmp_path / "out", to, options)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    folder = tmp_path / "encoder"
    encoder = UniViTAR.from_pretrained(golden(CASES[0]).folder)
    encoder.save_pretrained(folder)
    config = (folder / "config.json").read_text()
    layers = encoder.config.num_hidden_layers
    (folder / "config.json").write_text(
        config.replace(f'"num_hidden_layers": {layers}', f'"num_hidden_layers": {layers + 1}')
    )
    with pytest.raises(CheckpointError, match=rf"missing: encoder\.layers\.{layers}|missing: vision"):
        convert(folder, tmp_path / "out", "release")


def test_the_result_may_not_be_its_source(run):
    for out in (run / "checkpoints" / "step-00000007", run, run.parent):
        with pytest.raises(CheckpointError, match="the source or a folder above"):
            convert(run, out, "release")
