"""Exported programs: equal to the model, also for other sizes than the recorded one; errors for invalid input."""

import copy
import dataclasses
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.support.finished import run_config
from tests.unit.model.made import GRIDS, drawn_patches, small_config, small_encoder
from univitar_ds.cli.main import main
from univitar_ds.config.encoder import CONFIG_FILE, EncoderConfig, read_encoder_config
from univitar_ds.convert import program
from univitar_ds.convert.program import export_onnx, export_program, image_program, program_inputs
from univitar_ds.convert.program_check import compare_program
from univitar_ds.errors import CheckpointError, ConfigError, InstallationError
from univitar_ds.formats.stored_model import VISION, JointConfig, StoredModel, Tensors
from univitar_ds.geometry import token_count
from univitar_ds.model.contrastive import ContrastiveModel

HEADS = {"num_attention_heads": 4}
POOL_HEADS = 2
PACKS = {"one token": [[1, 1, 1]], "one item": [[1, 4, 2]], "images and a video": GRIDS, "nine items": [[1, 2, 2]] * 9}
NEAR = 1e-4
"""Maximum difference of ONNX Runtime's results, whose products and functions are another library's."""


def _stored(encoder=None, **config) -> StoredModel:
    encoder = encoder or small_encoder(**HEADS, **config)
    state = {VISION + name: value for name, value in encoder.state_dict().items()}
    return StoredModel("nowhere", "test", encoder.config, Tensors.of(state))


@pytest.fixture(scope="module")
def whole() -> ContrastiveModel:
    text = torch.nn.Linear(8, 8)
    text.width = 8
    config = run_config().model.model_copy(update={"pool_heads": POOL_HEADS})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ContrastiveModel(small_encoder(**HEADS), text, config)
        for parameter in model.parameters():  # weights of 1 and biases of 0 would hide that one is not used
            parameter.data.add_(torch.randn(parameter.shape) * 0.02)
    return model.eval()


def _stored_whole(model: ContrastiveModel) -> StoredModel:
    joint = JointConfig(
        len(model.vision_proj.weight), POOL_HEADS, "sigmoid", {"model_type": "clip_text_model"}, 64, "{}"
    )
    return StoredModel("nowhere", "test", model.vision.config, Tensors.of(model.state_dict()), joint)


def _expected(model: ContrastiveModel, patches, grids) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.vision(patches, grids)
    pooled = model.pool(tokens, [token_count(grid) for grid in grids])
    return tokens, torch.nn.functional.normalize(model.vision_proj(pooled), dim=-1)


