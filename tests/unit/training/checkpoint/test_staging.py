import torch
from safetensors.torch import load, save

from univitar_ds.training.checkpoint.staging import FILE, Staging
from univitar_ds.training.distributed.process_group import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
TENSORS = {
    "b/fp32": torch.arange(7.0),
    "a/frozen": torch.arange(5, dtype=torch.bfloat16),
    "a/exp_avg": torch.arange(3.0) - 9,
    "ö/steps": torch.arange(2),
}


def test_a_copy_has_the_same_bytes_as_safetensors_save():
    fp32 = {name: tensor for name, tensor in TENSORS.items() if tensor.dtype == torch.float32}
    assert bytes(Staging(ALONE).copy(fp32)) == save(fp32)
    assert bytes(Staging(ALONE).copy(TENSORS)) == save(TENSORS)


def test_a_copy_keeps_its_values_when_the_tensors_change_and_later_copies_are_correct():
    staging, tensors = Staging(ALONE), {name: tensor.clone() for name, tensor in TENSORS.items()}
    first = staging.copy(tensors)
    before = bytes(first)
    for tensor in tensors.values():
        tensor.zero_()
    assert bytes(first) == before == save(TENSORS)
    second = staging.copy({"b/fp32": torch.ones(3)})
    assert load(bytes(second))["b/fp32"].tolist() == [1, 1, 1]
    assert len(staging.copy(TENSORS)) == len(first)
    large = {"c/fp32": torch.arange(1000.0)}
    assert bytes(staging.copy(large)) == save(large)


def test_a_copy_on_a_disk_has_the_same_bytes_and_is_a_file(tmp_path):
    staging = Staging(ALONE)
    assert bytes(staging.copy(TENSORS, tmp_path)) == save(TENSORS)
    large = {"c/fp32": torch.arange(1000.0)}
    assert bytes(staging.copy(large, tmp_path)) == save(large) == (tmp_path / FILE).read_bytes()
    assert bytes(staging.copy(TENSORS)) == save(TENSORS)
