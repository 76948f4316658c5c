"""Predicts the time of a training step on GPUs by part, as counted work divided by assumed rates.

The work is counted: FLOPs, bytes, launches and collectives. Tests compare the counts with the real model and engine on
a CPU. The rates are published, measured on a CPU or chosen (`ASSUMPTIONS`, `gpus.GPUS`); none was measured on a GPU.
The prediction shows which part limits a step and what a change would gain, within the error of the rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import TextConfig
from univitar_ds.model.blocks.activations import Kind
from univitar_ds.model.blocks.rank_group import sharing_bytes, sharing_collectives
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.planning.gpus import GPUS_OF_A_NODE, Assumption, Gpu

ATTENTION_BACKWARD = 2.5
"""Ratio of the FLOPs of attention in the backward pass to those in the forward pass: five products to two, since
flash-attn recomputes the logits. MFU counts a ratio of 2, see `model.flops`."""
FORWARD_LAUNCHES = {"fused": 4, "product": 5, "attention": 1, "other": 1}
BACKWARD_LAUNCHES = {"fused": 4, "product": 10, "attention": 1, "other": 21}
"""Kernel launches of a block by kind of operation, counted."""
SUMS_OF_FUSED = 12
"""Sums and casts of partial results among BACKWARD_LAUNCHES["other"]. `fused_backward` includes their time."""
MUON_LAUNCHES = 3
"""Matrix products in an iteration of Muon."""
BF16, FP32 = 2, 4

ASSUMPTIONS = {
    "bandwidth_share": Assumption(0.8, "of the published bandwidth", "chosen", "of token-wise kernels"),
    "link_share": Assumption(0.7, "of the published links", "chosen", "large collectives of NCCL"),
    "overlap": Assumption(0.8, "of the compute time", "chosen", "in which transfers of weights and gradients can hide"),
    "latency": Assumption(15e-6, "s per doubling of the ranks", "chosen", "of a collective, beside its transfer"),
    "fused_forward": Assumption(
        42e-6, "s", "measured", "host time of a Triton operation with autograd, JIT path with a driver without a GPU"
    ),
    "fused_backward": Assumption(178e-6, "s", "measured", "the same, backward with the sums of its partial results"),
    "launch": Assumption(10e-6, "s", "chosen", "host time of any other launch; 5 measured for a sum without autograd"),
    "plain_block": Assumption(
        2.8e-3, "s", "measured", "CPU time of a block without DeepSpeed, forward and backward, the unit of host ratios"
    ),
    "kernel": Assumption(5e-6, "s", "chosen", "shortest time of a kernel on the device"),
    "optimizer_bytes": Assumption(90, "bytes a weight", "derived", "AdamW in passes over master, moments and average"),
    "update": Assumption(6e-3, "s", "chosen", "norm, clipping and small operations of an update"),
    "fp32_share": Assumption(0.07, "of the bf16 peak", "published", "fp32 products, of the same data sheets"),
    "teacher_layer_bytes": Assumption(60, "bytes a token and channel", "chosen", "token-wise kernels of a layer"),
    "teacher_launches": Assumption(15, "launches a layer", "chosen", "of transformers' DINOv2"),
    "text_layer_bytes": Assumption(200, "bytes a token and channel", "chosen", "text tower, forward and backward"),
    "text_launches": Assumption(45, "launches a layer", "chosen", "text tower, forward and backward"),
    "caption_tokens": Assumption(20, "tokens", "chosen", "mean of a caption, of the text tower's context length"),
    "free_memory": Assumption(0.85, "of the memory", "chosen", "what activations, weights and buffers may take"),
    "buffers": Assumption(8e9, "bytes", "chosen", "communication buffers, teacher, pixels, loss and CUDA's own"),
}  # fmt: skip


def _of(name: str) -> float:
    """Returns the value of an assumption."""
    return ASSUMPTIONS[name].value


@dataclass(frozen=True)
class Teacher:
    """A teacher, which is a frozen ViT. `products`: FLOPs of matrix products per token and layer, per squared width."""

    width: int = 1024
    layers: int = 24
    products: int = 24


@dataclass(frozen=True)
class MuonWork:
    """The work of Muon in an update.

    `flops`: of the rank with the most work; `flops_of_all`: of all ranks that share the matrices; `iterations`: of the
    rank with the most, summed over its matrices; `bytes`: that a rank sends; `fp32`: whether the products are in
    float32.
    """

    flops: float
    flops_of_all: float
    iterations: int
    bytes: float
    fp32: bool = False


@dataclass(frozen=True)
class Work:
    """What a step computes.

    `parameters`: number of trained parameters, of both towers; `token_budget`: of a pack; `tokens_per_item`: mean;
    `attended`: mean number of tokens that a token attends to, which is the sum of the squared lengths of items over the
    sum of their lengths; `sizes`: number of different item sizes in a pack; `checkpoint_every`: recomputation; `chunk`:
    texts that the loss compares at a time; `fill`: mean share of `token_budget` that a pack fills; `teacher`: None
    without distillation; `muon`: None with another optimizer.
    """

    name: str
    encoder: EncoderConfig
    text: TextConfig
    embed_dim: int
    parameters: int
    token_budget: float
    tokens_per_item: float
    attended: float
    sizes: int
    lanes: int
    checkpoint_every: Kind
    chunk: int = 4096
    fill: float = 1.0
    teacher: Teacher | None = field(default_factory=Teacher)
    muon: MuonWork | None = None

    @property
    def tokens(self) -> float:
        """Tokens of a pack."""
        return self.fill * self.token_budget

    @property
    def items(self) -> float:
        """Items of a pack."""
        return self.tokens / self.tokens_per_item

    @property
    def flops(self) -> float:
        """FLOPs of the encoder for a pack, forward and backward, as MFU counts them: without recomputation."""
        linear, square = cost_coefficients(self.encoder)
        return self.tokens * (linear + square * self.attended)


@dataclass(frozen=True)
class Method:
    """How a step is computed.

    `zero`: ZeRO stage; `host_ratio`: ratio of the host time of a step with the engine to that without DeepSpeed, by
    number of ranks, from rows of `benchmarks/bench_host.py`; `update_collectives`: number of collectives at the end of
    a step; `recompute_by_memory`: whether as few blocks are recomputed as memory demands, instead of every
    `Work.checkpoint_every`-th; `kept_packs`: packs of a rank whose autograd graph is kept, so that their forward pass
    runs once; `ring`: whether the loss sends texts round a ring of ranks, instead of gathering them; `loss_kernels`:
    kernels of the loss for a chunk; `teacher_by_size`: whether the teacher runs once for each item size, instead of
    once for a pack; `packed_text`: whether texts run without padding; `imbalance`: longest over mean predicted time of
    the packs of a step; `fused_host`: host time of a fused launch, as a multiple of that in ASSUMPTIONS; `node`: GPUs
    of a machine; `tensor`: ranks that share the weights of each block; `sequence`: ranks that share the tokens of each
    pack.
    """

    zero: int
    host_ratio: Mapping[int, float]
    update_collectives: int
    recompute_by_memory: bool
    kept_packs: int
    ring: bool
    loss_kernels: int
    teacher_by_size: bool
    packed_text: bool
    imbalance: float
    fused_host: float
    node: int = GPUS_OF_A_NODE
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True)
class StepTime:
    """The predicted time of a step.

    `parts`: seconds by part, whose sum is the time of the step: work of the device, time by which the host takes
    longer, and waits; `flops`: of a rank, as MFU counts them; `tokens`: of a rank; `peak`: of a GPU in FLOP/s.
    """

    parts: Mapping[str, float]
    flops: float
    tokens: float
    peak: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, between 0 and 1."""
        return self.flops / self.seconds / self.peak


