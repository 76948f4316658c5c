"""Training of a small model with DeepSpeed, compared with a plain torch loop on the same packs."""

import gc

import pytest
import torch

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.dense import dense_training
from tests.support.distributed import run_distributed
from tests.support.standin import (
    HALF_NORM_TERMS,
    HALF_NUMBER_TERMS,
    HALF_TERMS,
    LANES,
    STANDIN_TERMS,
    StandIn,
    WithEncoder,
    pack,
)
from tests.support.training import OBJECTIVE, engine_of, losses, lr, norm_of_parts, steps, weights
from univitar_ds.kernels.dispatch import compile_on_cpu
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.step.feature_snapshot import capture_features
from univitar_ds.training.step.train_step import DivergedError, StepSettings, train_step

pytestmark = pytest.mark.distributed
STEPS = 6
PARAMETERS = sum(p.numel() for p in StandIn().parameters())
"""Number of parameters, whose squared gradients a norm sums."""
KINDS = {
    "zero3": {},
    "zero2": {"stage": 2},
    "zero1": {"stage": 1},
    "offload": {"offload": True},
    "bf16 zero3": {"bf16": True},
    "bf16 zero2": {"bf16": True, "stage": 2},
}


@pytest.fixture(scope="module")
def dense():
    return dense_training(StandIn(), STEPS, lr=lr, clip=1.0)


def trained(world, folder, *, model=None, options=None, **settings):
    """(results, weights, norm of the last gradient computed from its parts) after STEPS steps of a new engine."""
    engine = engine_of(world, model, **settings)
    results = steps(engine, 0, STEPS, **({"read_gradient": True} if options is None else options))
    whole, norm = weights(engine, folder), norm_of_parts(engine) if engine.gradient_squares else None
    engine.close()
    return results, whole, norm


def assert_follows(dense, got, terms=STANDIN_TERMS) -> None:
    """Compares results and weights. Each step adds the rounding errors of the steps before."""
    results, whole, _ = got
    for step, (result, (loss, norm)) in enumerate(zip(results, dense.curve, strict=True), 1):
        assert_sums_close(result.loss, loss, step * terms, f"loss of step {step}")
        assert_sums_close(result.grad_norm, norm, step * terms, f"gradient norm of step {step}")
    assert_all_close(whole, dense.weights, len(results) * terms, reach=dense.reach)


def on_two_ranks(folder):
    world = start_world()
    run = lambda name, **settings: trained(world, folder / name, **settings)  # noqa: E731
    answers = {
        "zero3": run("3"),
        "zero2": run("2", stage=2),
        "zero1": run("1", stage=1),
        "offload": run("offload", offload=True),
        "bf16 zero3": run("b3", bf16=True),
        "bf16 zero2": run("b2", bf16=True, stage=2),
        "bf16 zero1": run("b1", bf16=True, stage=1),
        "recomputed": run("recomputed", model=StandIn(checkpointing=True)),
        **{
            (name, keep): run(f"{name}, {keep}", options={"keep": keep, "read_gradient": True}, **KINDS[name])
            for name in KINDS
            for keep in (0, 2)
        },
        "recomputed, 2": run("recomputed, 2", model=StandIn(checkpointing=True), options={"keep": 2}),
        "gathered": {keep: gathered(world, keep) for keep in (0, 1, 2)},
    }
    return answers | {
        "unused": unused(world, folder / "unused"),
        "some empty": empty(world, [0, 1, 3]),
        "all empty": empty(world, range(LANES)),
        "nan": poisoned(world, folder / "nan"),
    }


