"""The project's ZeRO-3, which splits for all ranks at once and gathers whole blocks, compared with DeepSpeed's own."""

import copy
import cProfile
import pstats

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks.bench_host import (
    Collectives,
    Shape,
    build,
    configuration,
    engine_step,
    fake_world,
    pack,
    plain_step,
)
from tests.support.closeness import assert_sums_close
from tests.support.dense import dense_training
from tests.support.distributed import run_distributed
from tests.support.standin import STANDIN_TERMS, StandIn, WithEncoder
from tests.support.training import engine_of, lr, steps, weights
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine import engine as engine_module
from univitar_ds.training.engine import zero3
from univitar_ds.training.engine.engine import build_engine, load_deepspeed
from univitar_ds.training.engine.zero3 import reduce_scatter

pytestmark = pytest.mark.distributed
STEPS = 3
MODELS = {
    "recomputed": (lambda: StandIn(checkpointing=True), 50),
    "frozen inlet": (lambda: frozen(WithEncoder()), 0),
}
"""Models, and the number of elements up to which DeepSpeed keeps a tensor whole on every rank."""


def frozen(model):
    """Freezes the embeddings, so that no input of the first block has a gradient: DeepSpeed cannot detect the end of
    its backward pass."""
    model.vision.embeddings.requires_grad_(False)
    return model


def as_deepspeed_does(monkeypatch) -> None:
    """Makes the engine of this process gather module by module, with slices for each rank, as DeepSpeed does."""

    class NoBlocks(engine_module.Blocks):
        def parameters(self):
            return iter(())

        def remove_inner_hooks(self):
            pass

    monkeypatch.setattr(engine_module, "Blocks", NoBlocks)
    monkeypatch.setattr(engine_module, "cut_for_all_ranks", lambda engine: None)


def with_deepspeeds_functions(monkeypatch) -> None:
    """Makes DeepSpeed's functions gather, free and sum, with the blocks and slices of this project."""
    from deepspeed.runtime.zero import linear

    for kind in (zero3.Fetching, zero3.GradientBuckets):
        monkeypatch.setattr(kind, "can_replace", staticmethod(lambda *_: False))
    monkeypatch.setattr(zero3, "Freeing", lambda parameter, original, accelerator: original)
    monkeypatch.setattr(zero3, "replace_functions", lambda module, offload: None)
    monkeypatch.setattr(zero3, "Linear", linear.LinearFunctionForZeroStage3)  # the original; ours is set last


def trained(folder):
    """Results and weights of each model with DeepSpeed's ZeRO-3, with the project's blocks and DeepSpeed's functions,
    and with the project's ZeRO-3, in this order."""
    world, answers = start_world(), {}
    load_deepspeed()
    for way in ("deepspeed", "ours with its functions", "ours"):
        with pytest.MonkeyPatch.context() as patch:
            if way == "deepspeed":
                as_deepspeed_does(patch)
            elif way != "ours":
                with_deepspeeds_functions(patch)
            for name, (model, kept_whole) in MODELS.items():
                engine = engine_of(world, model(), kept_whole=kept_whole)
                results = steps(engine, 0, STEPS)
                answers[way, name] = results, weights(engine, folder / name)
                engine.close()
    return answers


def assert_same_training(answers) -> None:
    """Compares results and weights. Sums of a backward pass may have another order, since there are fewer hooks."""
    for name, (model, _) in MODELS.items():
        reach = dense_training(model(), STEPS, lr=lr, clip=1.0).reach
        (theirs, their_weights), (ours, our_weights) = (answers[way, name] for way in ("deepspeed", "ours"))
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
            assert_sums_close(one.loss, other.loss, step * STANDIN_TERMS, f"loss of step {step}, {name}")
            assert_sums_close(one.grad_norm, other.grad_norm, step * STANDIN_TERMS, f"norm of step {step}, {name}")
        assert our_weights.keys() == their_weights.keys()
        for key, value in our_weights.items():
            if not key.endswith("qkv.bias"):  # the gradient of its K part is rounding error, which Adam scales up
                terms, amplified = len(ours) * STANDIN_TERMS, reach.get(key, 0.0)
                assert_sums_close(value, their_weights[key], terms, f"{key}, {name}", reach=amplified)