def forward_bytes(config: EncoderConfig) -> int:
    """Returns the bytes per token that the token-wise kernels of a block's forward pass move, in bf16."""
    return 28 * config.hidden_size + 6 * config.inner_width + 16


def backward_bytes(config: EncoderConfig) -> int:
    """Returns the bytes per token that the token-wise kernels of a block's backward pass move, in bf16."""
    return 68 * config.hidden_size + 14 * config.inner_width + 16


def kept_bytes(config: EncoderConfig) -> int:
    """Returns the bytes per token that a block keeps for its backward pass, in bf16."""
    return 24 * config.hidden_size + 6 * config.inner_width + 16


def predict(work: Work, gpu: Gpu, ranks: int, method: Method) -> StepTime:
    """Returns the predicted time of a step on `ranks` GPUs, whose number divides the lanes or is a multiple of them.

    With more ranks than lanes, one lane for each rank is assumed. Ranks that share packs or weights read the same lanes
    and count as one here.
    """
    readers = ranks // (method.tensor * method.sequence)
    lanes = max(work.lanes, readers)
    packs = lanes // readers
    blocks, ranks = work.encoder.parameter_count() // method.tensor, ranks // method.tensor
    own = work.parameters - work.encoder.parameter_count() + blocks
    work = replace(work, token_budget=work.token_budget / method.sequence, parameters=own)
    device = _device(work, gpu, ranks, method, packs)
    compute = sum(device.values())
    host = _host(work, ranks, method, packs, recomputed_share(work, gpu, ranks, method))
    alone = {
        "loss": _loss(work, gpu, ranks, method, packs),
        "optimizer": _optimizer(work, gpu, ranks, method),
        "collectives": _collectives(work, gpu, ranks, method, packs, compute),
        "host": max(0.0, host - compute),
        "imbalance": (method.imbalance - 1) * compute if packs == 1 else (method.imbalance - 1) * compute / packs**0.5,
    }
    if method.tensor * method.sequence > 1:
        again = recomputed_share(work, gpu, ranks, method)
        alone["sharing"] = _sharing(work, gpu, method, packs, again)
    shared = packs / method.tensor
    return StepTime({**device, **alone}, shared * work.flops, shared * work.tokens, gpu.peak.value)