def gathered(world, keep):
    """Number of gathered weights when a backward pass reaches the first block, for each pack of a step with ZeRO-3."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    engine, seen = engine_of(world, StandIn(depth=4), kept_whole=0), []
    parameters = list(engine.module.parameters())
    whole = lambda *_: seen.append(sum(p.ds_status == ZeroParamStatus.AVAILABLE for p in parameters))  # noqa: E731
    engine.module.blocks[0].register_full_backward_hook(whole)
    steps(engine, 0, 2, keep=keep)
    engine.close()
    return seen


def unused(world, folder):
    """`spare` before and after a step that does not use it, for each ZeRO stage."""
    answers = {}
    for stage in (3, 2, 1):
        engine = engine_of(world, stage=stage, betas=(0.0, 0.98))
        steps(engine, 0, 3)
        before = weights(engine, folder)["spare.weight"]
        engine.module.use_spare = False
        steps(engine, 3, 4)
        answers[stage] = before, weights(engine, folder)["spare.weight"]
        engine.close()
        engine.close()  # as at the end of a run whose next engine cannot be built
    return answers


def empty(world, lanes):
    engine = engine_of(world)
    packs = [pack(0, lane, empty=lane in lanes) for lane in world.lanes(LANES)]
    result = train_step(engine, packs, StepSettings(1e-3), OBJECTIVE)
    engine.close()
    return result


def poisoned(world, folder):
    """The outputs of the model are NaN on one rank. Returns the error of each rank, and whether no weight has
    changed."""
    engine = engine_of(world)
    steps(engine, 0, 2)
    before = weights(engine, folder)
    packs = [pack(2, lane) for lane in world.lanes(LANES)]
    if world.rank == 1:
        forward = engine.module.forward
        engine.module.forward = lambda *inputs: tuple(output * float("nan") for output in forward(*inputs))
    try:
        train_step(engine, packs, StepSettings(1e-3), OBJECTIVE)
        message = "nothing"
    except DivergedError as error:
        message = str(error)
    after = weights(engine, folder)
    return message, all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_distributed(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.numeric
@pytest.mark.parametrize("engine", ["zero3", "zero2", "zero1", "offload"])
def test_two_ranks_train_as_one_process_of_plain_torch(dense, two_ranks, engine):
    assert_follows(dense, two_ranks[0][engine])


@pytest.mark.numeric
@pytest.mark.parametrize("engine", ["bf16 zero3", "bf16 zero2", "bf16 zero1"])
def test_bf16_equals_plain_fp32_up_to_its_rounding(dense, two_ranks, engine):
    results, whole, _ = two_ranks[0][engine]
    wanted_losses, wanted_norms = zip(*dense.curve, strict=True)
    assert_sums_close(losses(results), wanted_losses, HALF_NUMBER_TERMS, "losses", dtype=torch.bfloat16)
    norms = [result.grad_norm for result in results]
    assert_sums_close(norms, wanted_norms, HALF_NORM_TERMS, "gradient norms", dtype=torch.bfloat16)
    reach = dense_training(StandIn(), STEPS, lr=lr, clip=1.0, terms=HALF_TERMS, dtype=torch.bfloat16).reach
    start = StandIn().state_dict()
    stored = {name: value.bfloat16() for name, value in start.items()}  # the master weights are copies of these
    runs = ((whole, stored), (dense.weights, start))
    moves = [torch.cat([(after[name] - before[name]).flatten() for name in reach]) for after, before in runs]
    assert_sums_close(*moves, 0, "moves", dtype=torch.bfloat16, reach=torch.cat([x.flatten() for x in reach.values()]))


@pytest.mark.numeric
@pytest.mark.parametrize("engine", ["zero3", "zero2", "zero1", "offload", "bf16 zero3", "bf16 zero2", "bf16 zero1"])
def test_the_norm_of_a_gradient_follows_from_its_parts_on_all_ranks(two_ranks, engine):
    results, _, norm = two_ranks[0][engine]
    assert_sums_close(norm, results[-1].grad_norm, PARAMETERS)


def test_activation_checkpointing_changes_no_bit(two_ranks):
    (plain, plain_weights, _), (recomputed, recomputed_weights, _) = (
        two_ranks[0][name] for name in ("zero3", "recomputed")
    )
    assert plain == recomputed
    assert all(torch.equal(recomputed_weights[name], value) for name, value in plain_weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_packs_that_run_once_change_no_bit(two_ranks, kind):
    """On two ranks with two packs each, none, one or both packs keep their graph and run once."""
    for answers in two_ranks:
        (never, never_weights, norm) = answers[kind, 0]
        for results, whole, other in (answers[kind], answers[kind, 2]):
            assert results == never
            assert other == norm
            assert all(torch.equal(whole[name], value) for name, value in never_weights.items())


def test_packs_that_run_once_and_recompute_their_blocks_change_no_bit(two_ranks):
    (never, never_weights, _), (both, weights, _) = two_ranks[0]["zero3", 0], two_ranks[0]["recomputed, 2"]
    assert both == never
    assert all(torch.equal(weights[name], value) for name, value in never_weights.items())


def test_zero3_releases_the_weights_in_every_backward_pass_of_packs_that_run_once(two_ranks):
    for answers in two_ranks:
        seen = answers["gathered"]
        assert len(seen[0]) == 4, "two steps of two packs"
        assert max(seen[0]) < sum(1 for _ in StandIn(depth=4).parameters()) / 2
        assert max(seen[1]) <= max(seen[0])
        assert max(seen[2]) <= max(seen[0])


@pytest.mark.parametrize("stage", [3, 2, 1])
def test_a_parameter_that_a_step_does_not_use_changes_only_by_weight_decay(two_ranks, stage):
    """Three steps have used it. Without momentum, AdamW's update for a zero gradient is only the weight decay."""
    before, after = two_ranks[0]["unused"][stage]
    assert not torch.equal(before, StandIn().spare.weight), "the steps before did not use it"
    assert torch.equal(after, before * (1 - lr(3) * 0.1))


