"""Reading and writing encoders: round trips bit for bit, and damage reported by name."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.golden import CASES, golden
from tests.unit.model.made import small_encoder
from univitar_ds import UniViTAR
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.weight_files import open_weights
from univitar_ds.model.weights import load_into, save_encoder

QKV = "encoder.layers.0.attn.qkv.weight"


@pytest.fixture
def stored(tmp_path):
    save_encoder(tmp_path, small_encoder())
    return tmp_path


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case", CASES)
def test_released_weights_survive_reading_and_writing_bit_for_bit(case, safe, tmp_path):
    released = torch.load(golden(case).folder / "pytorch_model.bin", weights_only=True)
    model = UniViTAR.from_pretrained(golden(case).folder)
    save_encoder(tmp_path, model, safe=safe)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors" if safe else "pytorch_model.bin"
    }  # fmt: skip
    assert same(dict(open_weights(tmp_path)), released)
    again = UniViTAR.from_pretrained(tmp_path)
    assert same(again.state_dict(), released)
    assert again.config == model.config


def test_stored_precision_is_kept_and_copying_keeps_the_models(tmp_path):
    small_encoder(seed=1).bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in UniViTAR.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    model = small_encoder(seed=2)
    load_into(model, tmp_path)
    assert model.embeddings["patch_embedding"].weight.dtype == torch.float32
    assert torch.equal(model.state_dict()[QKV].bfloat16(), dict(open_weights(tmp_path))[QKV])


def test_a_loaded_encoder_is_in_evaluation_mode_and_can_be_trained(stored):
    model = UniViTAR.from_pretrained(stored)
    assert not model.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


def test_missing_unexpected_and_misshapen_keys_are_named_together_and_nothing_is_loaded(stored):
    def damage(state):
        del state["encoder.layers.1.ls2"]
        state["head.weight"] = torch.zeros(3)
        state[QKV] = state[QKV][:5].clone()
        state["encoder.layers.0.ls1"] = torch.zeros(64, dtype=torch.int64)

    rewrite(stored, damage)
    model = small_encoder(seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_into(model, stored)
    message = str(error.value)
    assert "missing: encoder.layers.1.ls2" in message
    assert "unexpected: head.weight" in message
    assert f"{QKV} is (5, 64) instead of (192, 64)" in message
    assert "encoder.layers.0.ls1 is (64,) int64 instead of (64,)" in message
    assert same(model.state_dict(), before)


def test_a_long_list_of_keys_is_cut_and_counted(stored):
    rewrite(stored, lambda state: [state.pop(name) for name in list(state)[:11]])
    with pytest.raises(CheckpointError, match="and 3 more"):
        UniViTAR.from_pretrained(stored)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_shards_are_joined(kind, tmp_path):
    model = small_encoder()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(state)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    places = {name: f"{stem}-{1 + index % 2:05}-of-00002.{kind}" for index, name in enumerate(names)}
    for place in set(places.values()):
        part = {name: state[name] for name in names if places[name] == place}
        save_file(part, tmp_path / place) if kind == "safetensors" else torch.save(part, tmp_path / place)
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(UniViTAR.from_pretrained(tmp_path).state_dict(), model.state_dict())
    (tmp_path / places[names[0]]).unlink()
    with pytest.raises(CheckpointError, match=places[names[0]]):
        UniViTAR.from_pretrained(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {"a": 1}, {"a": "../elsewhere.safetensors"}])
def test_an_index_that_cannot_be_is_refused(weight_map, stored):
    (stored / "model.safetensors").unlink()
    (stored / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        UniViTAR.from_pretrained(stored)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_a_cut_file_is_named(name, keep, tmp_path):
    save_encoder(tmp_path, small_encoder(), safe=name == "model.safetensors")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        UniViTAR.from_pretrained(tmp_path)


class Opened:
    """What an attacker's pickle would run."""

    ran = False

    def __reduce__(self):
        return (setattr, (Opened, "ran", True))


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))])
def test_a_pickle_with_more_than_tensors_is_refused_and_never_run(write, stored):
    (stored / "model.safetensors").unlink()
    write({"a": Opened()}, stored / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="it names setattr, which could run code") as caught:
        UniViTAR.from_pretrained(stored)
    assert "weights_only" not in str(caught.value)
    assert not Opened.ran


@pytest.mark.parametrize("content", [b"", b"root:x:0:0:root", b"\x80\x02.", b"0", b"a", b"((((", b"PK\x03\x04"])
def test_a_file_of_any_content_is_one_sentence(content, stored):
    (stored / "model.safetensors").unlink()
    (stored / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        UniViTAR.from_pretrained(stored)


def test_a_training_checkpoint_in_place_of_weights_is_refused(stored):
    (stored / "model.safetensors").unlink()
    torch.save({"step": 3, "model": {}}, stored / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no tensors: step, model"):
        UniViTAR.from_pretrained(stored)


def test_a_folder_without_weights_is_named(stored):
    (stored / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        UniViTAR.from_pretrained(stored)


def test_saving_again_in_the_other_format_leaves_one_copy(stored):
    newer = small_encoder(seed=5)
    save_encoder(stored, newer, safe=False)
    assert same(UniViTAR.from_pretrained(stored).state_dict(), newer.state_dict())
