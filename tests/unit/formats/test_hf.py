"""Folders for transformers are written and read without changes, and errors in one are named."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.support.stored_models import CONTEXT, TOKENIZER, make_model
from univitar_ds import UniViTAR
from univitar_ds.errors import CheckpointError
from univitar_ds.formats import hf
from univitar_ds.formats.stored_model import OptimizerState, StoredModel, Tensors
from univitar_ds.tokenization import encode


def assert_same(got: StoredModel, wanted: StoredModel) -> None:
    assert (got.encoder, got.joint) == (wanted.encoder, wanted.joint)
    assert set(got.tensors) == set(wanted.tensors)
    for name, value in wanted.tensors.items():
        assert got.tensors.infos[name].dtype == value.dtype, name
        assert torch.equal(got.tensors[name], value), name


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("objective", ["sigmoid", "softmax"])
def test_two_towers_come_back_bit_for_bit(tmp_path, family, objective):
    stored = make_model(family, objective, qkv_bias=True, relarge_ratio=1.5, image_mean=(0.5, 0.4, 0.3)).stored
    hf.write(stored, tmp_path / "new" / "folder")
    back = hf.read(tmp_path / "new" / "folder")
    assert_same(back, stored)
    assert (back.format, back.path, back.optimizer) == ("hf", tmp_path / "new" / "folder", None)


@pytest.mark.parametrize("shard_bytes", [None, 40_000])
def test_an_encoder_alone_is_a_folder_of_the_release(tmp_path, shard_bytes):
    made = make_model(resolution_mode="56")
    hf.write(made.stored.encoder_only(), tmp_path, shard_bytes)
    assert_same(hf.read(tmp_path), made.stored.encoder_only())
    encoder = UniViTAR.from_pretrained(tmp_path)
    assert encoder.config == made.stored.encoder
    wanted = made.net.vision.state_dict()
    assert encoder.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.state_dict().items())
    assert {"tokenizer.json", "processing_univitar.py"}.isdisjoint(names_in(tmp_path))


def test_shards_have_at_most_the_given_size_and_an_index(tmp_path):
    stored = make_model().stored.converted(torch.bfloat16)
    hf.write(stored, tmp_path, shard_bytes=50_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    for shard in shards:
        state = load_file(shard)
        assert len(state) == 1 or sum(value.nbytes for value in state.values()) <= 50_000
    assert_same(hf.read(tmp_path), stored)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_only_training_uses_is_left_out(tmp_path):
    stored = make_model(teacher_width=16).stored
    assert any(name.startswith("distill.") for name in stored.tensors)
    moments = Tensors.of({"logit_scale": torch.ones(1)})
    hf.write(StoredModel(**{**vars(stored), "optimizer": OptimizerState(1, moments, moments, [])}), tmp_path)
    assert not any("distill" in name or "exp_avg" in name for name in load_file(tmp_path / "model.safetensors"))
    assert hf.read(tmp_path).optimizer is None
    assert not list(tmp_path.glob("*optim*"))


def test_reading_executes_no_code_of_the_folder(tmp_path):
    stored = make_model().stored
    hf.write(stored, tmp_path)
    for path in tmp_path.glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('executed')\n")
    assert_same(hf.read(tmp_path), stored)
    assert not (tmp_path / "ran").exists()
    assert not any(str(getattr(module, "__file__", "")).startswith(str(tmp_path)) for module in sys.modules.values())


def test_the_configuration_file_differs_with_the_code_and_the_version(tmp_path, monkeypatch):
    stored = make_model().stored

    def written(name: str) -> str:
        hf.write(stored, tmp_path / name)
        return (tmp_path / name / "configuration_univitar.py").read_text()

    code = tmp_path / "code"
    code.mkdir()
    for path in hf.CODE.glob("*.py"):
        (code / path.name).write_bytes(path.read_bytes())
    first = written("first")
    monkeypatch.setattr(hf, "CODE", code)
    assert written("same") == first
    with (code / "modeling_univitar.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    second = written("changed")
    monkeypatch.setattr(hf, "FORMAT_VERSION", 2)
    assert len({first, second, written("newer")}) == 3


def test_the_tokenizer_file_adds_begin_and_end(tmp_path):
    hf.write(make_model().stored, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids, lengths = encode(TOKENIZER, ["a red square"], CONTEXT)
    assert tokenizer.encode("a red square").ids == ids[0, : lengths[0]].tolist()


def test_a_tokenizer_that_was_changed_in_the_folder_is_the_one_that_is_read(tmp_path):
    hf.write(make_model().stored, tmp_path)
    changed = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    changed["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    assert hf.read(tmp_path).joint.tokenizer == json.dumps(changed)
    (tmp_path / "tokenizer.source.json").unlink()
    assert hf.read(tmp_path).joint.tokenizer == json.dumps(changed)


def test_a_tokenizer_keeps_its_truncation_its_format_and_its_line_ends(tmp_path):
    made = make_model()
    own = Tokenizer.from_str(TOKENIZER.to_str())
    own.enable_truncation(5)
    own.enable_padding(length=9)
    text = own.to_str(pretty=True).replace("\n", "\r\n")
    joint = StoredModel(**{**vars(made.stored), "joint": type(made.stored.joint)(
        **{**vars(made.stored.joint), "tokenizer": text})})  # fmt: skip
    hf.write(joint, tmp_path)
    assert hf.read(tmp_path).joint.tokenizer == text
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a red square " * 9).ids) > 9


def test_folders_are_recognised_by_their_configuration(tmp_path):
    stored = make_model().stored
    hf.write(stored, tmp_path / "both")
    hf.write(stored.encoder_only(), tmp_path / "alone")
    made = make_model()
    made.net.vision.save_pretrained(tmp_path / "release")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    found = {name: hf.recognises(tmp_path / name) for name in ("both", "alone", "release", "broken", "absent")}
    assert found == {"both": True, "alone": True, "release": False, "broken": False, "absent": False}
    assert not hf.recognises(tmp_path / "both" / "config.json")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"objective": None, "pool_heads": None}, r"lacks objective, pool_heads"),
        ({"vision_config": None}, "lacks vision_config"),
        ({"text_config": []}, "text_config"),
        ({"context_length": 0}, "context_length 0; it must be a whole number above 0"),
        ({"projection_dim": True}, "projection_dim True"),
        ({"objective": "hinge"}, "objective 'hinge'"),
        ({"objective": "softmax"}, "objective 'softmax' and model_type 'univitar_siglip'"),
        ({"text_config": {"model_type": "bert"}}, "'bert'; supported are clip_text_model and siglip_text_model"),
        ({"model_type": "clip"}, "model_type 'clip'; supported are univitar_vision, univitar, univitar_siglip"),
        ({"model_type": ["clip"]}, "model_type"),
        ({"format_version": 2}, "format_version 2, known is 1; update"),
        ({"vision_config": {"hidden_size": 30}}, "hidden_size 30 is not divisible"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, changes, complaint):
    hf.write(make_model().stored, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(CheckpointError, match=complaint):
        hf.read(tmp_path)


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    hf.write(make_model().stored, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer\.json that the tokenizers library"):
        hf.read(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        hf.read(tmp_path)


def test_missing_and_foreign_weights_are_named(tmp_path):
    hf.write(make_model().stored, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith(("pool.query", "text_model."))}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks weights: pool\.query, text_model\.\*;"):
        hf.read(tmp_path)
    save_file({**state, "lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weights that UniViTAR lacks: lm_head\.weight"):
        hf.read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        hf.read(tmp_path)


def test_no_file_is_written_for_a_model_that_the_format_cannot_hold(tmp_path):
    stored = make_model().stored
    joint = vars(stored.joint)

    def changed(**fields):
        return StoredModel(**{**vars(stored), "joint": type(stored.joint)(**{**joint, **fields})})

    other = Tensors.of({**dict(stored.tensors), "decoder.weight": torch.zeros(1)})
    wrong = {
        "model_type 'bert'": changed(text={"model_type": "bert"}),
        "end-of-text": changed(tokenizer=Tokenizer.from_str(TOKENIZER.to_str().replace("[EOS]", "[END]")).to_str()),
        "is not a tokenizer": changed(tokenizer="not JSON"),
        r"decoder\.weight has no place": StoredModel(**{**vars(stored), "tensors": other}),
        "no weights of an encoder": StoredModel(**{**vars(stored), "tensors": Tensors.of({}), "joint": None}),
    }
    for complaint, model in wrong.items():
        with pytest.raises(CheckpointError, match=complaint):
            hf.write(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