@pytest.mark.numeric
def test_two_ranks_train_as_with_deepspeeds_own_zero3(tmp_path):
    for answers in run_distributed(trained, 2, tmp_path):
        assert_same_training(answers)
        for name in MODELS:
            (theirs, their_weights), (ours, our_weights) = (
                answers[way, name] for way in ("ours with its functions", "ours")
            )
            assert ours == theirs
            assert all(torch.equal(value, their_weights[key]) for key, value in our_weights.items()), name


def shares():
    """Shares of tensors whose sizes the number of ranks does not divide, by both functions."""
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    world = start_world()
    engine_of(world).close()  # starts DeepSpeed's communication
    generator, answers = torch.Generator().manual_seed(world.rank), []
    for shapes in ([(7, 3)], [(6, 2)], [(1,), (5,), (4, 3), (2,)], [(2, 2), (2,)], [(1,)]):
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        wanted = reduce_scatter_coalesced([tensor.clone() for tensor in tensors])
        answers.append((wanted, reduce_scatter([tensor.clone() for tensor in tensors])))
    return answers


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shares_of_a_sum_are_those_of_deepspeeds_function(size):
    for answers in run_distributed(shares, size):
        for wanted, got in answers:
            assert [len(share) for share in got] == [len(share) for share in wanted]
            assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def counted(ranks, shape):
    """Collectives by kind and torch's operators in one step on `ranks` ranks, and the tensors of the model.

    Kernels read weights by address, so the weights that a module uses must be contiguous.
    """

    def contiguous(module, _):
        for name, parameter in module.named_parameters(recurse=False):
            assert parameter.is_contiguous(), f"{name}, {list(parameter.shape)}, has the strides {parameter.stride()}"

    world = fake_world(ranks)
    model = build(shape)
    engine = build_engine(model, OptimizerConfig(), configuration("zero3", shape, model), world)
    for _ in range(4):
        engine_step(engine, pack())
    register_module_forward_pre_hook(contiguous)  # the process ends with this function
    with Collectives() as collectives:
        engine_step(engine, pack())
    return collectives.by_kind(), collectives.operators, sum(1 for _ in engine.module.parameters())


def test_a_step_takes_as_many_operators_and_collectives_at_1024_ranks_as_at_8():
    (few, few_operators, tensors), (many, many_operators, _) = (
        run_distributed(counted, 1, ranks, Shape(2, 2))[0] for ranks in (8, 1024)
    )
    assert few == many
    assert few["collectives"] < tensors / 2
    # A tensor whose size the ranks do not divide is padded, at most once for its parts in the sum and in the whole.
    assert many_operators <= few_operators + 3 * tensors


def python_calls(ranks, shape):
    """Calls of Python functions in a step of the engine, and in one of the plain model."""
    world = fake_world(ranks)
    model = build(shape)
    plain = copy.deepcopy(model).bfloat16()
    engine = build_engine(model, OptimizerConfig(), configuration("zero3_node", shape, model), world)
    answers = []
    for step in (lambda: engine_step(engine, pack()), lambda: plain_step(plain, pack())):
        for _ in range(4):
            step()
        profile = cProfile.Profile()
        profile.runcall(step)
        answers.append(pstats.Stats(profile).total_calls)
    return answers


def test_a_step_makes_as_many_python_calls_on_any_number_of_ranks_and_few_for_each_tensor():
    """About 200 in addition to those of the plain model. DeepSpeed's own functions make 850 for each tensor."""
    shape = Shape(2, 2)
    tensors = sum(1 for _ in build(shape).parameters())
    (few, plain), (many, _) = (run_distributed(python_calls, 1, ranks, shape)[0] for ranks in (8, 1024))
    assert few - plain < 300 * tensors
    assert many - few < 20 * tensors


@pytest.mark.slow
def test_the_whole_model_takes_at_most_60_collectives_a_step():
    counts, _, tensors = run_distributed(counted, 1, 256, Shape())[0]
    assert tensors == 590
    assert 10 <= counts["collectives"] <= 60
