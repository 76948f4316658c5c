"""Runs as stored models: the trained weights, also if the folder of the run was moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.support.finished import run_config, write_run
from univitar_ds import UniViTAR
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.errors import CheckpointError, PluginError, UserError
from univitar_ds.formats import elastic
from univitar_ds.formats import run as run_format
from univitar_ds.formats.checkpoint_dir import sha256
from univitar_ds.formats.recognise import open_stored, recognised
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.from_stored import build_encoder, build_model, check_complete
from univitar_ds.planning.checks import check_plugins
from univitar_ds.training.checkpoint import atomic_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ContrastiveModel]:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    return folder, write_run(folder, run_config())


def test_a_run_is_the_model_that_was_trained(trained):
    run, model = trained
    stored = open_stored(run)
    assert stored.format == recognised(run) == "run"
    assert stored.path == run / "checkpoints" / "step-00000007"
    check_complete(stored)
    built, wanted = build_model(stored), model.state_dict()
    assert built.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in built.state_dict().items())
    ids, lengths = torch.tensor([[1, 9, 12, 2]]), torch.tensor([4])
    with torch.no_grad():
        assert torch.equal(built.encode_text(ids, lengths), model.encode_text(ids, lengths))
    assert torch.equal(
        build_encoder(stored).state_dict()["encoder.layers.0.attn.qkv.weight"],
        wanted["vision.encoder.layers.0.attn.qkv.weight"],
    )


def test_building_does_not_change_the_global_random_state(trained):
    stored = open_stored(trained[0])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_model(stored)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_joint_configuration_is_that_of_the_run(trained):
    run, model = trained
    joint = open_stored(run).joint
    config = run_config()
    assert (joint.embed_dim, joint.pool_heads, joint.objective, joint.context_length) == (
        config.model.embed_dim,
        config.model.pool_heads,
        config.objective.kind,
        config.model.text.context_length,
    )
    assert joint.text == model.description()["text"]
    assert joint.tokenizer == (run / "tokenizer.json").read_text()


def changed(run: Path, copy: Path, change, name: str = "state.json") -> Path:
    """Copies a run and changes the content of a JSON file of its checkpoint."""
    shutil.copytree(run, copy)
    checkpoint = copy / "checkpoints" / "step-00000007"
    content = json.loads((checkpoint / name).read_text())
    change(content)
    atomic_dir.write_json(checkpoint / name, content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
    atomic_dir.write_json(checkpoint / "manifest.json", manifest)
    return copy


def test_the_description_in_the_checkpoint_overrides_the_presets(trained, tmp_path):
    def describe(state):
        encoder = {**trained[1].vision.config.to_dict(), "rope_theta": 777.0}
        state["run"]["model"] = {"encoder": encoder, "text": {"model_type": "other"}}

    stored = open_stored(changed(trained[0], tmp_path / "moved", describe))
    assert stored.encoder.rope_theta == 777.0
    with pytest.raises(CheckpointError, match="the text model is of type 'other'"):
        check_complete(stored)


def test_the_state_of_the_optimizer_belongs_to_the_trained_parameters(trained, tmp_path):
    assert open_stored(trained[0]).optimizer is None  # this run has no groups

    def add_groups(state):
        settings = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}
        state["optimizer"]["groups"] = [{**settings, "weight_decay": decay} for decay in (0.2, 0.0)]

    optimizer = open_stored(changed(trained[0], tmp_path / "grouped", add_groups)).optimizer
    shapes = {name: tuple(parameter.shape) for name, parameter in trained[1].named_parameters()}
    assert optimizer.step == 7
    assert [group["weight_decay"] for group in optimizer.groups] == [0.2, 0.0]
    decayed, plain = ({*group["params"]} for group in optimizer.groups)
    assert decayed == {name for name, shape in shapes.items() if len(shape) > 1}
    assert plain == shapes.keys() - decayed
    for moment in (optimizer.exp_avg, optimizer.exp_avg_sq):
        assert {name: info.shape for name, info in moment.infos.items()} == shapes
        assert not moment["pool.query"].any()

    config = tmp_path / "grouped" / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"optimizer": {"kind": "muon"}}))
    assert open_stored(tmp_path / "grouped").optimizer is None  # no format has another state than AdamW's


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run's folder"):
        run_format.read(tmp_path)
    with pytest.raises(CheckpointError, match="no model in a known format"):
        open_stored(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder, an s3:// address nor a hub name"):
        open_stored(tmp_path / "gone")


def test_an_average_that_the_run_does_not_keep_is_refused(trained):
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        open_stored(trained[0], "averaged")


def test_damage_is_found_before_a_tensor_is_read(trained, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(trained[0], run)
    path = run / "checkpoints" / "step-00000007" / "rank00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank00000\.safetensors has a different sha256"):
        open_stored(run)


@pytest.mark.parametrize("name", ["../../other/checkpoints/step-00000007", "/", ".", "", "step-00000007/..", "\xff"])
def test_the_name_of_the_newest_checkpoint_does_not_leave_its_folder(trained, tmp_path, name):
    run = shutil.copytree(trained[0], tmp_path / "run")
    shutil.copytree(trained[0], tmp_path / "other")
    (run / "checkpoints" / "latest").write_bytes(name.encode("latin-1"))
    assert open_stored(run).path == run / "checkpoints" / "step-00000007"


def test_the_best_checkpoint_is_opened_by_the_file_that_names_it(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    best = run / "checkpoints" / "best"
    shutil.copytree(run / "checkpoints" / "step-00000007", run / "checkpoints" / "step-00000003")
    best.write_text("step-00000003\n")
    assert open_stored(run).path.name == "step-00000007"
    assert open_stored(best).path == run / "checkpoints" / "step-00000003"
    assert recognised(best) == "run"
    assert run_format.find_checkpoint(best) == (run, run / "checkpoints" / "step-00000003")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("step-00000005", "step-00000005, which is not there"),
        ("../../other/checkpoints/step-00000007", "no checkpoint"),
        ("", "no checkpoint"),
        ("\xff" * 100_000, "no checkpoint"),
    ],
    ids=["gone", "elsewhere", "empty", "long"],
)
def test_a_file_of_the_best_checkpoint_that_names_none_is_an_error_message(trained, tmp_path, name, said):
    run = shutil.copytree(trained[0], tmp_path / "run")
    shutil.copytree(trained[0], tmp_path / "other")
    (run / "checkpoints" / "best").write_bytes(name.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"best names {said}; name another checkpoint of .*checkpoints"):
        open_stored(run / "checkpoints" / "best")


def test_files_are_closed_when_much_of_them_was_read(trained, monkeypatch):
    opened = []
    monkeypatch.setattr(elastic, "safe_open", lambda *arguments: opened.append(arguments) or safe_open(*arguments))
    stored = open_stored(trained[0])
    for name in stored.tensors:
        stored.tensors[name]
    assert len(opened) == 1
    monkeypatch.setattr(elastic, "_MAPPED", 1_000_000)
    for name in stored.tensors:
        stored.tensors[name]
    read = sum(info.nbytes for info in stored.tensors.infos.values())
    assert 5 < len(opened) <= 2 + read / 1_000_000


@pytest.mark.parametrize("change", [
    lambda state: state.update(optimizer="none"),
    lambda state: state["optimizer"].update(groups=[{"lr": 1}]),
    lambda state: state.update(format=2, world_size="4"),
    lambda state: state.update(format=2, world_size=10**30),
    lambda state: state.update(format=6),
    lambda state: state.update(run=[]),
    lambda state: state["run"].update(model={"encoder": [], "text": 7}),
])  # fmt: skip
def test_another_content_of_a_checkpoint_is_an_error_message(trained, tmp_path, change):
    run = changed(trained[0], tmp_path / "run", change)
    with pytest.raises(UserError):
        open_stored(run)


@pytest.mark.parametrize("entry", [7, {"shape": [1], "kinds": {}}, {"shape": [1], "kinds": {}, "parts": [["a", 0, 1]]}])
def test_another_content_of_an_index_is_an_error_message(trained, tmp_path, entry):
    run = changed(trained[0], tmp_path / "run", lambda index: index["pieces"].update(logit_scale=entry), "index.json")
    with pytest.raises(CheckpointError, match=r"content is not a checkpoint's .*"):
        open_stored(run)


@pytest.mark.parametrize("begun", [False, True], ids=["no folder of checkpoints", "none is complete"])
def test_a_run_without_a_checkpoint_is_a_run(tmp_path, begun):
    write_run(tmp_path / "run", run_config())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    if begun:
        (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"run.* no (complete )?checkpoint"):
        open_stored(tmp_path / "run")


def test_the_folder_of_a_run_is_no_encoder_s(tmp_path):
    write_run(tmp_path / "run", run_config())
    with pytest.raises(CheckpointError, match=r"folder of a run.*name .*run/export"):
        UniViTAR.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(("kind", "name"), [("program", "model.pt2"), ("onnx", "model.onnx")])
def test_programs_are_written_only(tmp_path, kind, name):
    (tmp_path / "config.json").write_text(json.dumps(EncoderConfig().to_dict()))
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}, which --to {kind} has written"):
        open_stored(tmp_path)


def test_reading_a_run_imports_none_of_its_plugins(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()", encoding="utf-8")
    config = run_config(plugins=[str(plugin)], objective={"kind": "mine"})
    write_run(tmp_path / "run", config)
    stored = open_stored(tmp_path / "run")
    assert stored.joint.objective == "sigmoid"
    assert not (tmp_path / "ran").exists()
    with pytest.raises(PluginError, match="no plugin registers it"):
        check_plugins(config)
    assert (tmp_path / "ran").exists()  # so that this test would see an import
