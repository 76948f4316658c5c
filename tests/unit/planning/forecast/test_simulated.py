"""Plans with simulated steps, whose results are given: what a plan takes from them, and what it keeps of formulas."""

import json
import os
import signal
import sys
import tempfile
from types import SimpleNamespace

import pytest

from tests.unit.planning.forecast.test_plan import planned
from univitar_ds.cli.main import main
from univitar_ds.planning.forecast.simulated import grid_of, simulate_plan
from univitar_ds.planning.forecast.text import plan_object, plan_text
from univitar_ds.simulation import libraries, process

GB = 10**9
IMAGES = {
    "peak": {"encoder activations": 30 * GB, "weights": GB},
    "moment": "loss",
    "launches": 4000,
    "waits": {"read a": 2, "copy b": 1},
    "collectives": {"allgather_base": 4, "allgather": 1, "allreduce": 2},
    "collective_bytes": {"allgather_base": 40, "allgather": 2, "allreduce": 7},
}
VIDEOS = {**IMAGES, "peak": {"encoder activations": 45 * GB, "weights": GB}, "moment": "backward pass"}


@pytest.fixture
def simulation(monkeypatch):
    """Returns the settings that were simulated; a step of images has the result IMAGES, one of videos VIDEOS."""
    settings = []

    def simulate(given, host_bytes):
        for setting in given:
            settings.append(json.loads(json.dumps(setting)))
            yield IMAGES if setting["modality"] == "image" else VIDEOS

    monkeypatch.setattr(process, "check_possible", lambda: None)
    monkeypatch.setattr(process, "simulate", simulate)
    return settings


def test_memory_and_collectives_are_those_of_the_steps(simulation):
    plan, numbers = planned(), []
    found = simulate_plan(plan, lambda *both: numbers.append(both))
    assert numbers == [(done, 4) for done in range(5)]
    assert [(one["stage"], one["modality"]) for one in simulation] == [
        (0, "image"), (1, "image"), (2, "image"), (2, "video"),
    ]  # fmt: skip
    _, native, video = found.stages
    assert dict(native.peak.parts) == IMAGES["peak"]
    assert native.peak.moment == "loss"
    assert (native.collectives, native.messages) == ({"allgather": 42, "allreduce": 7}, 7)
    assert video.peak.bytes == 46 * GB, "the larger of both modalities"
    assert video.step == plan.stages[2].step
    assert all(one["ranks"] == 32 and one["items"] > 0 and one["kept"] == 1 for one in simulation)
    for stage, own, before in zip(found.config.stages, found.stages, plan.stages, strict=True):
        more = own.peak.bytes > before.peak.bytes
        for kind, budget in own.budgets.items():
            assert (budget < before.budgets[kind]) == more, (stage.name, kind)


def test_text_and_json_name_the_simulation(simulation):
    plan = simulate_plan(planned(), lambda *_: None)
    text = plan_text(plan, [])
    assert "a step of videos, simulated, each GPU: 4,000 launches, 3 waits of the host" in text
    assert "most in 'backward pass', simulated" in text
    steps = plan_object(plan, [])["stages"][2]["simulated"]
    assert [step["modality"] for step in json.loads(json.dumps(steps))] == ["image", "video"]
    assert "simulated" not in plan_text(planned(), [])


def test_a_stage_that_cannot_be_simulated_keeps_the_formulas(monkeypatch, simulation):
    def simulate(given, host_bytes):
        yield from ({"error": "no kernel"} if one["stage"] == 1 else IMAGES for one in given)

    monkeypatch.setattr(process, "simulate", simulate)
    plan = planned()
    found = simulate_plan(plan, lambda *_: None)
    assert found.stages[1] == plan.stages[1]
    assert found.stages[0].simulated
    assert "stage native is computed by formulas, since its step cannot be simulated: no kernel" in found.notes


def test_a_plan_that_does_not_fit_by_simulation_has_a_remedy_that_fits(monkeypatch, simulation):
    large = {**IMAGES, "peak": {"encoder activations": 100 * GB}}
    monkeypatch.setattr(process, "simulate", lambda given, host_bytes: (large for _ in given))
    found = simulate_plan(planned(), lambda *_: None)
    assert "stage fixed224 needs 100 GB" in found.misfit()
    assert "set checkpoint_every: 1" in found.misfit()


def test_without_a_cuda_build_the_plan_says_that_formulas_predict(monkeypatch, capsys):
    def refuse():
        raise process.NoSimulation("torch is a build without CUDA")

    monkeypatch.setattr(process, "check_possible", refuse)
    assert main(["plan", "--config", "univitar_0p3b"]) == 0
    printed = capsys.readouterr()
    assert "no step can be simulated here: torch is a build without CUDA" in printed.out
    assert "simulating" not in printed.err


