"""Weights in one file or in shards: read one tensor at a time, and damage is reported by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from univitar_ds.errors import CheckpointError
from univitar_ds.formats.stored_model import Tensors
from univitar_ds.formats.weight_files import open_weights, weight_files, write_weights


def drawn() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": ()}
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return state | {"half": torch.arange(4).bfloat16(), "ids": torch.arange(3)}


def same(one, other) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard_bytes", [None, 70, 1])
def test_written_tensors_are_read_bit_for_bit(tmp_path, safe, shard_bytes):
    state = drawn()
    write_weights(Tensors.of(state), tmp_path, shard_bytes=shard_bytes, safe=safe)
    read = open_weights(tmp_path)
    assert same({name: read[name] for name in state}, state)
    assert {name: (info.shape, info.dtype) for name, info in read.infos.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in state.items()
    }
    assert len(weight_files(tmp_path)) == {None: 1, 70: 3, 1: len(state)}[shard_bytes]


def test_no_shard_is_larger_than_allowed_unless_one_tensor_is(tmp_path):
    write_weights(Tensors.of(drawn()), tmp_path, shard_bytes=70)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        names = [name for name, other in index["weight_map"].items() if other == file]
        assert sum(drawn()[name].nbytes for name in names) <= 70
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in drawn().values())


@pytest.mark.parametrize("first", [{"shard_bytes": 1}, {"safe": False}, {"shard_bytes": 70, "safe": False}])
def test_files_of_the_earlier_format_are_removed(tmp_path, first):
    write_weights(Tensors.of({"old": torch.zeros(3), "older": torch.zeros(3)}), tmp_path, **first)
    (tmp_path / "model-card.safetensors").write_text("another's")
    write_weights(Tensors.of(drawn()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model-card.safetensors"}
    assert same(dict(open_weights(tmp_path)), drawn() | {})


def test_a_saved_parameter_is_read_as_a_tensor(tmp_path):
    state = {"a": torch.nn.Parameter(torch.ones(3))}
    torch.save(state, tmp_path / "pytorch_model.bin")
    read = open_weights(tmp_path)["a"]
    assert not read.requires_grad
    assert read.tolist() == [1, 1, 1]


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    write_weights(Tensors.of(drawn()), tmp_path, shard_bytes=1)
    read = open_weights(tmp_path)
    weight_files(tmp_path)[0].unlink()
    assert torch.equal(read["b"], drawn()["b"])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00006\.safetensors is damaged"):
        read["a"]


def test_an_index_that_names_a_file_outside_of_its_folder_or_a_missing_one_is_refused(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    for name, said in (("../secret.safetensors", "must be in its own folder"), ("gone.safetensors", "lacks gone")):
        (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match=said):
            open_weights(inner)


def test_conversions_keep_names_and_integers():
    tensors = Tensors.of(drawn())
    half = tensors.converted(torch.bfloat16)
    assert half["ids"].dtype == torch.int64
    assert half.infos["ids"].dtype == torch.int64
    assert torch.equal(half["a"], drawn()["a"].bfloat16())
    assert half.nbytes == sum(value.nbytes for value in dict(half).values())
    renamed = tensors.renamed(lambda name: None if name == "b" else f"x.{name}")
    assert list(renamed) == ["x.a", "x.c", "x.d", "x.half", "x.ids"]
    assert torch.equal(renamed["x.a"], drawn()["a"])
    with pytest.raises(KeyError):
        renamed["a"]


@pytest.mark.parametrize("name", ["..", ".", "", "a" * 5000, "a\0b", "inner", "\ud800", "/etc/passwd", "a/../b"])
def test_an_invalid_name_of_a_shard_is_an_error_message(tmp_path, name):
    (tmp_path / "inner").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"must be in its own folder|lacks") as caught:
        open_weights(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"weight_map": 1}', b'{"weight_map": {"a": [1]}}',
                                     b'{"weight_map": {}}', b'{"a":' * 100_000])  # fmt: skip
def test_an_invalid_index_is_an_error_message(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    if content == b'{"weight_map": {}}':
        assert len(open_weights(tmp_path)) == 0
    else:
        with pytest.raises(CheckpointError, match=r"fetch it again"):
            open_weights(tmp_path)


def test_a_name_in_two_shards_is_refused(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"b is in .*one\.safetensors and in .*two\.safetensors"):
        open_weights(tmp_path)
