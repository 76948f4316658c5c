"""ZeRO-3 sharded within groups of ranks: two groups of two ranks train as one group of four."""

import json
import math

import pytest
import torch

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.dense import dense_training
from tests.support.distributed import run_distributed
from tests.support.standin import HALF_NUMBER_TERMS, LANES, STANDIN_TERMS, StandIn, inputs, pack
from tests.support.training import engine_of, losses, lr, norm_of_parts, steps
from univitar_ds.config.deepspeed import NODE
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import INDEX, MASTER, read_full
from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine import node_sharding

pytestmark = pytest.mark.distributed
MIDDLE, END = 3, 6
PARAMETERS = sum(p.numel() for p in StandIn().parameters())


def half(engine, folder, first, last):
    """Trains from step `first` to `last` and saves. Returns the results."""
    results = steps(engine, first, last, read_gradient=True)
    save_checkpoint(engine, folder, last, {}, {}, keep=9)
    return results


def trained(world, folder, model=None, **settings):
    """Results, norm of the last gradient computed from its parts, and this rank's master weights after END steps."""
    engine = engine_of(world, model, **settings)
    results = half(engine, folder, 0, MIDDLE) + half(engine, folder, MIDDLE, END)
    norm = norm_of_parts(engine)
    masters = [piece.tensors[MASTER].clone() for piece in engine.pieces() if MASTER in piece.tensors]
    engine.close()
    return results, norm, masters


def resumed(world, source, folder, **settings):
    engine = engine_of(world, StandIn(seed=99), **settings)
    load_checkpoint(engine, source / f"step-{MIDDLE:08d}")
    results = half(engine, folder, MIDDLE, END)
    engine.close()
    return results


def not_finite(world):
    """Whether the weights are updated if a gradient of the last rank is NaN, and after that if all are finite."""
    engine, answers = engine_of(world, sharing=2), []
    for factor in (float("nan"), 1.0):
        engine.zero_grad(1e-3)
        (lane,) = world.lanes(LANES)
        vision, text, scale, bias = engine(*inputs(pack(0, lane)))
        surrogate = vision.sum() + text.sum() + scale.sum() + bias.sum()
        engine.backward(surrogate * (factor if world.rank == world.size - 1 else 1.0))
        engine.step()
        answers.append(engine.updated)
    engine.close()
    return answers