def attention_weight(config: EncoderConfig, gpu: Gpu) -> float:
    """Returns the predicted time of attention per FLOP, divided by the time per FLOP of the rest of the encoder.

    FLOPs are counted as for MFU. `data.attention_cost` should have this value for this encoder and GPU.
    """
    linear, square = cost_coefficients(config)
    products, token_wise = _encoder_products(config, gpu), _token_wise(config, gpu)
    forward, backward = _attention(config, gpu)
    others = (sum(products) + sum(token_wise)) / linear
    return (forward + backward) / square / others


def recomputed_share(work: Work, gpu: Gpu, ranks: int, method: Method) -> float:
    """Returns the share of blocks whose whole forward pass runs again in the backward pass."""
    if not method.recompute_by_memory:
        return 1 / work.checkpoint_every if isinstance(work.checkpoint_every, int) and work.checkpoint_every else 0.0
    states = work.parameters * (BF16 + FP32 + (4 * FP32) / ranks)  # weights; gradients; master, moments, average
    free = _of("free_memory") * gpu.memory.value - states - _of("buffers")
    blocks = kept_bytes(work.encoder) * work.encoder.num_hidden_layers * work.token_budget
    return min(1.0, max(0.0, 1 - free / blocks))


def _selective(work: Work, method: Method) -> bool:
    """Whether the backward pass recomputes norms and gates, and nothing else."""
    return not method.recompute_by_memory and work.checkpoint_every == "selective"


def _encoder_products(config: EncoderConfig, gpu: Gpu) -> tuple[float, float]:
    """Returns the seconds per token of all matrix products of the encoder: (forward, backward)."""
    forward = cost_coefficients(config)[0] / 3 / gpu.products.value
    return forward, 2 * forward


def _token_wise(config: EncoderConfig, gpu: Gpu) -> tuple[float, float]:
    """Returns the seconds per token of all token-wise kernels of the encoder: (forward, backward)."""
    rate = config.num_hidden_layers / (_of("bandwidth_share") * gpu.bandwidth.value)
    return forward_bytes(config) * rate, backward_bytes(config) * rate


def _attention(config: EncoderConfig, gpu: Gpu) -> tuple[float, float]:
    """Returns the seconds per pair of tokens of all attention layers: (forward, backward)."""
    flops = cost_coefficients(config)[1] / 3
    return flops / gpu.attention_forward.value, ATTENTION_BACKWARD * flops / gpu.attention_backward.value


def _device(work: Work, gpu: Gpu, ranks: int, method: Method, packs: int) -> dict[str, float]:
    """Returns the seconds of work on the device for all packs of a rank, by part."""
    tokens, squares = packs * work.tokens, packs * work.tokens * work.attended
    products, token_wise = _encoder_products(work.encoder, gpu), _token_wise(work.encoder, gpu)
    attention = _attention(work.encoder, gpu)
    products = tuple(seconds / method.tensor for seconds in products)  # token-wise operations are mostly whole
    attention = tuple(seconds / method.tensor for seconds in attention)
    forward = tokens * (products[0] + token_wise[0]) + squares * attention[0]
    text = packs * _text(work, gpu, method)
    pooling = tokens * 3 * 4 * work.encoder.hidden_size**2 / gpu.products.value
    twice = max(0, packs - method.kept_packs) / packs if packs > 1 else 0.0
    return {
        "products": tokens * sum(products) + pooling,
        "attention": squares * sum(attention),
        "token-wise": tokens * sum(token_wise),
        "recomputation": recomputed_share(work, gpu, ranks, method) * forward
        + (tokens * token_wise[0] if _selective(work, method) else 0.0),
        "GradCache": twice * (forward + text / 3),
        "teacher": packs * _teacher(work, gpu, method),
        "text": text,
    }