def warnings_of(caplog) -> list[str]:
    """What the exporter logged that would reach the screen, on which a user cannot act."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def _terms(config: EncoderConfig, grids) -> int:
    return encoder_terms(config, max(map(token_count, grids))) + 6 * config.hidden_size


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    sizes = export_program(_stored(), folder)
    assert sizes == {name: (folder / name).stat().st_size for name in ("model.pt2", "config.json")}
    assert read_encoder_config(folder) == small_config(**HEADS)
    return folder


@pytest.fixture(scope="module")
def encoder_file(encoder_folder) -> torch.nn.Module:
    return torch.export.load(encoder_folder / "model.pt2").module()


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory, whole) -> torch.nn.Module:
    folder = tmp_path_factory.mktemp("program")
    export_program(_stored_whole(whole), folder)
    return torch.export.load(folder / "model.pt2").module()


@pytest.mark.numeric
@pytest.mark.parametrize("grids", PACKS.values(), ids=PACKS)
def test_the_program_of_an_encoder_equals_it_for_packs_of_any_size(encoder_file, grids):
    patches = drawn_patches(grids)
    tokens = encoder_file(patches, *program_inputs(grids))
    encoder = small_encoder(**HEADS)
    assert_sums_close(tokens, encoder(patches, grids), _terms(encoder.config, grids))


def test_verify_accepts_the_program_of_its_model_and_refuses_that_of_another(encoder_folder):
    assert "same output for one pack, largest difference" in compare_program(_stored(), encoder_folder)
    other = small_encoder(**HEADS)
    with torch.no_grad():
        other.encoder["layers"][-1].mlp.fc2.weight[0, 0] += 1.0
    with pytest.raises(CheckpointError, match=r"tokens of the program differ by up to .* \(limit 0\.0001 of it\)"):
        compare_program(_stored(other), encoder_folder)


@pytest.mark.slow
def test_verify_accepts_the_program_of_a_whole_model_in_half_precision(whole, tmp_path):
    stored = _stored_whole(whole).converted(torch.bfloat16)
    export_program(stored, tmp_path)
    assert compare_program(stored, tmp_path).endswith("(limit 0.062)")


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("grids", PACKS.values(), ids=PACKS)
def test_the_program_of_a_whole_model_gives_tokens_and_embeddings(whole_file, whole, grids):
    patches = drawn_patches(grids)
    found = whole_file(patches, *program_inputs(torch.tensor(grids)))
    for got, wanted, what in zip(found, _expected(whole, patches, grids), ("tokens", "embeddings"), strict=True):
        assert_sums_close(got, wanted, _terms(whole.vision.config, grids), what)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"qk_normalization": False}, {"qkv_bias": True}, {"spatial_merge_size": 2, "patch_embedding_bias": False}],
)
def test_other_architectures_are_recorded_too(changes, tmp_path):
    encoder, grids = small_encoder(**HEADS, **changes), [[1, 4, 2], [2, 2, 2]]
    export_program(_stored(encoder), tmp_path)
    patches = drawn_patches(grids)
    tokens = torch.export.load(tmp_path / "model.pt2").module()(
        patches, *program_inputs(grids, encoder.config.spatial_merge_size)
    )
    assert_sums_close(tokens, encoder(patches, grids), _terms(encoder.config, grids))


def test_a_program_keeps_the_precision_of_its_weights(tmp_path, caplog):
    encoder = small_encoder(**HEADS).bfloat16()
    export_program(_stored(encoder), tmp_path)
    assert warnings_of(caplog) == []
    patches = drawn_patches(GRIDS)
    tokens = torch.export.load(tmp_path / "model.pt2").module()(patches, *program_inputs(GRIDS))
    assert tokens.dtype == torch.bfloat16
    wanted = encoder(patches, GRIDS).float()
    assert torch.nn.functional.cosine_similarity(tokens.float(), wanted).min() > 0.999


def test_a_module_is_copied_and_gives_the_program_of_its_stored_model(whole):
    inputs = (drawn_patches(GRIDS), *program_inputs(GRIDS))
    for module, stored in ((whole, _stored_whole(whole)), (whole.vision, _stored(whole.vision))):
        got, wanted = image_program(module), image_program(stored)
        assert all(map(torch.equal, got(*inputs), wanted(*inputs)))
    before = whole.pool.query.clone()
    image_program(whole).pool.query.data.zero_()
    assert torch.equal(whole.pool.query, before)
    with pytest.raises(TypeError, match="Linear"):
        image_program(torch.nn.Linear(1, 1))


def test_weights_of_another_model_are_refused():
    stored = _stored()
    lacking = dataclasses.replace(stored, tensors=stored.tensors.renamed(lambda name: None if "ls1" in name else name))
    with pytest.raises(CheckpointError, match=r"missing: vision\.encoder\.layers\.0\.ls1"):
        image_program(lacking)
    with pytest.raises(CheckpointError, match="misshapen"):
        image_program(dataclasses.replace(stored, encoder=small_config(**HEADS, hidden_size=128)))


def _run(folder, patches) -> list[torch.Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'univitar_ds[onnx]'")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["grid_thw"]) == GRIDS
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    names = [one.name for one in session.get_outputs()]
    assert names in (["tokens"], ["tokens", "embeddings"])
    return [torch.from_numpy(value) for value in session.run(None, {"pixel_values": patches.numpy()})]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [program.LARGEST_FILE, 0], ids=["one file", "weights apart"])
def test_onnx_runtime_gives_the_tokens_of_an_encoder(limit, tmp_path, monkeypatch, caplog, recwarn):
    pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install 'univitar_ds[onnx]'")
    monkeypatch.setattr(program, "LARGEST_FILE", limit)
    sizes = export_onnx(_stored(), tmp_path, torch.tensor(GRIDS))
    assert warnings_of(caplog) == []
    assert [str(one.message) for one in recwarn] == []
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    weights = sum(value.nbytes for value in small_encoder(**HEADS).state_dict().values())
    assert sizes.get("model.onnx.data", sizes["model.onnx"]) > 0.9 * weights
    assert ("model.onnx.data" in sizes) == (limit == 0)
    patches = drawn_patches(GRIDS)
    (tokens,) = _run(tmp_path, patches)
    assert "same output for one pack" in compare_program(_stored(), tmp_path, GRIDS)
    assert (tokens - small_encoder(**HEADS)(patches, GRIDS)).abs().max() <= NEAR
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == small_config(**HEADS).to_dict()


@pytest.mark.slow
def test_onnx_runtime_gives_tokens_and_embeddings_of_a_whole_model_in_half_precision(whole, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install 'univitar_ds[onnx]'")
    stored = _stored_whole(whole).converted(torch.bfloat16)
    export_onnx(stored, tmp_path, GRIDS)
    patches = drawn_patches(GRIDS)
    rounded = copy.deepcopy(whole).bfloat16().float()
    for got, wanted in zip(_run(tmp_path, patches), _expected(rounded, patches, GRIDS), strict=True):
        assert (got - wanted).abs().max() <= NEAR


@pytest.mark.parametrize(
    ("grids", "words"),
    [([], "no grid"), ([[1, 0, 2]], "grid 1,0,2 .* at least 1"), ([[1, 2]], "grid 1,2 "), ([[1, 3, 2]], "by 2")],
)
def test_impossible_grids_are_refused_also_without_the_extra(grids, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=words):
        export_onnx(_stored(spatial_merge_size=2), tmp_path / "out", grids)
    assert not (tmp_path / "out").exists()


def test_a_grid_is_divisible_by_what_the_model_needs_alone(tmp_path, capsys):
    with pytest.raises(ConfigError) as caught:
        export_onnx(_stored(), tmp_path / "out", [[1, 0, 2]])
    assert "divisible" not in str(caught.value)
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path), "out", "--to", "onnx", "--grid", "1,0,16"])
    assert "--grid: '1,0,16'" in capsys.readouterr().err


def test_without_the_extra_one_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InstallationError, match=r"pip install 'univitar_ds\[onnx\]'"):
        export_onnx(_stored(), tmp_path / "out", GRIDS)
