"""A run that starts from another model, on two ranks: from a folder, a store or the hub, and resumed without the
model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.finished import run_config, write_run
from tests.support.s3 import s3_server
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import load_config
from univitar_ds.convert.conversion import convert
from univitar_ds.formats import recognise
from univitar_ds.formats.recognise import open_stored
from univitar_ds.run import create_run
from univitar_ds.training.assembly import build_training
from univitar_ds.training.distributed.process_group import start_world

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("data") / "shards", images=24, videos=8, shards=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory, shards) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "source"
    write_run(folder, run_config(shards))
    return folder


def new_run(shards, output, model, **changes):
    config = run_config(shards, output=str(output), model=model, **changes)
    return create_run(config, "the test", 2)


def first_weights(run):
    """The initial weights of a new run on this rank, by parameter."""
    engine, _ = build_training(load_config(run / "config.yaml"), run, start_world())
    found = {
        piece.name: (piece.start, piece.tensors["fp32"].clone())
        for piece in engine.pieces()
        if "fp32" in piece.tensors and piece.length
    }
    engine.close()
    return found


def assert_begins_as(run, wanted, prefix=""):
    names = set()
    for found in run_distributed(first_weights, 2, run):
        for name, (start, values) in found.items():
            if name.startswith(prefix):
                names.add(name)
                assert torch.equal(values, wanted[name].reshape(-1)[start : start + len(values)]), name
    return names


def test_the_whole_model_starts_with_the_last_weights_of_the_other_run(shards, source, tmp_path):
    run = new_run(shards, tmp_path, {"init_from": str(source), "init_part": "model"})
    stored = open_stored(source)
    assert assert_begins_as(run, stored.tensors) == set(stored.tensors)
    assert (run / "tokenizer.json").read_text() == stored.joint.tokenizer
    assert load_config(run / "config.yaml").model.embed_dim == 16
    assert json.loads((run / "model.json").read_text())["text"] == stored.joint.text
    assert not (run / "start").exists()


def test_only_the_encoder_is_taken_by_default(shards, source, tmp_path):
    text = {"hidden_size": 48, "layers": 1, "heads": 2, "intermediate_size": 64, "vocab_size": 300}
    run = new_run(shards, tmp_path, {"init_from": str(source), "embed_dim": 24, "text": text})
    names = assert_begins_as(run, open_stored(source).tensors, "vision.")
    assert names == {name for name in open_stored(source).tensors if name.startswith("vision.")}


def test_weights_in_a_store_are_copied_into_the_run(shards, source, tmp_path):
    convert(source, tmp_path / "hf", "hf")
    with s3_server() as server:
        address = server.upload(tmp_path / "hf", "models/tried")
        data = {"sources": [{"path": str(shards)}], "workers": 0, "s3": {"endpoint_url": server.url}}
        run = new_run(shards, tmp_path, {"init_from": address, "init_part": "model"}, data=data)
    stored = open_stored(source)
    assert assert_begins_as(run, stored.tensors) == set(stored.tensors)  # although the store has ended


def test_weights_of_the_hub_are_copied_into_the_run(shards, source, tmp_path, monkeypatch):
    convert(source, tmp_path / "release", "release")
    asked = []

    def fetched(name):
        asked.append(name)
        return tmp_path / "release"

    monkeypatch.setattr(recognise, "from_hub", fetched)
    run = new_run(shards, tmp_path, {"init_from": "somebody/univitar"})
    assert asked == ["somebody/univitar"]
    shutil.rmtree(tmp_path / "release")
    assert assert_begins_as(run, open_stored(source).tensors, "vision.")
