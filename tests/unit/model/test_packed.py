"""Which models of transformers run packed."""

from types import SimpleNamespace

import pytest
import torch

from univitar_ds.model.blocks import attention as dispatch
from univitar_ds.model.blocks.attention import Gpu
from univitar_ds.model.packed import can_pack

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "changes", "wanted"),
    [
        (GPU, torch.bfloat16, {}, True),
        (GPU, torch.bfloat16, {"attention_dropout": 0.1}, False),
        (GPU, torch.bfloat16, {"hidden_size": 600}, False),  # heads wider than packed kernels take
        (GPU, torch.float32, {}, False),
        (CPU, torch.bfloat16, {}, False),
        (CPU, torch.float32, {}, False),
    ],
)
def test_a_model_is_packed_where_one_call_computes_the_attention_of_all_items(
    monkeypatch, device, dtype, changes, wanted
):
    monkeypatch.setattr(dispatch, "_gpu", lambda device: Gpu((9, 0), "NVIDIA H100"))
    config = SimpleNamespace(**{"hidden_size": 128, "num_attention_heads": 2, "attention_dropout": 0.0} | changes)
    assert can_pack(config, device, dtype) is wanted