def test_packs_without_items_on_some_or_all_ranks_are_trained(two_ranks):
    for answer in two_ranks:
        assert answer["some empty"].items == len(pack(0, 2).caption_ids)
        assert answer["some empty"].loss > 0
        assert (answer["all empty"].loss, answer["all empty"].items, answer["all empty"].grad_norm) == (0.0, 0, 0.0)


def test_a_loss_that_is_not_finite_on_one_rank_raises_the_same_error_on_all(two_ranks):
    messages = [answer["nan"][0] for answer in two_ranks]
    assert messages[0] == messages[1]
    assert "the loss is nan" in messages[0]
    assert all(answer["nan"][1] for answer in two_ranks), "the weights changed"


def encoder_on_two_ranks(folder, compiled):
    """The real encoder with every parameter partitioned. A weight that is not declared in `external_parameters`
    fails."""
    from deepspeed.runtime.zero import parameter_offload

    def found(module, parameter):
        name, shape = type(module).__name__, parameter.ds_shape
        raise AssertionError(f"{name} uses a weight of shape {shape} not in `external_parameters`")

    parameter_offload.register_external_parameter = found
    world = start_world()
    compile_on_cpu(compiled)
    return {
        every: trained(world, folder / str(every), model=WithEncoder(checkpoint_every=every), kept_whole=0)
        for every in (0, 1, "selective")
    }


