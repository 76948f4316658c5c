"""The exported encoder: the release's layout, the trained weights, and no file of others is lost."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.finished import run_config, write_run
from tests.support.paths import ROOT
from univitar_ds import Preprocessor, UniViTAR
from univitar_ds.config.schema import RunConfig
from univitar_ds.convert import export
from univitar_ds.convert.export import export_run
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.run import with_size_rule
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.model.config import PRESETS
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.owned import MARK


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ContrastiveModel]:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    return folder, write_run(folder, run_config())


def _stage(**changes):
    values = run_config().stages[0].model_dump()
    return RunConfig.model_validate({**run_config().model_dump(), "stages": [{**values, **changes}]}).stages[0]


def test_the_public_interface_opens_the_export_as_the_trained_encoder(
    trained: tuple[Path, ContrastiveModel], tmp_path: Path
):
    run, model = trained
    assert export_run(run, tmp_path / "export") == tmp_path / "export"
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        MARK, f"{MARK}-files", "README.md", "config.json", "model", "model.safetensors"
    ]  # fmt: skip
    encoder = UniViTAR.from_pretrained(tmp_path / "export")
    wanted = model.vision.state_dict()
    assert encoder.state_dict().keys() == wanted.keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    values, grids = Preprocessor.from_pretrained(tmp_path / "export")([Image.new("RGB", (300, 200), "teal")])
    assert grids.tolist() == [list(run_config().stages[0].image.rule().grid(200, 300))]
    with torch.no_grad():
        assert torch.equal(encoder(values, grids), model.vision(values, grids))


def test_the_config_has_the_fields_of_the_release_and_the_last_stage_s_rule(
    trained: tuple[Path, ContrastiveModel], tmp_path: Path
):
    export_run(trained[0] / "checkpoints" / "step-00000007", tmp_path / "export")
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (values["min_tokens"], values["max_tokens"], values["resize_factor"]) == (4, 36, 1)
    golden = ROOT / "tests" / "golden" / "merge1" / "config.json"
    assert set(json.loads(golden.read_text())) - {"use_flash_attn"} <= set(values)


def test_each_size_rule_becomes_its_words_in_the_release():
    tiny = PRESETS["tiny"]
    native = with_size_rule(tiny, _stage(image={"min_tokens": 16, "max_tokens": 100, "divisor_px": 28}))
    assert (native.resolution_mode, native.resize_factor, native.min_tokens, native.max_tokens) == (
        "native",
        2,
        16,
        100,
    )
    fixed = with_size_rule(tiny, _stage(image={"kind": "fixed", "size_px": 112}))
    assert fixed.resolution.grid(50, 400) == (1, 8, 8)
    videos = with_size_rule(tiny, _stage(video_ratio=1.0))
    assert (videos.min_tokens, videos.max_tokens) == (8, 64)
    import dataclasses

    merged = dataclasses.replace(tiny, spatial_merge_size=2, relarge_ratio=2.0)
    assert (
        with_size_rule(merged, _stage(image={"min_tokens": 4, "max_tokens": 64, "divisor_px": 56})).resize_factor == 2
    )
    assert (
        with_size_rule(merged, _stage(image={"min_tokens": 4, "max_tokens": 64, "divisor_px": 56})).relarge_ratio == 1
    )
    with pytest.raises(CheckpointError, match="multiples of 28 px"):
        with_size_rule(merged, _stage(image={"min_tokens": 4, "max_tokens": 64, "divisor_px": 14}))


def test_an_earlier_export_is_replaced_and_a_foreign_folder_is_not_touched(
    trained: tuple[Path, ContrastiveModel], tmp_path: Path
):
    run, model = trained
    out = export_run(run, tmp_path / "export")
    save_file({"old": torch.zeros(1)}, out / "model.safetensors")
    export_run(run, out)
    assert load_file(out / "model.safetensors").keys() == model.vision.state_dict().keys()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    (out / "thesis.txt").write_text("mine")
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        export_run(run, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="is a file"):
        export_run(run, out / "config.json")


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["out", ".out.partial", ".out.earlier"])
@pytest.mark.parametrize("names", [["config.json", "model.safetensors"], ["thesis.txt"], ["config.json", "a/b.jpg"]])
def test_an_encoder_or_a_folder_of_the_user_is_refused_with_any_names_of_files(
    trained: tuple[Path, ContrastiveModel], tmp_path: Path, place: str, names: list[str]
):
    for name in names:
        (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).write_text(f"mine: {name}")
    before = _content(tmp_path)
    with pytest.raises(CheckpointError, match="name another folder"):
        export_run(trained[0], tmp_path / "out")
    assert _content(tmp_path) == before


def test_nothing_is_replaced_through_a_link(trained: tuple[Path, ContrastiveModel], tmp_path: Path):
    export_run(trained[0], tmp_path / "kept")
    before = _content(tmp_path / "kept")
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="name the folder itself"):
        export_run(trained[0], tmp_path / "out")
    (tmp_path / "kept" / "model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "kept" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, which no conversion wrote"):
        export_run(trained[0], tmp_path / "kept")
    assert (tmp_path / "elsewhere").read_bytes() == before["model.safetensors"]


def test_an_export_of_an_earlier_version_in_its_run_is_replaced(tmp_path: Path):
    run = tmp_path / "run"
    write_run(run, run_config())
    export_run(run, run / "export")
    (run / "export" / MARK).unlink()
    os.rename(run / "export", run / ".export.partial")  # a kill left it
    export_run(run, run / "export")
    (run / "export" / MARK).unlink()
    export_run(run, run / "export")
    assert not (run / ".export.partial").exists()
    assert not (run / ".export.earlier").exists()


def test_the_exported_files_have_the_rights_of_any_new_file(trained: tuple[Path, ContrastiveModel], tmp_path: Path):
    before = os.umask(0o027)
    try:
        out = export_run(trained[0], tmp_path / "export")
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in out.rglob("*") if path.is_file()} == {oct(0o640)}


def test_a_failing_export_does_not_change_the_earlier_one(
    trained: tuple[Path, ContrastiveModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, _ = trained
    out = export_run(run, tmp_path / "export")
    before = _content(out)
    write = export.write

    def damaging(model: StoredModel, folder: Path, to: str) -> None:
        write(model, folder, to)
        state = load_file(folder / "model.safetensors")
        state["embeddings.patch_embedding.weight"] *= 1.001
        save_file(state, folder / "model.safetensors")

    monkeypatch.setattr(export, "write", damaging)
    with pytest.raises(CheckpointError, match="check the disk and repeat"):
        export_run(run, out)
    assert _content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
