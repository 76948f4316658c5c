"""A model of the time of a training step on GPUs: what each part costs, from counted work and stated rates.

Work is counted: FLOPs, bytes, launches and collectives, which tests compare with the real model and engine on a CPU.
Rates are published, measured on a CPU or chosen (`ASSUMPTIONS`, `gpus.GPUS`); none has been measured on a GPU. So the
model says which part limits a step and what a change is worth, within the error of its rates.
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
"""FLOPs of attention's backward pass per FLOP of the forward pass: five products instead of two, since flash-attn
computes the logits again. MFU counts 2, see `model.flops`."""
FORWARD_LAUNCHES = {"fused": 4, "product": 5, "attention": 1, "other": 1}
BACKWARD_LAUNCHES = {"fused": 4, "product": 10, "attention": 1, "other": 21}
"""Device launches of a block, counted."""
SUMS_OF_FUSED = 12
"""Of BACKWARD_LAUNCHES["other"]: sums and casts of partial results, which `fused_backward` includes."""
MUON_LAUNCHES = 3
"""Matrix products of an iteration."""
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
    return ASSUMPTIONS[name].value


@dataclass(frozen=True)
class Teacher:
    """A frozen ViT: width, layers, and FLOPs of a token in products, per squared width."""

    width: int = 1024
    layers: int = 24
    products: int = 24


@dataclass(frozen=True)
class MuonWork:
    """Muon in an update: FLOPs of the rank with most and of all that share the matrices, iterations of that rank over
    its matrices, bytes that a rank sends, and whether the products are in float32."""

    flops: float
    flops_of_all: float
    iterations: int
    bytes: float
    fp32: bool = False


@dataclass(frozen=True)
class Work:
    """What a step computes.

    `parameters`: trained, of both towers. `tokens_per_item`: mean. `attended`: mean number of tokens that a token
    attends to, the sum of squared lengths over the sum of lengths. `sizes`: distinct sizes of a pack. `fill`: of
    `token_budget`. `teacher`: None without distillation; `muon`: None with another optimizer.
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
        """FLOPs of a pack as MFU counts them, without recomputation."""
        linear, square = cost_coefficients(self.encoder)
        return self.tokens * (linear + square * self.attended)


@dataclass(frozen=True)
class Method:
    """How a step is computed.

    `host_ratio`: host time of the engine's step in multiples of the model's without DeepSpeed, by number of ranks,
    from rows of `benchmarks/bench_host.py`. `update_collectives`: at the end of a step. `recompute_by_memory`: as few
    blocks as memory demands, else every `Work.checkpoint_every`-th. `kept_packs`: packs of a rank whose graph is kept,
    so that they run once. `ring`: the loss as hops between ranks, else one gathering. `imbalance`: longest over mean
    predicted time of the packs of a step. `fused_host`: host time of a launch over that of ASSUMPTIONS. `node`: GPUs of
    a machine. `tensor`, `sequence`: ranks that share the weights of each block, and the tokens of each pack.
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
    """Seconds of a step by part, as they add up: device, what the host takes longer, and waits. `flops` of a rank, as
    MFU counts them; `tokens` of a rank; `peak` in FLOP/s."""

    parts: Mapping[str, float]
    flops: float
    tokens: float
    peak: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, a share."""
        return self.flops / self.seconds / self.peak


def forward_bytes(config: EncoderConfig) -> int:
    """Returns the bytes per token that the token-wise kernels of a block's forward pass read and write, in bf16."""
    return 28 * config.hidden_size + 6 * config.inner_width + 16


def backward_bytes(config: EncoderConfig) -> int:
    """Returns the bytes per token of the token-wise kernels of a block in the backward pass, see `forward_bytes`."""
    return 68 * config.hidden_size + 14 * config.inner_width + 16


def kept_bytes(config: EncoderConfig) -> int:
    """Returns the bytes per token that a block keeps for its backward pass, in bf16."""
    return 24 * config.hidden_size + 6 * config.inner_width + 16