def _text(work: Work, gpu: Gpu, method: Method) -> float:
    """Returns the seconds of the text tower for a pack, forward and backward."""
    text, width = work.text, work.text.hidden_size
    packed = min(_of("caption_tokens"), text.context_length)
    tokens = work.items * (packed if method.packed_text else text.context_length)
    products = 6 * (4 * width**2 + 2 * width * text.intermediate_size) * text.layers * tokens / gpu.products.value
    moved = _of("text_layer_bytes") * width * text.layers * tokens / (_of("bandwidth_share") * gpu.bandwidth.value)
    return max(products + moved, _of("text_launches") * text.layers * _of("launch"))


def _teacher(work: Work, gpu: Gpu, method: Method) -> float:
    """Returns the seconds of the teacher's forward pass for a pack. With one pass for each size, launches limit it."""
    teacher = work.teacher
    if teacher is None:
        return 0.0
    products = teacher.products * teacher.width**2 * teacher.layers * work.tokens / gpu.products.value
    squares = 4 * teacher.width * teacher.layers * work.tokens * work.attended / gpu.attention_forward.value
    moved = _of("teacher_layer_bytes") * teacher.width * teacher.layers * work.tokens
    computed = products + squares + moved / (_of("bandwidth_share") * gpu.bandwidth.value)
    passes = work.sizes if method.teacher_by_size else 1
    return max(computed, passes * teacher.layers * _of("teacher_launches") * _of("launch"))


def _loss(work: Work, gpu: Gpu, ranks: int, method: Method, packs: int) -> float:
    """Returns the seconds of the contrastive loss and its exchange of texts, once a step."""
    own = packs * work.items
    texts = own * ranks
    kernels = method.loss_kernels * (
        ranks * math.ceil(own / work.chunk) if method.ring else math.ceil(texts / work.chunk)
    )
    moved = 2 * FP32 * own * texts * method.loss_kernels / (_of("bandwidth_share") * gpu.bandwidth.value)
    products = 6 * own * texts * work.embed_dim / (_of("fp32_share") * gpu.peak.value)
    computed = max(kernels * max(_of("launch"), _of("kernel")), products + moved)
    if ranks == 1:
        return computed
    messages = 2 * ranks * _of("latency") if method.ring else 2 * _latency(ranks)
    return computed + messages + 2 * texts * work.embed_dim * FP32 / link_rate(gpu, ranks, method.node)


def _sharing(work: Work, gpu: Gpu, method: Method, packs: int, again: float) -> float:
    """Returns the seconds of the collectives within blocks, between ranks that share weights or tokens. They are not
    overlapped with computation. Args: again: share of blocks that are recomputed."""
    shape = work.encoder, method.tensor, method.sequence
    twice = max(0, packs - method.kept_packs) / packs if packs > 1 else 0.0
    passes = packs * (2 + again + twice)  # forward, backward, recomputed, without gradients
    ranks = method.tensor * method.sequence
    link = gpu.node_link if ranks <= method.node else gpu.network
    moved = work.tokens * sharing_bytes(*shape, number=BF16) / (_of("link_share") * link.value)
    return passes * (moved + sharing_collectives(*shape) * _latency(ranks))


def _optimizer(work: Work, gpu: Gpu, ranks: int, method: Method) -> float:
    """Returns the seconds of an update of a rank's share of the parameters."""
    share = work.parameters / ranks
    passes = _of("update") + _of("optimizer_bytes") * share / (_of("bandwidth_share") * gpu.bandwidth.value)
    return passes + (0.0 if work.muon is None else _muon(work.muon, gpu, ranks, method))


def _muon(muon: MuonWork, gpu: Gpu, ranks: int, method: Method) -> float:
    """Returns the seconds of Muon's iterations, and of the exchange of its matrices."""
    rate = _of("fp32_share") * gpu.peak.value if muon.fp32 else gpu.products.value
    computed = max(muon.flops / rate, muon.iterations * MUON_LAUNCHES * _of("launch"))
    return computed + (muon.bytes / link_rate(gpu, ranks, method.node) + 2 * _latency(ranks) if ranks > 1 else 0.0)


