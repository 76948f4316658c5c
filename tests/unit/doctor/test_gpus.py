"""The output of nvidia-smi in its documented formats. Not run on a GPU."""

import subprocess
from pathlib import Path

import pytest

from univitar_ds.doctor import gpus
from univitar_ds.doctor.findings import FAILED, OK
from univitar_ds.doctor.gpus import ask, parse, rows_of, visible
from univitar_ds.errors import UserError

FILES = Path(__file__).parent / "nvidia_smi"
H100 = (FILES / "h100.xml").read_bytes()
V100 = (FILES / "v100.xml").read_bytes()


def failures(text: bytes, torch_cuda: str | None = "12.8") -> list[str]:
    return [f"{row.found}; {row.remedy}" for row in rows_of(parse(text), torch_cuda) if row.state == FAILED]


def test_healthy_gpus_are_one_row_with_their_driver():
    (row,) = rows_of(parse(H100), "12.8")
    assert row.state == OK
    assert "2 GPUs (NVIDIA H100 80GB HBM3), driver 550.54.15 for CUDA 12.4" in row.found


def test_every_error_of_an_old_gpu_has_a_row():
    errors, replaced, slowed, used, driver = failures(V100)
    assert "V100-SXM2-32GB at 00000000:05:00.0 has 2 uncorrectable memory errors" in errors
    assert "nvidia-smi -r" in errors
    assert "replaces faulty memory at its next reset" in replaced
    assert "slowed down by its temperature at 88 C (hw_thermal_slowdown); inspect the cooling" in slowed
    assert "30,214 MiB of Tesla V100-SXM2-32GB at 00000000:05:00.0 are in use by process 4711" in used
    assert "driver 450.80.02 supports CUDA 11.0, torch was built for 12.8; update the driver" in driver


@pytest.mark.parametrize(
    ("healthy", "faulty", "said"),
    [
        ("<dram_uncorrectable>0", "<dram_uncorrectable>7", "has 7 uncorrectable memory errors"),
        ("<sram_uncorrectable_parity>0", "<sram_uncorrectable_parity>1", "has 1 uncorrectable memory errors"),
        ("<remapped_row_failure>No", "<remapped_row_failure>Yes", "faulty memory that it can no longer repair"),
        ("<sram_threshold_exceeded>No", "<sram_threshold_exceeded>Yes", "faulty memory that it can no longer repair"),
        ("<remapped_row_pending>No", "<remapped_row_pending>Yes", "at its next reset"),
        ("<state>Completed", "<state>In Progress", "not part of the NVSwitch fabric: In Progress; start nvidia-fabric"),
        ("reason_hw_power_brake_slowdown>Not Active", "reason_hw_power_brake_slowdown>Active", "by the power supply"),
        ("<used>4 MiB", "<used>2048 MiB", "2,048 MiB of NVIDIA H100 80GB HBM3 at 00000000:1B:00.0 are in use by proc"),
        ("<used>4 MiB", "<used>ERR!", "does not answer: ERR!; drain this node"),
        ("<gpu_temp>34 C", "<gpu_temp>GPU is lost", "does not answer: GPU is lost"),
    ],
)
def test_every_error_of_a_gpu_has_a_message_and_a_remedy(healthy, faulty, said):
    assert H100.count(healthy.encode()) > 0
    (text,) = failures(H100.replace(healthy.encode(), faulty.encode(), 1))
    assert said in text


def test_lifetime_errors_of_a_gpu_and_a_power_cap_do_not_fail():
    assert b"<dram_uncorrectable>2" in H100  # the aggregate of the first GPU
    assert b"sw_power_cap>Active" in H100
    assert failures(H100) == []


def test_a_torch_without_cuda_beside_gpus_fails():
    (text,) = failures(H100, None)
    assert "was built without CUDA, and this node has GPUs; install a CUDA build of torch" in text


@pytest.mark.parametrize(("torch_cuda", "fine"), [("12.0", True), ("12.9", True), ("13.0", False), ("11.8", True)])
def test_a_driver_runs_every_cuda_of_its_major_version_and_earlier_ones(torch_cuda, fine):
    assert (failures(H100, torch_cuda) == []) == fine


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        (None, "12"),
        ("0,1", "12"),
        ("1", "2"),
        ("1,0", "21"),
        ("GPU-2222", "2"),
        ("", ""),
        ("-1", ""),
        ("MIG-GPU-2222/1/0", "12"),
    ],
)
def test_only_the_gpus_of_this_rank_count(named, seen):
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    found = visible(parse(H100).gpus, environment)
    assert "".join(gpu.findtext("uuid")[4] for gpu in found) == seen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "prints no XML"),
        (H100[:2000], "prints no XML"),
        (b"<html/>", "<html> and not <nvidia_smi_log>"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><nvidia_smi_log>&b;</nvidia_smi_log>', "or defines XML entities"),
        (b"\xff\xfe\x00", "prints no XML"),
    ],
)
def test_other_output_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse(text)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a script in the place of nvidia-smi."""

    def put(body: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return put


def test_nvidia_smi_is_called(program):
    program(f'[ "$*" = "-q -x" ] && cat {FILES / "h100.xml"}')
    assert ask() == H100


def test_an_nvidia_smi_that_fails_or_hangs_is_an_error(program, monkeypatch):
    program("echo 'Unable to determine the device handle for GPU 0000:1B:00.0: GPU is lost.'; exit 15")
    with pytest.raises(UserError, match=r"fails with exit code 15: Unable to .* GPU is lost\.; drain this node"):
        ask()

    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(gpus.subprocess, "run", hangs)
    with pytest.raises(UserError, match="does not answer within 60 s; drain this node"):
        ask()


def test_a_machine_without_the_program_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask() is None
