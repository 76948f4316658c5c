"""Parts of the GPU benchmarks that need no GPU: packs, counts and rows, and a dry run of every line."""

import csv
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._functorch import config as graphs
from triton.runtime import driver

from benchmarks import bench_gpu
from benchmarks.gpu import bench_kernels
from benchmarks.gpu import counts as counts
from benchmarks.gpu import packs as packs
from benchmarks.gpu.timing import Timer, about
from benchmarks.rows import add_rows
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.kernels.reference import check_frames

SCRIPT = ROOT / "benchmarks" / "bench_gpu.py"
NOT_NEEDED = ("deepspeed", "transformers", "boto3", "av", "safetensors", "pydantic", "yaml", "PIL")


@pytest.mark.parametrize("tokens", [2, 34, 1000, 16384, 65536])
def test_packs_have_exactly_their_tokens_and_pixels_that_fit(tokens):
    for grids in (packs.mixed_images(tokens), packs.videos(tokens), packs.equal_images(tokens, 1)):
        frames, size = packs.frames_of(grids), packs.pixel_bytes(grids)
        assert check_frames(torch.empty(size, dtype=torch.uint8), frames, grids) == tokens
    assert {count > 1 for count in packs.frames_of(packs.videos(tokens))} == {True}
    assert set(packs.frames_of(packs.mixed_images(tokens))) == {1}


def test_mixed_images_are_of_many_sizes_and_the_same_every_time():
    grids = packs.mixed_images(65536)
    sizes = sorted(map(math.prod, grids))
    assert max(sizes) <= 4096
    assert sizes[len(sizes) // 4] * 4 < sizes[3 * len(sizes) // 4]
    assert grids == packs.mixed_images(65536)


def test_padded_batches_hold_every_item_at_the_size_of_the_longest():
    grids = [(1, 2, 3), (1, 5, 4), (1, 1, 1), (1, 4, 4), (1, 2, 2)]
    assert packs.padded_batches(grids, 45) == [[(1, 5, 4)] * 2, [(1, 5, 4)] * 2, [(1, 5, 4)]]
    assert packs.padded_batches(grids, 7) == [[(1, 5, 4)]] * 5


@pytest.mark.parametrize(("tokens", "sides"), [(256, (16, 16)), (12, (3, 4)), (7, (1, 7)), (1, (1, 1))])
def test_sides_are_the_divisors_nearest_to_each_other(tokens, sides):
    assert packs.nearest_to_square(tokens) == sides


def test_bytes_and_products_are_those_of_the_tensors():
    assert counts.moved_bytes("add_norm", "forward", 10, 8, 2) == 4 * torch.empty(10, 8, dtype=torch.bfloat16).nbytes
    assert counts.moved_bytes("swiglu_norm", "backward", 10, 8, 4) == 5 * torch.empty(10, 8).nbytes
    positions = torch.zeros(10, 2, dtype=torch.int64).nbytes
    assert counts.moved_bytes("rope2d_qk_norm", "forward", 10, 8, 4) == 4 * torch.empty(10, 8).nbytes + positions
    pixels, weight = torch.empty(10 * 588, dtype=torch.uint8).nbytes, torch.empty(8, 3, 2, 14, 14).nbytes
    assert counts.patch_embed_bytes(pixels, 10, 8, 4) == pixels + torch.empty(10, 8).nbytes + weight
    assert counts.patch_embed_product(10, 8, still=False) == (10, 1176, 8)
    assert counts.patch_embed_product(10, 8, still=True) == (10, 588, 8)


def test_torchs_product_has_rows_of_whole_16_bytes_and_only_the_operations_flops_count(monkeypatch):
    assert [counts.aligned(588, 2), counts.aligned(1176, 2), counts.aligned(588, 4)] == [592, 1176, 588]
    asked = []
    monkeypatch.setattr(bench_kernels, "copy_gb_s", lambda timer, size: asked.append(size) or 50.0)
    monkeypatch.setattr(bench_kernels, "matmul_tflops", lambda timer, *shape: asked.append(shape) or 592.0)
    product = counts.patch_embed_product(64, 32, still=True)
    moved = {"forward": 1000, "backward": 3000}
    case = bench_kernels.Case("patch_embed", "images", 64, 32, (), None, None, moved, product)
    times = dict.fromkeys(("ours", "eager", "compiled"), dict.fromkeys(counts.PASSES, 2.0))
    rows = [bench_kernels.row(case, name, times, None, 100.0, torch.bfloat16) for name in counts.PASSES]
    assert asked == [500, (64, 592, 32, torch.bfloat16), 1500, (32, 64, 592, torch.bfloat16)]
    for row, size in zip(rows, moved.values(), strict=True):
        assert row["matmul_tflops"] == 588
        assert row["tflops"] == pytest.approx(2 * 64 * 588 * 32 / 2.0 / 1e9, rel=1e-3)
        assert row["copy_pct"] == pytest.approx(size / 2.0 / 1e6, rel=1e-2)
        assert row["copy_same_pct"] == pytest.approx(2 * size / 2.0 / 1e6, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--encoders", "2b"], "choose from"), (["--tiny", "--encoders", "1b"], "chooses among the full shapes")],
)
def test_encoders_are_those_of_the_full_shapes(options, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *options])
    with pytest.raises(SystemExit):
        bench_gpu.main()
    assert message in capsys.readouterr().err


