"""What is known of a GPU, and where kernels are launched."""

from types import SimpleNamespace

import pytest
import torch

from univitar_ds.kernels import gpu
from univitar_ds.kernels import patch_embed as patches

KNOWN = {  # multiprocessors, KB of shared memory of one (CUDA programming guide)
    "A100": ((8, 0), 108, 164, False),
    "L40S": ((8, 9), 142, 100, False),
    "H200": ((9, 0), 132, 228, True),
    "B200": ((10, 0), 148, 228, True),
    "RTX PRO 6000": ((12, 0), 188, 100, False),
}


@pytest.mark.parametrize("name", KNOWN)
def test_limits_are_those_of_one_program_and_only_hopper_and_its_successor_take_wide_tiles(monkeypatch, name):
    (major, minor), processors, kilobytes, wide = KNOWN[name]
    found = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=processors, shared_memory_per_multiprocessor=kilobytes * 1024
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    limits = gpu.limits.__wrapped__(torch.device("cuda", 3))
    assert limits == (processors, (kilobytes - 1) * 1024, wide)
    # Stages hold a tile of both sides in bfloat16; what else is in shared memory takes less than another stage.
    tiles = patches.forward_tiles(half=True, wide=limits.wide)
    assert tiles.stages * 2 * tiles.words * (tiles.width + tiles.tokens) * 2 <= limits.shared_bytes


@pytest.fixture
def operations(device):
    """Calls of every operation on `device` with what it returns."""
    from univitar_ds.kernels import fused

    def made(*shape):
        return torch.ones(*shape, device=device, requires_grad=True)

    def ones(*shape):
        return torch.ones(*shape, device=device)

    pixels = torch.zeros(6 * 588, dtype=torch.uint8, device=device)
    positions = torch.zeros(5, 2, dtype=torch.int64, device=device)
    rule = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "merge": 1}
    return {
        "rms_norm": lambda: fused.rms_norm(made(5, 8), made(8), 1e-6),
        "add_norm": lambda: fused.add_norm(made(5, 8), made(5, 8), made(8), made(8), 1e-6),
        "swiglu_norm": lambda: fused.swiglu_norm(made(5, 8), made(5, 8), made(8), 1e-6),
        "rope2d_qk_norm": lambda: fused.rope2d_qk_norm(
            made(5, 3, 2, 8), positions, made(16), made(16), theta=1e4, eps=1e-6
        ),
        "patch_embed": lambda: fused.patch_embed(
            pixels, [1], [(1, 2, 3)], made(8, 3, 2, 14, 14), made(8), **rule
        ),
        "sigmoid_pairs": lambda: fused.sigmoid_pairs(ones(5, 8), ones(5), 0, None),
        "softmax_norms": lambda: fused.softmax_norms(ones(5, 8), ones(5), ones(8), ones(5), ones(5), 0, None),
        "softmax_pairs": lambda: fused.softmax_pairs(ones(5, 8), ones(5), ones(8), ones(5), 0, None),
    }  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("rms_norm", 2), ("add_norm", 2), ("swiglu_norm", 2), ("rope2d_qk_norm", 2), ("patch_embed", 4),
        ("sigmoid_pairs", 1), ("softmax_norms", 2), ("softmax_pairs", 1),
    ],
)  # fmt: skip
def test_every_launch_is_made_on_the_gpu_of_its_tensors(operations, device, monkeypatch, name, launches):
    guards, made = [], []
    gpu.forget()  # a kept launcher would not ask Triton

    class Guard(torch.cuda.device_of):
        def __init__(self, tensor):
            self.of = tensor.device.type
            super().__init__(tensor)

        def __enter__(self):
            guards.append(self.of)
            super().__enter__()

        def __exit__(self, *about):
            guards.pop()
            super().__exit__(*about)

    kind = type(patches.embed_kernel)
    launcher = kind.__getitem__
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: made.append(guards[:]) or launcher(kernel, grid))
    results = operations[name]()
    if results is not None:  # the losses of pairs compute their gradients in the same launch
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    assert made == [[device]] * launches


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["rms_norm", "patch_embed"])
@pytest.mark.parametrize("device", ["cuda:1"])
def test_tensors_may_be_on_a_gpu_that_is_not_the_current_one(operations, name):
    with torch.cuda.device(0):
        result = operations[name]()
        result.sum().backward()
        torch.cuda.synchronize(1)
        assert result.device.index == 1
        assert torch.cuda.current_device() == 0
        assert result.isfinite().all()
