"""Conversions: the same tensors in another format, and no file of the user is lost."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def test_too_little_space_is_reported_before_anything_is_written(run, tmp_path, monkeypatch):
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
def test_tensors_that_a_format_cannot_hold_are_refused(run, tmp_path, to, options, said):
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


def encoder_of(folder: Path, change) -> Path:
    """A released encoder in `folder`, with changed tensors."""
    source = open_stored(golden(CASES[0]).folder)
    folder.mkdir()
    (folder / "config.json").write_bytes((golden(CASES[0]).folder / "config.json").read_bytes())
    state = {name.removeprefix("vision."): value for name, value in source.tensors.items()}
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def halved(state) -> None:
    for name in list(state)[::2]:
        state[name] = state[name].bfloat16()


def broken(state) -> None:
    state["encoder.layers.1.mlp.fc2.weight"][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])


@pytest.mark.parametrize("to", ["release", "hf", "universal", "dcp", "megatron"])
@pytest.mark.parametrize(("change", "said"), [(halved, "one pack, largest"), (broken, "values that are not finite")])
def test_models_of_several_types_and_values_that_are_not_finite_stay_as_they_are(tmp_path, to, change, said):
    source = encoder_of(tmp_path / "source", change)
    assert said in convert(source, tmp_path / "out", to, Options(verify=True))
    found, wanted = open_stored(tmp_path / "out").tensors, open_stored(source).tensors
    for name, value in wanted.items():
        kept = value.float() if to == "universal" else value
        assert found[name].dtype == kept.dtype
        assert torch.equal(found[name].view(torch.uint8), kept.view(torch.uint8)), name


def test_whole_numbers_in_place_of_weights_are_named(tmp_path):
    def change(state):
        state["encoder.layers.0.ls1"] = state["encoder.layers.0.ls1"].to(torch.int64)

    source = encoder_of(tmp_path / "source", change)
    with pytest.raises(CheckpointError, match=r"misshapen: vision\.encoder\.layers\.0\.ls1 is \(\d+,\) int64"):
        convert(source, tmp_path / "out", "release")


def test_the_space_for_the_moments_is_asked_for(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(conversion, "check_space", lambda out, nbytes: asked.append(nbytes))
    for to in ("universal", "hf"):
        convert(run, tmp_path / to, to)
        size = sum(path.stat().st_size for path in (tmp_path / to).rglob("*") if path.suffix in (".pt", ".safetensors"))
        assert size - 1_000_000 < asked[-1] - conversion._SLACK_BYTES < size


def test_any_size_of_shards_gives_whole_files(run, tmp_path):
    wanted = open_stored(run).encoder_only().tensors
    for size in (1, 10**18):
        convert(run, tmp_path / str(size), "release", Options(shard_bytes=size))
        found = open_stored(tmp_path / str(size)).tensors
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(list((tmp_path / "1").glob("model-*-of-*.safetensors"))) == len(wanted)
    assert not list((tmp_path / str(10**18)).glob("*.index.json"))


def test_moments_that_the_source_lacks_are_reported_to_be_zeros(run, tmp_path):
    said = convert(golden(CASES[0]).folder, tmp_path / "out", "universal")
    assert "moments in it are zeros" in said
    assert "zeros" not in convert(run, tmp_path / "run", "release")


def test_a_configuration_that_is_not_needed_is_refused(run, tmp_path):
    for source in (run, golden(CASES[0]).folder):
        with pytest.raises(CheckpointError, match="leave --config-from out"):
            convert(source, tmp_path / "out", "release", config_folder=run)