def test_only_the_encoders_asked_for_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(graphs, "donated_buffer", graphs.donated_buffer)  # as it was, afterwards
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--encoders", "1b", "0.3b"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for part in ("measure_kernels", "measure_steps"):
        monkeypatch.setattr(bench_gpu, part, lambda plan, *_, **__: measured.append(list(plan.encoders)))
    assert bench_gpu.main() == 0
    assert measured == [["1b", "0.3b"]] * 2


class StandInDevice:
    """A device whose clock advances with the work that it runs, and the driver through which `do_bench` uses it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.runs = 0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        self.interface = SimpleNamespace(Event=Event, synchronize=lambda: None)
        monkeypatch.setattr(driver, "_active", self)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.spend(2.0))

    def get_device_interface(self) -> SimpleNamespace:
        return self.interface

    def get_empty_cache_for_benchmark(self) -> str:
        return "cache"

    def clear_cache(self, cache: str) -> None:
        self.spend(0.1)

    def spend(self, milliseconds: float) -> None:
        self.now += milliseconds

    def run(self) -> None:
        self.runs += 1
        self.spend(0.5 if self.runs % 3 else 5.0)


def test_a_time_is_the_median_of_many_runs_without_what_comes_before_each(monkeypatch):
    device = StandInDevice(monkeypatch)
    assert Timer(torch.device("cuda"), seconds=0.2).median_ms(device.run) == pytest.approx(0.5)
    assert device.runs > 30
    held = driver.active.clear_cache
    assert held == device.clear_cache, "clearing the cache is as it was"


def test_runs_that_take_long_are_still_many(monkeypatch):
    device = StandInDevice(monkeypatch)
    Timer(torch.device("cuda"), seconds=0.001, min_runs=12).median_ms(device.run)
    assert device.runs >= 12


def test_a_row_names_the_machine_that_it_was_measured_on():
    said = about(torch.device("cpu"))
    assert list(said) == ["device", "torch", "triton", "cuda", "python", "commit", "date"]
    assert said["torch"] == torch.__version__
    assert said["commit"]


def test_rows_are_added_and_rows_of_other_columns_refused(tmp_path):
    path = tmp_path / "results" / "rows.csv"
    add_rows(path, [{"op": "a", "ms": 1}])
    add_rows(path, [{"op": "b", "ms": 2}])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"op": "a", "ms": "1"}, {"op": "b", "ms": "2"}]
    with pytest.raises(SystemExit, match="move the file away"):
        add_rows(path, [{"op": "c", "s": 3}])


def test_the_dry_run_needs_only_torch_and_triton_and_writes_no_rows():
    before = _results()
    blocked = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED})); sys.argv = sys.argv[1:]; import runpy; "
    code = blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), "--device", "cpu", "--tiny"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # shapes this small only wait for each other
    run = run_watched(command, env=one_thread)
    assert run.returncode == 0, run.stderr
    written = [line.split("  ")[0] for line in run.stderr.splitlines() if line.startswith(("op ", "encoder "))]
    ops = [*counts.ROWS_MOVED, "patch_embed", "patch_embed"]
    assert written == [f"op {op}" for op in ops for _ in counts.PASSES] + ["encoder two layers"] * 2
    assert _results() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_error_message():
    run = run_watched([sys.executable, str(SCRIPT)])
    assert run.returncode == 1
    assert run.stderr == "bench_gpu needs a CUDA GPU and torch sees none here; the dry run is --device cpu --tiny\n"


def _results() -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (ROOT / "benchmarks" / "results").glob("bench_gpu*")}