@pytest.mark.numeric
@pytest.mark.parametrize(
    "compiled", [pytest.param(False, id="plain"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
)
def test_weights_of_another_module_that_a_module_uses_are_gathered_with_its_own(compiled, tmp_path):
    model = WithEncoder()
    compile_on_cpu(compiled)  # the same rounding in both
    dense = dense_training(model, STEPS, lr=lr, clip=1.0)
    compile_on_cpu(False)
    answers = run_distributed(encoder_on_two_ranks, 2, tmp_path, compiled)
    for every in (0, 1, "selective"):
        assert_follows(dense, answers[0][every])
        results, whole, _ = answers[0][every]
        assert results == answers[0][0][0]
        assert all(torch.equal(whole[name], value) for name, value in answers[0][0][1].items())


def on_four_ranks(folder):
    world = start_world()
    return {
        "one pass": trained(world, folder / "one", options={}),
        "two passes": trained(world, folder / "two", options={"keep": 0, "read_gradient": True}),
        "watched": watched(world, folder / "watched"),
    }


def watched(world, folder):
    """As `trained` with one pass. On the first rank, a hook reads the output of a module."""
    engine, results = engine_of(world), []
    for step in range(STEPS):
        packs = [pack(step, lane) for lane in world.lanes(LANES)]
        with capture_features(engine.module.blocks[-1], packs[0] if world.is_main else None) as snapshots:
            results.append(train_step(engine, packs, StepSettings(lr(step)), OBJECTIVE))
        assert [len(snapshot.tokens) for snapshot in snapshots] == [packs[0].grid_thw.prod(1).sum()] * world.is_main
    whole = weights(engine, folder)
    engine.close()
    return results, whole


def test_a_single_pack_of_a_rank_runs_once_with_the_bits_of_running_twice_and_of_a_hook(dense, tmp_path):
    answers = run_distributed(on_four_ranks, 4, tmp_path)
    (once, once_weights, _), (twice, twice_weights, norm) = (answers[0][name] for name in ("one pass", "two passes"))
    assert once == twice
    assert all(torch.equal(twice_weights[name], value) for name, value in once_weights.items())
    assert_follows(dense, answers[0]["one pass"])
    assert losses(answers[0]["one pass"][0]) == losses(answers[3]["one pass"][0])
    assert_sums_close(norm, twice[-1].grad_norm, PARAMETERS)
    results, watched_weights = answers[0]["watched"]
    assert results == once
    assert all(torch.equal(watched_weights[name], value) for name, value in once_weights.items())


def on_one_rank(folder):
    world = start_world()
    settings = {"zero3": {}, "zero1": {"stage": 1}, "bf16 zero1": {"bf16": True, "stage": 1}}
    return {name: trained(world, folder / name, **setting) for name, setting in settings.items()}


@pytest.mark.numeric
def test_the_norm_of_a_gradient_follows_from_its_parts_on_one_rank_too(tmp_path):
    for results, _, norm in run_distributed(on_one_rank, 1, tmp_path)[0].values():
        assert_sums_close(norm, results[-1].grad_norm, PARAMETERS)


LONG = 50


def long_training(folder):
    """(losses, weights) after LONG steps on any number of ranks."""
    world = start_world()
    engine = engine_of(world)
    results = steps(engine, 0, LONG)
    whole = weights(engine, folder / str(world.size))
    engine.close()
    return losses(results), whole


def held_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = [object_.untyped_storage() for object_ in gc.get_objects() if issubclass(type(object_), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def opened_and_closed():
    """Bytes before, with and after an engine of each kind, and the number of modules that DeepSpeed lists as
    running."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    world, answers = start_world(), {}
    for name, settings in KINDS.items():
        before = held_bytes()
        engine = engine_of(world, StandIn(checkpointing=True), **settings)
        lengths = [steps(engine, step, step + 1) and len(FWD_MODULE_STACK) for step in range(3)]
        opened = held_bytes()
        engine.close()
        answers[name] = before, opened, held_bytes(), lengths, len(FWD_MODULE_STACK)
    return answers


def test_a_closed_engine_holds_no_memory_and_an_open_one_does_not_grow():
    (answers,) = run_distributed(opened_and_closed, 1)
    for name, (before, opened, closed, lengths, left) in answers.items():
        assert opened > before + 100_000, name
        assert closed == before, name
        assert len(set(lengths)) == 1, name
        assert left == 0, name


@pytest.mark.slow
@pytest.mark.numeric
def test_fifty_steps_on_one_two_and_four_ranks_are_the_same_training(tmp_path):
    dense = dense_training(StandIn(), LONG, lr=lr, clip=1.0)
    answers = [run_distributed(long_training, size, tmp_path)[0] for size in (1, 2, 4)]
    for curve, whole in answers:
        assert curve[-1] < curve[0]
        for step, (loss, (wanted, _)) in enumerate(zip(curve, dense.curve, strict=True), 1):
            assert_sums_close(loss, wanted, step * STANDIN_TERMS, f"loss of step {step}")
        assert_all_close(whole, dense.weights, LONG * STANDIN_TERMS, reach=dense.reach)
