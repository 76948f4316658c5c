"""`univitar-ds plan` takes memory and collectives from the trainer's step on a simulated GPU."""

import json

import pytest
import yaml

from tests.support.simulated_gpu.environment import run_simulated
from univitar_ds.cli.main import main
from univitar_ds.config.load import load_config
from univitar_ds.planning.forecast.cluster import cluster_of
from univitar_ds.planning.forecast.plan import plan_run
from univitar_ds.planning.forecast.simulated import setting_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """The recipe of 0.3B with one stage of images and videos, a teacher, and a pack for each of 256 GPUs."""
    content = load_config("univitar_0p3b").model_dump(mode="json")
    content["stages"] = content["stages"][2:]
    content["data"]["lanes"] = 256
    content["deepspeed"] = "zero3"
    file = tmp_path_factory.mktemp("plan") / "run.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def test_the_memory_of_a_plan_is_simulated_and_within_5_percent_of_the_formulas(environment, run_file, capsys):
    plan = ["plan", "--config", str(run_file), "--nodes", "32", "--json"]
    done = run_simulated("univitar_ds", *plan)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "simulating 2 training steps" in done.stderr
    (stage,) = json.loads(done.stdout)["stages"]
    assert [step["modality"] for step in stage["simulated"]] == ["image", "video"], done.stdout[-3000:]
    assert stage["memory_total_bytes"] == max(sum(step["peak"].values()) for step in stage["simulated"])
    assert {"weights", "optimizer", "encoder activations", "gathered weights", "teacher"} <= stage[
        "memory_bytes"
    ].keys()
    assert all(step["collectives"]["reduce_scatter"] for step in stage["simulated"])
    assert main([*plan, "--formulas"]) == 0
    (by_formulas,) = json.loads(capsys.readouterr().out)["stages"]
    assert by_formulas["simulated"] == []
    assert abs(by_formulas["memory_total_bytes"] / stage["memory_total_bytes"] - 1) < 0.05


CASES = {
    "tensor parallel": ["model.tensor_parallel=2", "deepspeed=zero1"],
    "sequence parallel": ["model.sequence_parallel=2", "deepspeed=zero3"],
    "Muon within nodes": ["optimizer.kind=muon", "deepspeed=zero3_node"],
    "an offloaded optimizer": ["deepspeed=zero3_offload"],
}


@pytest.mark.parametrize("name", CASES)
def test_formulas_predict_the_memory_of_other_ways_within_5_percent(environment, tmp_path, name):
    plan = plan_run(load_config("univitar_0p3b", ["data.lanes=16", *CASES[name]]), cluster_of(2, 8, "h100"))
    setting = tmp_path / "setting.json"
    setting.write_text(json.dumps(setting_of(plan, 0, "image")), encoding="utf-8")
    done = run_simulated("univitar_ds.simulation.program", str(tmp_path / "no stubs"), str(setting))
    assert done.returncode == 0, done.stderr[-6000:]
    peak = json.loads(done.stdout.splitlines()[-1])["peak"]
    assert abs(plan.stages[0].peak.bytes / sum(peak.values()) - 1) < 0.05, (dict(plan.stages[0].peak.parts), peak)
