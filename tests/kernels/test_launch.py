"""Kept launchers of Triton's kernels: a later launch passes what Triton's own launch would pass."""

import sys

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu.recording_driver import recorded

    with recorded() as active:
        yield active


def launched(driver, call):
    """The launch of `call`, with its launcher's number first and addresses in the place of tensors."""
    driver.launches.clear()
    call()
    assert len(driver.launches) == 1
    return [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in driver.launches[0]]


HOOKS = slice(7, 10)
"""Metadata for hooks and the hooks, which a kept launcher leaves out."""


def without_hooks(launch):
    return launch[: HOOKS.start] + launch[HOOKS.stop :]


def test_a_kept_launcher_passes_what_triton_passes(driver, monkeypatch):
    from univitar_ds.kernels import gpu, rms_norm
    from univitar_ds.kernels.rows import launch_forward

    x, y = torch.zeros(40, 64), torch.zeros(40, 64)
    half, weight = torch.zeros(40, 64, dtype=torch.bfloat16), torch.ones(64)
    odd = torch.zeros(40 * 64 + 1)[1:].view(40, 64)  # not at a multiple of 16 bytes
    kernel = rms_norm.forward_kernel
    run, calls = type(kernel).run, []
    monkeypatch.setattr(type(kernel), "run", lambda *args, **options: calls.append(1) or run(*args, **options))
    for tensors, rows in (
        ((x, weight, y), 40),
        ((half, weight, half), 40),
        ((odd, weight, y), 40),
        ((x, weight, y), 7),
    ):
        known = len(calls)
        first = launched(driver, lambda: launch_forward(kernel, tensors[0][:rows], *tensors, 1e-6))  # noqa: B023
        again = launched(driver, lambda: launch_forward(kernel, tensors[0][:rows], *tensors, 1e-6))  # noqa: B023
        assert len(calls) <= known + 1, "Triton was asked again for the same kernel"
        gpu.forget()
        fresh = launched(driver, lambda: launch_forward(kernel, tensors[0][:rows], *tensors, 1e-6))  # noqa: B023
        assert without_hooks(first) == without_hooks(again) == without_hooks(fresh)
        assert fresh[10:] == [*[one.data_ptr() for one in tensors], rows, 1e-6, *fresh[15:]]


def test_a_hook_of_a_profiler_sees_every_launch(driver):
    import triton

    from univitar_ds.kernels import rms_norm
    from univitar_ds.kernels.rows import launch_forward

    x, weight = torch.zeros(8, 64), torch.ones(64)
    seen = []
    hook = seen.append
    for _ in range(2):
        launched(driver, lambda: launch_forward(rms_norm.forward_kernel, x, x, weight, x, 1e-6))
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch = launched(driver, lambda: launch_forward(rms_norm.forward_kernel, x, x, weight, x, 1e-6))
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert launch[8] is triton.knobs.runtime.launch_enter_hook


@pytest.mark.slow
def test_a_block_makes_four_launches_in_each_pass(driver):
    assert "benchmarks.gpu.recording_driver" in sys.modules
    from benchmarks.bench_launch import launches_of_a_block

    assert {name: len(calls) for name, calls in launches_of_a_block().items()} == {"forward": 4, "backward": 4}