def predict(work: Work, gpu: Gpu, ranks: int, method: Method) -> StepTime:
    """Returns the predicted time of a step on `ranks` GPUs, which divide the lanes or are a multiple of them.

    With more ranks than lanes, the lanes are taken to be as many as the ranks. Ranks that share packs or weights read
    the lanes of one rank.
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
    """Returns the time of attention per FLOP of MFU, as a multiple of that of all else in the encoder.

    It is what `data.attention_cost` should be for this encoder and GPU.
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
    """Whether norms and gates run again in the backward pass, and nothing else does."""
    return not method.recompute_by_memory and work.checkpoint_every == "selective"


def _encoder_products(config: EncoderConfig, gpu: Gpu) -> tuple[float, float]:
    """Returns the seconds per token of all matrix products, forward and backward."""
    forward = cost_coefficients(config)[0] / 3 / gpu.products.value
    return forward, 2 * forward


def _token_wise(config: EncoderConfig, gpu: Gpu) -> tuple[float, float]:
    rate = config.num_hidden_layers / (_of("bandwidth_share") * gpu.bandwidth.value)
    return forward_bytes(config) * rate, backward_bytes(config) * rate


def _attention(config: EncoderConfig, gpu: Gpu) -> tuple[float, float]:
    """Returns the seconds per squared token, forward and backward."""
    flops = cost_coefficients(config)[1] / 3
    return flops / gpu.attention_forward.value, ATTENTION_BACKWARD * flops / gpu.attention_backward.value


def _device(work: Work, gpu: Gpu, ranks: int, method: Method, packs: int) -> dict[str, float]:
    """Returns the seconds of the device's work over all packs of a rank, by part."""
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
    """Returns the seconds of the teacher's forward pass for a pack. One pass for each size is limited by launches."""
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
    """Returns the seconds of the collectives within blocks, which the computation of a block waits for."""
    shape = work.encoder, method.tensor, method.sequence
    twice = max(0, packs - method.kept_packs) / packs if packs > 1 else 0.0
    passes = packs * (2 + again + twice)  # forward, backward, recomputed, without gradients
    ranks = method.tensor * method.sequence
    link = gpu.node_link if ranks <= method.node else gpu.network
    moved = work.tokens * sharing_bytes(*shape, number=BF16) / (_of("link_share") * link.value)
    return passes * (moved + sharing_collectives(*shape) * _latency(ranks))


def _optimizer(work: Work, gpu: Gpu, ranks: int, method: Method) -> float:
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

    Under ZeRO-3 all weights are gathered for each pass and gradients scattered after each backward pass. Below it
    weights are gathered once, after the update, and gradients all-reduced: under ZeRO-2 after each backward pass, under
    ZeRO-1 once. Weights that ZeRO-3 keeps between passes (`stage3_max_live_parameters`) are taken to be gathered again.
    Args: passes: forward passes of a step; backwards: those that are followed by a backward pass.
    """
    whole = BF16 * parameters
    if zero == 3:
        return {"allgather": whole * (passes + backwards), "reduce_scatter": whole * backwards}
    return {"allgather": whole, "allreduce": whole * (backwards if zero == 2 else 1)}


def _collectives(work: Work, gpu: Gpu, ranks: int, method: Method, packs: int, compute: float) -> float:
    """Returns the seconds of the transfers of weights and gradients that computing does not hide."""
    if ranks == 1:
        return 0.0
    once = min(packs, method.kept_packs) if packs > 1 else 1
    sizes = step_bytes(work.parameters, method.zero, 2 * packs - once, packs)
    moved = sum(sizes.values()) + sizes.get("allreduce", 0)  # a ring that reduces for all sends everything twice
    waits = max(0.0, moved / link_rate(gpu, ranks, method.node) - _of("overlap") * compute)
    return waits + method.update_collectives * _latency(ranks)


def _latency(ranks: int) -> float:
    return _of("latency") * math.log2(max(2, ranks))


def link_rate(gpu: Gpu, ranks: int, node: int) -> float:
    """Returns the bytes/s of a large collective. Across nodes, all ports of a node carry one ring.

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
    """Returns the ratio at a number of ranks, on a line between the nearest ones that were measured."""
    known = sorted(ratios)
    if ranks <= known[0]:
        return ratios[known[0]]
    for low, high in itertools.pairwise(known):
        if ranks <= high:
            return ratios[low] + (ratios[high] - ratios[low]) * (ranks - low) / (high - low)
    return ratios[known[-1]] * ranks / known[-1]
