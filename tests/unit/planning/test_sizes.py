"""Parameters, memory and checkpoints have the predicted sizes."""

import math
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.support.finished import run_config, write_run
from univitar_ds.config.deepspeed import read_deepspeed, resolve_deepspeed
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import ElasticReader
from univitar_ds.formats.run import run_description
from univitar_ds.model.config import PRESETS
from univitar_ds.planning.sizes import Counts, amount, checkpoint_bytes, count_parameters, memory_of_rank
from univitar_ds.plugins import load_plugins

COUNTS = Counts({"patch_embedding": 100, "blocks": 700, "text": 150, "logits": 2, "heads": 48})

PLUGIN = """
from univitar_ds.plugins import Moment, register_optimizer
@register_optimizer("small")
class Small:
    moments = {"mean": Moment("bfloat16")}
    def step(self, weights, gradient, moments, *, lr, weight_decay, step):
        pass
"""


def resolved(config, world_size, name="zero3_cpu", **zero):
    content = read_deepspeed(name)
    content["zero_optimization"] |= zero
    return resolve_deepspeed(config, world_size, content, ("test", name))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(folder, run_config())
    return folder


def test_a_checkpoint_has_the_predicted_parameters_and_bytes(run):
    config = run_config()
    counts = count_parameters(config, run_description(run, config), teacher_width=None, classes=None)
    assert counts.by_part["patch_embedding"] + counts.by_part["blocks"] == PRESETS["tiny"].parameter_count()
    folder = checkpoint_dir.latest(run / "checkpoints")
    with ExitStack() as files:
        shapes = ElasticReader(folder, files).shapes
        kinds = {kind for part in ElasticReader(folder, files).kinds.values() for kind in part}
    assert kinds == {"fp32", "exp_avg", "exp_avg_sq"}
    total = sum(math.prod(shape) for shape in shapes.values())
    assert counts.total == total
    foreseen = checkpoint_bytes(config, config.stages[0], counts, resolved(config, 1))
    assert foreseen == 3 * 4 * total
    assert 0 < (folder / "rank00000.safetensors").stat().st_size - foreseen < 100_000, "names and shapes"


def test_a_classifier_and_a_teacher_have_their_heads():
    labels = run_config(objective={"kind": "classification"})
    described = {"encoder": PRESETS["tiny"].to_dict()}
    plain, taught = (
        count_parameters(labels, described, teacher_width=width, classes=10).by_part["heads"] for width in (None, 64)
    )
    more = count_parameters(labels, described, teacher_width=None, classes=11).by_part["heads"]
    assert more - plain == 192 + 1, "a row of the linear head and its bias"
    assert taught > plain


@pytest.mark.parametrize(
    ("name", "stage", "weights", "gradients"),
    [
        ("zero3_cpu", 3, 4 / 4, 4 / 4),
        ("zero3_cpu_bf16", 3, 2 / 4, 4 / 4),
        ("zero2", 2, 2, 4 / 4),
        ("zero2", 1, 2, 4),
    ],
)
def test_what_a_rank_holds_follows_from_the_zero_stage(name, stage, weights, gradients):
    config = run_config(optimizer={"ema_decay": 0.9})
    memory = memory_of_rank(config, config.stages[0], COUNTS, 4, resolved(config, 4, name, stage=stage))
    assert memory.parts == {
        "weights": 1000 * weights,
        "gradients": 1000 * gradients,
        "optimizer": 1000 * 12 / 4,
        "average": 1000 * 4 / 4,
    }
    assert (memory.device, memory.host) == (sum(memory.parts.values()), 0)


def test_frozen_parts_have_weights_only_and_offloaded_ones_are_in_host_memory():
    config = run_config()
    stage = config.stages[0].model_copy(update={"frozen": ["vision"]})
    content = resolved(config, 2, "zero3_offload")
    memory = memory_of_rank(config, stage, COUNTS, 2, content)
    assert memory.parts == {"weights": 1000 * 2 / 2, "gradients": 200 * 4 / 2, "optimizer": 200 * 12 / 2}
    assert (memory.device, memory.host) == (1400, 1200)
    assert checkpoint_bytes(config, stage, COUNTS, content) == 200 * 12 + 800 * 2


def test_states_on_a_disk_need_buffers_in_host_memory():
    config = run_config()
    content = resolved(config, 2, "zero3_nvme")
    content["zero_optimization"]["sub_group_size"] = 100
    memory = memory_of_rank(config, config.stages[0], COUNTS, 2, content)
    assert memory.parts["optimizer"] == memory.disk == 1000 * 12 / 2
    assert memory.host == memory.parts["buffers"] == 100 * 12
    assert memory.device == memory.parts["weights"] + memory.parts["gradients"]


def test_amounts_have_units():
    assert [amount(size) for size in (900, 2.5e6, 1.25e9, 3e12)] == ["0.9 kB", "2.5 MB", "1.25 GB", "3 TB"]


def test_the_moments_of_muon_and_of_a_plugin_count_with_their_types(tmp_path):
    model = run_config()
    described = {"encoder": PRESETS["tiny"].to_dict()}
    labels = run_config(objective={"kind": "classification"})
    matrices = count_parameters(labels, described, teacher_width=None, classes=10).matrices
    hidden, inner = PRESETS["tiny"].hidden_size, PRESETS["tiny"].intermediate_size * 2 // 3
    assert matrices == {"blocks": PRESETS["tiny"].num_hidden_layers * (4 * hidden**2 + 3 * hidden * inner)}
    counts = replace(COUNTS, matrices={"blocks": 600, "text": 100})
    muon = run_config(optimizer={"kind": "muon"})
    memory = memory_of_rank(muon, muon.stages[0], counts, 4, resolved(model, 4))
    assert memory.parts["optimizer"] == (700 * 8 + 300 * 12) / 4
    assert checkpoint_bytes(muon, muon.stages[0], counts, resolved(model, 4)) == 700 * 8 + 300 * 12
    (tmp_path / "small.py").write_text(PLUGIN)
    load_plugins([str(tmp_path / "small.py")])
    small = run_config(optimizer={"kind": "small"}, plugins=[str(tmp_path / "small.py")])
    assert memory_of_rank(small, small.stages[0], counts, 4, resolved(model, 4)).parts["optimizer"] == 1000 * 6 / 4
    load_plugins(())