def step_bytes(parameters: int, zero: int, passes: int, backwards: int) -> dict[str, int]:
    """Returns the bytes of weights and gradients in the collectives of a step, in bf16, by kind of collective.

    With ZeRO-3 all weights are gathered for each pass, and gradients are reduce-scattered after each backward pass.
    With ZeRO-1 and ZeRO-2 weights are gathered once, after the update, and gradients are all-reduced: after each
    backward pass with ZeRO-2, once with ZeRO-1. Weights that ZeRO-3 would keep between passes
    (`stage3_max_live_parameters`) are counted as gathered again.

    Args: passes: forward passes of a step; backwards: those that are followed by a backward pass.
    """
    whole = BF16 * parameters
    if zero == 3:
        return {"allgather": whole * (passes + backwards), "reduce_scatter": whole * backwards}
    return {"allgather": whole, "allreduce": whole * (backwards if zero == 2 else 1)}


def _collectives(work: Work, gpu: Gpu, ranks: int, method: Method, packs: int, compute: float) -> float:
    """Returns the seconds of the transfers of weights and gradients that are not overlapped with computation."""
    if ranks == 1:
        return 0.0
    once = min(packs, method.kept_packs) if packs > 1 else 1
    sizes = step_bytes(work.parameters, method.zero, 2 * packs - once, packs)
    moved = sum(sizes.values()) + sizes.get("allreduce", 0)  # a ring all-reduce sends everything twice
    waits = max(0.0, moved / link_rate(gpu, ranks, method.node) - _of("overlap") * compute)
    return waits + method.update_collectives * _latency(ranks)


def _latency(ranks: int) -> float:
    """Returns the latency of a collective in seconds."""
    return _of("latency") * math.log2(max(2, ranks))


def link_rate(gpu: Gpu, ranks: int, node: int) -> float:
    """Returns the bytes/s of a large collective. Between nodes, one ring uses all network ports of a node.

    Args: node: GPUs of a machine.
    """
    within = gpu.node_link.value
    slowest = within if ranks <= node else min(within, node * gpu.network.value)
    return _of("link_share") * slowest


def _host(work: Work, ranks: int, method: Method, packs: int, again: float) -> float:
    """Returns the seconds that the host takes to launch all packs of a step, and to run the engine.

    Args: again: share of blocks that are recomputed.
    """
    forward = FORWARD_LAUNCHES["fused"] * method.fused_host * _of("fused_forward")
    forward += (sum(FORWARD_LAUNCHES.values()) - FORWARD_LAUNCHES["fused"]) * _of("launch")
    backward = BACKWARD_LAUNCHES["fused"] * method.fused_host * _of("fused_backward")
    backward += (sum(BACKWARD_LAUNCHES.values()) - BACKWARD_LAUNCHES["fused"] - SUMS_OF_FUSED) * _of("launch")
    text = work.text.layers * _of("text_launches") * _of("launch")
    layers = work.encoder.num_hidden_layers
    engine = (_ratio(method.host_ratio, ranks) - 1) * _of("plain_block") * (layers + work.text.layers)
    if _selective(work, method):
        backward += FORWARD_LAUNCHES["fused"] * method.fused_host * _of("fused_forward") + _of("launch")
    teacher = 0.0
    if work.teacher is not None:
        passes = work.sizes if method.teacher_by_size else 1
        teacher = passes * work.teacher.layers * _of("teacher_launches") * _of("launch")
    twice = max(0, packs - method.kept_packs) / packs if packs > 1 else 0.0
    pack = layers * ((1 + again) * forward + backward) + text + engine + teacher
    return packs * (pack + twice * (layers * forward + (text + engine) / 3))


def _ratio(ratios: Mapping[int, float], ranks: int) -> float:
    """Returns the ratio at a number of ranks, interpolated linearly between the measured numbers. Beyond the largest
    one it grows in proportion to the number of ranks."""
    known = sorted(ratios)
    if ranks <= known[0]:
        return ratios[known[0]]
    for low, high in itertools.pairwise(known):
        if ranks <= high:
            return ratios[low] + (ratios[high] - ratios[low]) * (ranks - low) / (high - low)
    return ratios[known[-1]] * ranks / known[-1]