@pytest.fixture
def without_stubs(monkeypatch, tmp_path):
    """Processes of simulated steps start here without stubs. Returns the folder of their temporary folder."""
    monkeypatch.setattr(process, "check_possible", lambda: None)
    monkeypatch.setattr(process, "triton_driver", lambda: tmp_path)
    monkeypatch.setattr(libraries, "build", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


PROGRAMS = {
    "raise": ("raise ValueError('no such stage')", "ValueError: no such stage"),
    "end": ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL, as when memory runs out"),
    "leave": ("import os; os._exit(0)", "no message"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_reason_of_a_failed_step_is_its_error(monkeypatch, without_stubs, name):
    program, message = PROGRAMS[name]
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", program])
    assert list(process.simulate([{}])) == [{"error": message}]
    assert list(without_stubs.iterdir()) == []


PRINTS = """
import os
from univitar_ds.simulation import program

def simulated(stubs, file):
    print("a plugin", flush=True)
    os.system("echo a library")
    return {"launches": 3}

program._simulated = simulated
program.main(None, None)
print("a plugin, at the end")
"""


def test_only_the_result_of_a_step_is_read_although_plugins_print(monkeypatch, without_stubs):
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", PRINTS])
    assert list(process.simulate([{}])) == [{"launches": 3}]


def test_nothing_is_left_when_a_simulation_is_interrupted(monkeypatch, without_stubs):
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", "import time; time.sleep(600)"])
    processes = []

    def interrupted(one):
        processes.append(one)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(process.simulate([{}, {}]))
    assert [one.returncode for one in processes] == [-signal.SIGKILL]
    assert list(without_stubs.iterdir()) == []


def test_a_folder_that_runs_no_programs_is_a_reason(monkeypatch, without_stubs):
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(process.NoSimulation, match=r"\(noexec\); set TMPDIR"):
        list(process.simulate([{}]))


def test_states_in_host_memory_limit_the_steps_at_the_same_time(monkeypatch, without_stubs):
    memory = without_stubs / "meminfo"
    memory.write_text("MemTotal: 99999999 kB\nMemAvailable: 4000000 kB\n")
    monkeypatch.setattr(process, "MEMORY", memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert process._number_at_once(process.STEP_BYTES) == 2
    assert process._number_at_once(1e6) == process.AT_ONCE
    with pytest.raises(process.NoSimulation, match=r"needs 14 GB of host memory, of which 4.1 GB are free"):
        list(process.simulate([{}], 12e9))


def test_a_plan_with_its_optimizer_in_host_memory_says_how_much(monkeypatch, simulation):
    found = []

    def simulate(given, host_bytes):
        found.append(host_bytes)
        return (IMAGES for _ in given)

    monkeypatch.setattr(process, "simulate", simulate)
    for zero in ("zero3", "zero3_offload"):
        plan = planned(4, "h100", f"deepspeed={zero}")
        simulate_plan(plan, lambda *_: None)
    assert found == [0, 16 * plan.model.counts.total / plan.cluster.ranks]


def test_a_step_that_would_write_to_a_disk_is_not_simulated(simulation):
    with pytest.raises(process.NoSimulation, match="zero3_nvme has optimizer states on a local disk"):
        simulate_plan(planned(4, "h100", "deepspeed=zero3_nvme"), lambda *_: None)
    assert simulation == []


def test_a_cache_that_cannot_be_written_is_replaced(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("RANK", "3")
    found = process.environment(tmp_path)
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert "RANK" not in found
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert process.environment(tmp_path)["TRITON_CACHE_DIR"] == str(tmp_path / "cache")


@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 577, 1000, 1170, 4096, 4097])
@pytest.mark.parametrize("merge", [1, 2])
def test_an_item_of_a_pack_has_nearly_the_wanted_tokens(tokens, merge):
    stage = planned().config.stages[1]
    steps, height, width = grid_of(stage, "image", tokens, merge)
    assert steps == 1
    assert height % merge == width % merge == 0
    assert tokens < merge**2 or 0.9 * tokens - merge**2 < height * width <= tokens
    assert height <= width <= 3 * height or tokens < 16


def test_a_video_has_all_its_frames():
    stage = planned().config.stages[2]
    steps, height, width = grid_of(stage, "video", 5832, 1)
    assert steps == stage.video_frames // 2
    assert 0.97 * 5832 < steps * height * width <= 5832
