"""The operations compiled for the CPU: against the reference in float64, over pack lengths, without a compiler."""

import gc
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.closeness import assert_all_close, assert_sums_close, rounding
from tests.support.golden import CASES, golden
from tests.support.progress import output_of
from tests.unit.model.made import GRIDS, drawn_patches, small_encoder
from univitar_ds import UniViTAR
from univitar_ds.config.model import ModelConfig
from univitar_ds.kernels import compiled, dispatch, reference
from univitar_ds.model.config import compiles

EPS, THETA = 1e-6, 10000.0
HEADS, HEAD, INNER = 3, 20, 52
WIDTH = HEADS * HEAD
OPERATIONS = ("rms_norm", "add_norm", "swiglu_norm", "rope2d_qk_norm")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def on_cpu():
    """The compiled operations for whatever runs on the CPU."""
    dispatch.compile_on_cpu(True)
    yield
    dispatch.compile_on_cpu(False)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled.Region, "failed", True)


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs_of(operation, tokens):
    """(tensors that get gradients, the function of a module and those tensors)."""
    rows, weights = draw(2, tokens, WIDTH, seed=1).unbind(), draw(2, WIDTH, seed=2).unbind()
    if operation == "rms_norm":
        return (rows[0], weights[0]), lambda of, *x: of.rms_norm(*x, EPS)
    if operation == "add_norm":
        return (*rows, *weights), lambda of, *x: of.add_norm(*x, EPS)
    if operation == "swiglu_norm":
        inner = draw(2, tokens, INNER, seed=5)
        return (*inner.unbind(), draw(INNER, seed=6)), lambda of, *x: of.swiglu_norm(*x, EPS)
    positions = torch.stack((torch.arange(tokens) % 7, torch.arange(tokens) * 5 % 61), 1)
    call = lambda of, *x: of.rope2d_qk_norm(x[0], positions, *x[1:], theta=THETA, eps=EPS)  # noqa: E731
    return (draw(tokens, 3, HEADS, HEAD, seed=7), *weights), call


