"""`univitar.json`: it is read as it was written, and every damage is one error message."""

import dataclasses
import json

import pytest

from tests.unit.formats.made import ENCODER, JOINT, tiny_stored
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.sidecar import SIDECAR, read_sidecar, write_sidecar


def test_both_configurations_are_read_as_they_were_written(tmp_path):
    write_sidecar(tiny_stored(), tmp_path)
    assert read_sidecar(tmp_path) == (ENCODER, JOINT)
    content = json.loads((tmp_path / SIDECAR).read_text())
    assert content == {"format": 1, "encoder": ENCODER.to_dict(), "joint": dataclasses.asdict(JOINT)}
    write_sidecar(tiny_stored().encoder_only(), tmp_path)
    assert read_sidecar(tmp_path) == (ENCODER, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this program reads 1"),
        ({"encoder": None}, "has no encoder object"),
        ({"encoder": {"hidden_size": -3}}, "hidden_size must be above 0"),
        ({"joint": [1]}, "has joint list"),
        ({"joint": {**dataclasses.asdict(JOINT), "embed_dim": "16"}}, r"has joint\.embed_dim '16', it must be int"),
        ({"joint": {**dataclasses.asdict(JOINT), "pool_heads": True}}, r"has joint\.pool_heads 'True'"),
        ({"joint": {**dataclasses.asdict(JOINT), "context_length": 0}}, "context_length 0, it must be at least 1"),
        ({"joint": {**dataclasses.asdict(JOINT), "objective": "mean"}}, "'mean', it must be sigmoid or softmax"),
    ],
)
def test_a_damaged_file_is_one_error_message(tmp_path, change, message):
    write_sidecar(tiny_stored(), tmp_path)
    content = json.loads((tmp_path / SIDECAR).read_text())
    (tmp_path / SIDECAR).write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=message):
        read_sidecar(tmp_path)
