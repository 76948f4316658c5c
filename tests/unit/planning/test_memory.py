"""Memory of a step by part, compared with tensors that torch keeps, and with steps on a simulated GPU."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import bench_plan_memory
from benchmarks.bench_recompute import GRIDS, TOKENS, Counter
from tests.support.paths import ROOT
from tests.support.simulated_gpu.recipe import Setting, foreseen
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.geometry import pixel_bytes
from univitar_ds.model.blocks.activations import LADDER
from univitar_ds.model.config import PRESETS
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.objectives.exchange import GATHERED_BYTES
from univitar_ds.planning.memory import (
    GATHERED_AT_ONCE,
    EvaluationLoad,
    States,
    StepLoad,
    TeacherMemory,
    TextShape,
    backward_bytes,
    kept_bytes,
    moments,
    peak,
)
from univitar_ds.training.checkpoint import whole_weights

P = 1_000_000
TEXT = TextShape(hidden=64, layers=2, inner=256, length=16)
LOAD = StepLoad(
    encoder=PRESETS["0.3b"], tokens=1024, pixels=1024 * 588, items=4, packs=2, kind=1, embed_dim=64, texts=64, chunk=16,
    text=TEXT,
)  # fmt: skip
PARTS = {"weights": 2 * P, "gradients": 4 * P, "optimizer": 12 * P / 8}
ZERO = {"stage": 2, "reduce_bucket_size": 1000}
STATES = States(PARTS, ZERO, parameters=P, trained=P, block=P // 10, ranks=8, width=2, gradient=4)


@pytest.mark.parametrize("width", [2, 4])
def test_plain_torch_keeps_the_stated_values_of_a_block(width):
    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    for hidden, inner in ((64, 192), (128, 192), (64, 384)):
        kept = []
        for layers in (1, 3):
            model = UniViTAR(EncoderConfig(hidden, layers, 2, inner)).to(dtype)
            patches = torch.zeros(TOKENS, 1176, dtype=dtype)
            with Counter([*model.parameters(), patches]) as counter:
                output = model(patches, GRIDS)
                kept.append(counter.alive())
            del output
        encoder = EncoderConfig(hidden, 1, 2, inner)
        counted = (kept[1] - kept[0]) / 2 / TOKENS
        assert abs(kept_bytes(encoder, 0, width=width, kernels="plain") / counted - 1) < 0.02


def test_the_backward_pass_of_a_block_adds_what_it_recomputes():
    for encoder in PRESETS.values():
        added = [backward_bytes(encoder, kind, width=2, kernels="fused") for kind in LADDER]
        assert added[0] < added[1] < added[2] == added[3]


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks/results" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_of_the_simulated_gpu_are_predicted_within_5_percent():
    """`tests/simulated_gpu/test_memory.py` repeats some of them if its environment can be made."""
    rows = rows_of("bench_simulated_gpu.csv")
    assert {row["zero"] for row in rows} >= {"2", "3"}
    for row in rows:
        setting = {name: int(row[name]) for name in ("zero", "ranks", "packs", "recompute", "tokens")}
        found = foreseen(Setting(row["recipe"], **setting)).bytes / 2**30
        assert abs(found / float(row["peak_gib"]) - 1) < 0.05, row
        assert abs(found - float(row["foreseen_gib"])) < 0.006, f"the row is old: {row}"


def test_measured_processes_are_predicted_within_15_percent():
    rows = rows_of("bench_plan_memory.csv")
    assert len(rows) >= 6
    trained = [row["case"] for row in rows if row["zero"]]
    assert sum(case.startswith("0.3B") for case in trained) >= 3
    assert sum(case.startswith("0.6B") for case in trained) >= 1
    for row in rows:
        found = bench_plan_memory.foreseen({**bench_plan_memory.BASIC, **bench_plan_memory.CASES[row["case"]]})
        assert abs(found.bytes / 1e9 / float(row["measured_gb"]) - 1) < 0.15, row
        assert found.moment == row["moment"], f"the row is old: {row}"


def test_the_peak_is_the_largest_moment_and_its_parts_add_up():
    found = peak(LOAD, STATES)
    assert found.bytes == max(found.by_moment.values()) == sum(found.parts.values())
    assert found.moment == "encoder backward"
    assert set(found.by_moment) == {"loss", "text backward", "encoder backward", "gradients", "update"}
    assert found.parts["pixels"] == 2 * LOAD.pixels, "all packs of a step"


def test_packs_whose_graphs_are_kept_add_their_activations():
    one, two = (moments(replace(LOAD, kept=kept), STATES)["loss"] for kept in (1, 2))
    assert two["encoder activations"] == 2 * one["encoder activations"]
    assert two["text tower"] == 2 * one["text tower"]


def test_the_loss_of_many_ranks_has_the_texts_of_some_of_them_at_a_time():
    own, row = LOAD.packs * LOAD.items, 4 * LOAD.embed_dim  # of a rank; bytes, in float32
    sizes = [moments(replace(LOAD, texts=own << power), STATES)["loss"]["loss"] for power in range(17, 24)]
    assert own << 19 == GATHERED_BYTES / row
    assert sizes[1] - sizes[0] == 2 * row * (own << 17), "texts and their gradients"
    assert sizes[2:] == [sizes[2]] * 5, "as many groups of ranks as are needed"
    assert 2 * GATHERED_BYTES <= sizes[2] < 2.01 * GATHERED_BYTES


def test_frozen_towers_keep_nothing():
    frozen = replace(LOAD, trains_encoder=False, text=replace(TEXT, trained=False))
    for parts in moments(frozen, STATES).values():
        assert not {"encoder activations", "text tower"} & parts.keys()


def test_a_teacher_needs_memory_for_its_weights_and_features():
    taught = moments(replace(LOAD, teacher=TeacherMemory(width=32, layers=2, weights=500.0)), STATES)
    assert all(parts["teacher"] >= 500 for parts in taught.values())
    assert taught["loss"]["teacher"] - 500 == 1024 * (32 * (2 * 2 + 4 * 4) + 1024 * 2)
    assert taught["teacher"]["teacher"] > 500


def test_zero_3_gathers_weights_and_keeps_a_bucket_until_it_is_summed():
    zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 500, "stage3_max_live_parameters": 0}
    three = replace(STATES, zero=zero)
    parts = moments(LOAD, three)
    assert parts["loss"]["gathered weights"] == 2 * (P // 10 + 500 + P // 10), "a block, and the next on its way"
    assert parts["encoder backward"]["buckets"] == 1000 * 2
    assert parts["gradients"]["buckets"] == 1000 * (2 + 2), "and joined"
    assert "buckets" not in parts["update"]
    assert moments(LOAD, replace(three, offloaded=True))["update"]["buckets"] == 1000 * 2
    assert parts["update"]["update"] == 4 * P / 8
    assert "gathered weights" not in moments(LOAD, replace(three, ranks=1))["loss"]
    whole = replace(three, zero={**zero, "stage3_max_live_parameters": 10**9})
    assert moments(LOAD, whole)["loss"]["gathered weights"] == 2 * (P + 500 + P // 10)
    small = replace(three, zero={**zero, "sub_group_size": 1000})
    assert moments(LOAD, small)["update"]["update"] == 4 * 1000


def test_zero_1_in_bf16_exchanges_all_gradients_at_once():
    one = replace(STATES, zero={"stage": 1})
    assert moments(LOAD, one)["gradients"]["buckets"] == P * (2 + 4 + 2)


def test_an_update_on_a_cpu_has_temporaries_and_an_offloaded_one_nothing_on_the_gpu():
    plain = replace(STATES, kernels="plain", width=4)
    assert moments(LOAD, plain)["update"]["update"] == 3 * 4 * P / 8
    assert "update" not in moments(LOAD, replace(STATES, zero={**ZERO, "stage": 3}, offloaded=True))["update"]


def test_pixels_of_a_video_are_those_of_two_frames_a_token():
    assert pixel_bytes(10, video=False) == 10 * 14 * 14 * 3
    assert pixel_bytes(10, video=True) == 2 * pixel_bytes(10, video=False)


def test_an_evaluation_holds_the_states_the_copies_of_all_weights_and_a_forward_pass():
    own = EvaluationLoad(weights=2 * P, tokens=512, pixels=99.0)
    evaluated = replace(LOAD, evaluation=own, teacher=TeacherMemory(width=32, layers=2, weights=500.0))
    parts = peak(evaluated, STATES).evaluation
    assert parts["weights of the evaluation"] == 2 * P * 2 + GATHERED_AT_ONCE * 4
    assert (parts["weights"], parts["optimizer"], parts["teacher"]) == (PARTS["weights"], PARTS["optimizer"], 500)
    assert "gradients" not in parts, "ZeRO-2 has them in a step only"
    encoder = PRESETS["0.3b"]
    assert parts["encoder activations"] == 512 * 2 * 3 * (encoder.hidden_size + encoder.inner_width)
    assert parts["pixels"] == 99, "of its own pack"
    large = peak(replace(evaluated, evaluation=replace(own, weights=10**11)), STATES)
    assert (large.moment, large.parts) == ("evaluation", large.evaluation)
    assert "evaluation" not in peak(LOAD, STATES).by_moment


def test_the_copies_of_an_evaluation_are_those_that_it_makes():
    shapes = {"vision.a": (300, 70), "text.b": (50,), "logit_scale": ()}
    pieces = [SimpleNamespace(name=name, shape=shape, slice=None) for name, shape in shapes.items()]
    engine = SimpleNamespace(
        module=nn.Module(), world=SimpleNamespace(device=torch.device("cpu")), pieces=lambda: iter(pieces)
    )
    made = whole_weights.memory_for_whole(engine, torch.bfloat16, 2)
    assert sum(one.nbytes for memory in made for one in memory.whole.values()) == 2 * 2 * (300 * 70 + 50 + 1)
    assert made[0].buffer is made[1].buffer
    assert whole_weights.AT_ONCE == GATHERED_AT_ONCE


def test_plain_torch_has_no_more_values_in_a_forward_pass_than_predicted_for_an_evaluation():
    for hidden, inner in ((128, 1152), (128, 2304)):
        encoder = EncoderConfig(hidden, 2, 4, inner)
        model, patches = UniViTAR(encoder), torch.zeros(TOKENS, 1176)
        with torch.inference_mode(), Most([*model.parameters(), patches]) as counter:
            model(patches, GRIDS)
        plain = replace(STATES, kernels="plain")
        load = replace(LOAD, encoder=encoder, evaluation=EvaluationLoad(0, TOKENS, 0.0))
        assert counter.most == pytest.approx(peak(load, plain).evaluation["encoder activations"], rel=0.04)


class Most(Counter):
    """Counts the largest number of bytes that are alive after an operation."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(operation, types, args, kwargs)
        self.most = max(self.most, self.alive())
        return result


def test_an_update_of_muon_has_five_copies_of_a_part_of_its_matrices():
    muon = replace(STATES, zero={**ZERO, "stage": 3, "sub_group_size": P // 32}, matrices=P // 2)
    assert moments(LOAD, muon)["update"]["update"] == 4 * P / 32 + 5 * 2 * P / 32
    assert moments(LOAD, replace(muon, offloaded=True, matrix_width=4))["update"]["update"] == 5 * 4 * P / 32