def on_four_ranks(folder):
    world = start_world()
    answers = {
        "groups": trained(world, folder / "groups", sharing=2),
        "all": trained(world, folder / "all"),
        "bf16": trained(world, folder / "bf16", sharing=2, bf16=True),
        "other start": trained(world, folder / "other", StandIn(seed=world.rank // 2), sharing=2),
        "not finite": not_finite(world),
    }
    for name, source, settings in RESUMED:
        answers[name] = resumed(world, folder / source, folder / name, **settings)
    return answers


RESUMED = [
    ("groups again", "groups", {"sharing": 2}),
    ("groups to all", "groups", {}),
    ("groups to zero2", "groups", {"stage": 2}),
    ("all to groups", "all", {"sharing": 2}),
    ("all to single ranks", "all", {"sharing": 1}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_distributed(on_four_ranks, 4, folder)


@pytest.fixture(scope="module")
def dense():
    return dense_training(StandIn(), END, lr=lr, clip=1.0)


def end(folder):
    return folder / f"step-{END:08d}"


def assert_follows(dense, results, whole, after=0):
    for step, (result, (loss, norm)) in enumerate(zip(results, dense.curve[after:], strict=True), after + 1):
        assert_sums_close(result.loss, loss, step * STANDIN_TERMS, f"loss of step {step}")
        assert_sums_close(result.grad_norm, norm, step * STANDIN_TERMS, f"gradient norm of step {step}")
    assert_all_close(whole, dense.weights, END * STANDIN_TERMS, reach=dense.reach)


@pytest.mark.numeric
def test_groups_train_as_all_ranks_together_and_as_plain_torch(dense, ranks, folder):
    """Without the sum over groups, each group would train on the lanes of its own two ranks."""
    for name in ("groups", "all"):
        assert_follows(dense, ranks[0][name][0], read_full(end(folder / name)))
    pairs = zip(losses(ranks[0]["groups"][0]), losses(ranks[0]["all"][0]), strict=True)
    for step, (got, wanted) in enumerate(pairs, 1):
        assert_sums_close(got, wanted, step * STANDIN_TERMS, f"loss of step {step}")
    assert_all_close(
        read_full(end(folder / "groups")), read_full(end(folder / "all")), END * STANDIN_TERMS, reach=dense.reach
    )


@pytest.mark.numeric
def test_in_bf16_groups_equal_plain_fp32_up_to_rounding(dense, ranks):
    wanted, _ = zip(*dense.curve, strict=True)
    found = losses(ranks[0]["bf16"][0])
    assert_sums_close(found, wanted, HALF_NUMBER_TERMS, "losses", dtype=torch.bfloat16)


@pytest.mark.numeric
def test_the_norm_of_a_gradient_follows_from_its_parts_on_all_ranks(ranks):
    results, norm, _ = ranks[0]["groups"]
    assert_sums_close(norm, results[-1].grad_norm, PARAMETERS)


def test_all_groups_have_the_same_weights_bit_for_bit(ranks):
    for name in ("groups", "bf16", "other start"):
        for place in (0, 1):
            first, second = ranks[place][name][2], ranks[place + 2][name][2]
            assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)), name
    assert ranks[0]["other start"][0] == ranks[0]["groups"][0], "all groups start from the weights of rank 0"


def test_a_gradient_that_is_not_finite_on_one_rank_updates_no_group(ranks):
    assert [answer["not finite"] for answer in ranks] == [[False, True]] * 4


def hashes(folder):
    files = checkpoint_dir.read_manifest(end(folder))
    return {name: file for name, file in files.items() if name.endswith(".safetensors")}


def test_groups_resume_bit_for_bit(ranks, folder):
    assert ranks[0]["groups again"] == ranks[0]["groups"][0][MIDDLE:]
    assert hashes(folder / "groups again") == hashes(folder / "groups")


@pytest.mark.numeric
@pytest.mark.parametrize("name", [name for name, *_ in RESUMED[1:]])
def test_checkpoints_of_groups_and_of_all_ranks_are_read_with_any_sharding(dense, ranks, folder, name):
    assert_follows(dense, ranks[0][name], read_full(end(folder / name)), after=MIDDLE)


@pytest.mark.parametrize("name", ["groups", "all", "all to single ranks"])
def test_every_element_is_written_once(ranks, folder, name):
    pieces = json.loads((end(folder / name) / INDEX).read_text())["pieces"]
    for parameter, entry in pieces.items():
        covered = 0
        for _, start, length in sorted(entry["parts"], key=lambda part: part[1]):
            assert start == covered, parameter
            covered += length
        assert covered == math.prod(entry["shape"]), parameter
    writers = {rank for entry in pieces.values() for rank, *_ in entry["parts"]}
    assert writers == {"groups": {0, 1}, "all": {0, 1, 2, 3}}.get(name, {0})


def grouped(names):
    """The result of each rank for NODE if the ranks are on machines of these names."""
    world = start_world()
    node_sharding.os.uname = lambda: type("uname", (), {"nodename": names[world.rank]})
    try:
        found = node_sharding.sharding_of(world, NODE)
        return found.rank, found.size, found.copies, found.first
    except Exception as error:
        return str(error)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("aabb", [(0, 2, 2, True), (1, 2, 2, True), (0, 2, 2, False), (1, 2, 2, False)]),
        ("aaaa", [(rank, 4, 1, True) for rank in range(4)]),
        ("aaab", "a 3, b 1"),
        ("abab", "a 2, b 2"),
        ("abba", "a 2, b 2"),
    ],
)
def test_the_ranks_of_a_machine_are_found_by_its_name(names, said):
    answers = run_distributed(grouped, 4, names)
    if isinstance(said, list):
        assert answers == said
    else:
        assert all(said in answer and "start equal numbers" in answer for answer in answers)