def results(call, module, inputs):
    """Outputs, then gradients of all inputs, for gradients of the outputs that a seed gives."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = call(module, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [draw(*output.shape, seed=11 + i).bfloat16().to(output.dtype) for i, output in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.numeric
@pytest.mark.parametrize("tokens", [37, 2, 1, 0, 100, WIDTH])
@TYPES
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_and_every_gradient_are_the_references(operation, dtype, tokens):
    inputs, call = inputs_of(operation, tokens)
    inputs = [x.to(dtype) for x in inputs]
    exact = results(call, reference, [x.double() for x in inputs])
    # The sum that add_norm keeps for the backward is stored; whether the norm sees it so is the compiler's choice.
    stored = rounding(dtype) if operation == "add_norm" and dtype == torch.bfloat16 else 0.0
    for mine, wanted in zip(results(call, compiled, inputs), exact, strict=True):
        assert mine.dtype == dtype
        reach = stored * wanted.abs().max().item() if tokens else 0.0
        assert_sums_close(mine, wanted, tokens + WIDTH, reach=reach)
    assert not compiled.Region.failed


@pytest.mark.numeric
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_gradients_written_by_hand_are_exact(operation, uncompiled):
    inputs, call = inputs_of(operation, 5)
    for mine, wanted in zip(results(call, compiled, inputs), results(call, reference, inputs), strict=True):
        # In float64, but for the tables of sines and cosines.
        assert_sums_close(mine, wanted, 5 + WIDTH, dtype=torch.float32 if operation == "rope2d_qk_norm" else None)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_packs_of_all_lengths_frozen_weights_and_evaluation_run_the_same_code(operation):
    inputs, call = inputs_of(operation, 37)
    results(call, compiled, [x.float() for x in inputs])
    known = counters["stats"]["unique_graphs"]
    for tokens in (2, 3, 64, 90, 333):
        inputs = [x.float() for x in inputs_of(operation, tokens)[0]]
        call = inputs_of(operation, tokens)[1]
        results(call, compiled, inputs)
        with torch.no_grad():
            call(compiled, *inputs)
        call(compiled, inputs[0].requires_grad_(), *inputs[1:])
    assert counters["stats"]["unique_graphs"] == known


def test_without_norms_of_q_and_k_only_the_reference_turns():
    qkv, positions = draw(5, 3, HEADS, HEAD, seed=1).float(), torch.arange(10).view(5, 2)
    mine = compiled.rope2d_qk_norm(qkv, positions, None, None, theta=THETA, eps=EPS)
    wanted = reference.rope2d_qk_norm(qkv, positions, None, None, theta=THETA, eps=EPS)
    assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_tables_are_shared_by_the_layers_of_a_pack_and_go_with_it(monkeypatch, uncompiled):
    qkv, positions = draw(7, 3, HEADS, HEAD, seed=1).float(), torch.arange(14).view(7, 2)
    weight = torch.ones(WIDTH)
    made = []

    def angles(positions, width, theta, dtype, real=reference.rope2d_angles):
        made.append(real(positions, width, theta, dtype))
        return made[-1]

    def kept():
        gc.collect()
        tensors = (one for one in gc.get_objects() if type(one) is torch.Tensor)
        return sum(one.shape == made[0].shape and not any(one is other for other in made) for one in tensors)

    monkeypatch.setattr(reference, "rope2d_angles", angles)
    for theta, tables in ((THETA, 1), (THETA, 1), (100.0, 2)):
        with torch.no_grad():
            compiled.rope2d_qk_norm(qkv, positions, weight, weight, theta=theta, eps=EPS)
        assert len(made) == tables
    before = kept()
    del positions
    assert kept() == before - 4, "cosines and sines for two values of theta"


@pytest.mark.numeric
@pytest.mark.parametrize("case", CASES)
def test_the_encoder_gives_the_releases_numbers(case, on_cpu):
    numbers = golden(case)
    model = UniViTAR.from_pretrained(numbers.folder)
    output = model(numbers.pixel_values, numbers.grid_thw)
    assert_sums_close(output, numbers.last_hidden_state, numbers.terms)
    ((output * numbers.loss_weight).sum() / output.numel()).backward()
    assert_all_close({n: p.grad for n, p in model.named_parameters()}, numbers.grads, numbers.gradient_terms)
    assert not compiled.Region.failed


@pytest.mark.slow
@TYPES
def test_recomputing_blocks_changes_no_bit(dtype, on_cpu):
    grads = []
    for every in (0, 1, "selective"):
        model = small_encoder(hidden_size=128, num_attention_heads=2).to(dtype)
        model.checkpoint_every = every
        model(drawn_patches(GRIDS), GRIDS).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))
    assert not compiled.Region.failed


def test_the_choice_follows_the_wish_but_not_in_float64(on_cpu, monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.choose("cpu", torch.bfloat16)[0] == "compiled"
    assert dispatch.choose("cpu", torch.float64)[0] == "reference"
    dispatch.compile_on_cpu(False)
    assert dispatch.choose("cpu", torch.bfloat16)[0] == "reference"


def test_only_encoders_that_gain_by_it_are_compiled_of_themselves():
    said = lambda size, wish: compiles(ModelConfig(encoder=size, compile=wish))  # noqa: E731
    assert [said(size, "auto") for size in ("tiny", "0.3b", "0.6b", "1b")] == [False, True, True, True]
    assert said("tiny", "on")
    assert not said("1b", "off")


PROGRAM = """
import hashlib, logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
torch.set_num_threads(1)
from univitar_ds.kernels import compiled
x = torch.randn(50, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
weight = torch.linspace(-1, 1, 48).requires_grad_()
for _ in range(2):
    y = compiled.rms_norm(x, weight, 1e-6)
    y.square().sum().backward()
print(compiled.Region.failed, *(hashlib.sha256(t.detach().numpy()).hexdigest() for t in (y, x.grad, weight.grad)))
"""


def start(cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
    )  # fmt: skip


def end(process):
    out, err = output_of(process, "the program")
    assert process.returncode == 0, err
    failed, *hashes = out.split()
    return SimpleNamespace(failed=failed == "True", hashes=hashes, err=err)


@pytest.mark.slow
def test_two_processes_that_compile_at_once_get_the_same_bits(tmp_path):
    both = [end(process) for process in (start(tmp_path), start(tmp_path))]
    assert not both[0].failed
    assert both[0].hashes == both[1].hashes


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/bin/false"])
def test_without_a_working_compiler_plain_torch_runs_and_one_message_reports_it(compiler, tmp_path):
    plain = end(start(tmp_path, CXX=compiler))
    assert plain.failed
    assert plain.err.count("WARNING torch.compile failed, the token-wise operations run as plain torch") == 1
    assert "a C++ compiler such as g++ is needed" in plain.err
