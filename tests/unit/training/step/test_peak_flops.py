import logging

import pytest
import torch

from tests.support.runs import small_config
from univitar_ds.evaluation.report import render_summary
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.logging.writers import MetricLog
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.peak_flops import (
    MEASUREMENTS,
    SECONDS,
    Peak,
    best,
    find_peak,
    matrix_products,
    published_peak,
    repeats_per_s,
)

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Machine:
    """A clock, and work that takes `cost` seconds at each time."""

    def __init__(self, cost):
        self.now, self.cost = 0.0, cost

    def clock(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += self.cost(self.now)


def test_the_peak_is_the_best_of_five_measurements_over_two_seconds():
    machine = Machine(lambda now: 0.04 if 0.8 <= now < 1.2 else 0.16)  # another program rests for 0.4 s
    rates = repeats_per_s(machine.work, MEASUREMENTS, SECONDS, machine.clock)
    assert len(rates) >= 5
    assert machine.now >= 2.0
    tops, steady = best(rates)
    assert tops == max(rates) > 2 * min(rates)
    assert not steady


def test_a_product_that_takes_longer_than_a_measurement_is_measured_too():
    machine = Machine(lambda _: 10.0)
    assert repeats_per_s(machine.work, 5, 2.0, machine.clock) == [pytest.approx(0.1)] * 5


@pytest.mark.parametrize(("rates", "steady"), [((9.1, 10.0, 9.5), True), ((8.9, 10.0, 9.9), False), ((4.0,), True)])
def test_measurements_within_a_tenth_of_the_best_agree(rates, steady):
    assert best(rates) == (max(rates), steady)


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_published_peak_follows_from_the_name_of_the_gpu(gpu, tflops):
    assert published_peak(gpu) == tflops


def test_a_known_gpu_is_not_measured_and_an_unknown_one_is(monkeypatch):
    gpu = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("univitar_ds.training.step.peak_flops.matrix_products", lambda *_: [400.0, 410.0])
    assert find_peak(None, torch.bfloat16, gpu) == Peak(989.0)
    assert find_peak(700.0, torch.bfloat16, gpu) == Peak(700.0)
    assert find_peak(None, torch.float32, gpu) == Peak(410.0, steady=True)  # published figures are for bfloat16
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA Z9000")
    assert find_peak(None, torch.bfloat16, gpu) == Peak(410.0, steady=True)


def test_matrix_products_have_a_speed():
    rates = matrix_products(torch.device("cpu"), torch.float32, measurements=3, seconds=0.03)
    assert len(rates) == 3
    assert all(0.0001 < rate < 1000 for rate in rates)


def test_a_given_peak_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch, "matmul", lambda *_: pytest.fail("measured"))
    assert find_peak(0.5, torch.float32, ALONE) == Peak(0.5, None)
    assert find_peak(0.5, torch.float32, World(0, 4, 0, ALONE.device)) == Peak(2.0, None)


@pytest.mark.parametrize(
    ("steady", "mfu_pct", "note"),
    [(True, 60.0, None), (True, 98.0, "peak measured under load"), (False, 30.0, "peak measured under load"),
     (None, 89.0, None), (None, 98.0, "logging.peak_tflops may be too low")],
)  # fmt: skip
def test_an_mfu_that_cannot_be_relied_on_is_marked(steady, mfu_pct, note):
    assert Peak(1.0, steady).note(mfu_pct) == note


@pytest.mark.parametrize("note", [None, "peak measured under load"])
def test_the_mark_is_on_the_screen_in_the_metrics_and_in_the_report(tmp_path, caplog, note):
    numbers = ("loss", "lr", "grad_norm", "samples_per_s", "fill_pct", "data_wait_pct")
    line = {"step": 1, "stage": "a", "modality": "image", **dict.fromkeys(numbers, 1.0), "mfu_pct": 98.0}
    line |= {} if note is None else {"mfu_note": note}
    log = MetricLog(small_config(tmp_path, tmp_path), tmp_path, Progress())
    with caplog.at_level(logging.INFO):
        log.write(line)
    log.close()
    mark = "" if note is None else f" ({note})"
    assert f"mfu 98 %{mark}, fill" in caplog.text
    assert ("mfu_note" in (tmp_path / "metrics.jsonl").read_text()) is (note is not None)
    assert f"98{mark} |" in render_summary({"last": line})
