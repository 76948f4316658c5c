"""Predicts the memory of a rank in a training step by part, from shapes, at each moment at which it can peak.

At all moments a rank holds its states (`sizes.memory_of_rank`), the weights of a teacher and the pixels of all packs.
With ZeRO-3, gathered weights are added while modules run. In addition:

| moment | in addition |
|---|---|
| teacher | activations of a layer of the teacher |
| loss | activations of both towers, features for the teacher, texts and a chunk of logits |
| text backward | activations of both towers, features for the teacher, gradients of a text block, buckets |
| encoder backward | activations of the encoder, what its last block recomputes, gradients of that block, buckets |
| gradients | the last bucket while it is reduced; all gradients if they do not stay between steps, or with ZeRO-1 |
| update | float32 copies of the optimizer; on a CPU two temporaries of AdamW; five copies of a rank's Muon matrices |
| evaluation | between steps, with its own pixels: whole weights of each kind, the buffer that gathers them, a block |

The prediction is the largest of these sums. `tests/simulated_gpu` compares it with the real step on a simulated GPU,
`benchmarks/bench_plan_memory.py` with the memory of processes on a CPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.model.blocks import activations
from univitar_ds.model.blocks.activations import FUSED, SELECTIVE, SPLIT, Kept, Kind
from univitar_ds.objectives.exchange import GATHERED_BYTES

FP32 = 4
Kernels = Literal["fused", "compiled", "plain"]
"""Implementation of the token-wise operations: Triton on a GPU, compiled loops or plain torch on a CPU."""
EVALUATION = "evaluation"
"""Name of the moment, between two steps, at which the run evaluates."""
GATHERED_AT_ONCE = 1 << 25
"""Number of elements of whole weights that are gathered at a time, see `training.checkpoint.whole_weights`."""
REDUCED_AT_ONCE = 500_000_000
"""Number of gradient elements that DeepSpeed reduces at once with ZeRO-1 in bf16 (its default)."""
_BLOCK: Mapping[Kernels, Mapping[int, Kept]] = {
    "fused": {2: FUSED, 4: FUSED},
    "compiled": {2: Kept(6, 7, 3), 4: Kept(6, 7, 3)},
    "plain": {2: Kept(12, 17, 11), 4: Kept(8, 12, 6)},
}
"""Values that a block keeps for its backward pass, by the bytes of a value; counted. On a CPU attention runs item by
item, so that two copies of its result exist. Plain torch keeps what the other two recompute, in bf16 as float32
copies."""
_SPLIT_BLOCK: Mapping[Kernels, Mapping[int, Kept]] = {
    "fused": SPLIT,
    "compiled": {2: Kept(6, 15, 11), 4: Kept(6, 11, 6)},
    "plain": {2: Kept(12.5, 15, 11), 4: Kept(8.25, 11, 6)},
}
"""The same with tensor parallelism, whose norms over a split width run in plain torch everywhere."""
_SPLIT_GRADIENTS = {2: 6, 4: 4}
"""Gradients of a feed-forward layer whose width is split over ranks, as multiples of a rank's part of the width, by the
bytes of a value. Those of its norm are in float32."""
_TEXT = (8, 2)
"""Values per token that a text block keeps, as multiples of (D, F), its width and feed-forward width. D: its input, two
norms, queries, keys, values, the result of attention, and the sum of that with the input. F: input and output of the
activation function."""
_POOLING = 4
"""Values per token that the attention pooling keeps, as a multiple of the width: its input, its norm, keys, values."""


@dataclass(frozen=True)
class TextShape:
    """A text tower. `hidden`: width; `layers`: blocks; `inner`: feed-forward width; `length`: tokens of a padded
    caption; `trained`: whether it is trained."""

    hidden: int
    layers: int
    inner: int
    length: int
    trained: bool = True


@dataclass(frozen=True)
class TeacherMemory:
    """A teacher, which is a frozen ViT. `layers`: its blocks; `weights`: bytes of its weights on a rank."""

    width: int
    layers: int
    weights: float


@dataclass(frozen=True)
class EvaluationLoad:
    """What an evaluation during training holds on a rank. `weights`: number of weights in all copies; `tokens`: of a
    pack; `pixels`: bytes of the pixels of a pack."""

    weights: int
    tokens: int
    pixels: float


@dataclass(frozen=True)
class StepLoad:
    """What a rank computes in a step.

    `tokens`: of a pack, after `patch_dropout`; `pixels`: bytes of the pixels of a pack; `items`: of a pack; `packs`: of
    the rank; `kind`: recomputation, as `checkpoint_every`; `texts`: of all ranks; `chunk`: texts that the loss compares
    at a time; `kept`: packs whose autograd graphs are in memory together; `trains_encoder`: whether blocks of the
    encoder get gradients; `tensor`, `sequence`: ranks that share a block's weights, and a pack; `evaluation`:
    None if it is not counted.
    """

    encoder: EncoderConfig
    tokens: float
    pixels: float
    items: float
    packs: int
    kind: Kind
    embed_dim: int
    texts: float
    chunk: int
    text: TextShape | None = None
    teacher: TeacherMemory | None = None
    kept: int = 1
    trains_encoder: bool = True
    tensor: int = 1
    sequence: int = 1
    evaluation: EvaluationLoad | None = None


@dataclass(frozen=True)
class States:
    """The states of a rank, and the settings of its engine.

    `parts`: bytes between steps, from `sizes.memory_of_rank`, without those in host memory; `zero`: the section
    `zero_optimization`; `parameters`: number of parameters; `trained`: of trained parameters; `block`: of parameters of
    the largest block; `ranks`: ranks that share a training state; `width`: bytes of a weight in the forward pass;
    `gradient`: bytes of an accumulated gradient; `text`: parameters of the text tower; `matrices`: trained parameters
    that Muon updates; `matrix_width`: bytes of a value in Muon's messages; `offloaded`: whether the optimizer is in
    host memory.
    """

    parts: Mapping[str, float]
    zero: Mapping[str, Any]
    parameters: int
    trained: int
    block: int
    ranks: int
    width: int
    gradient: int
    text: int = 0
    matrices: int = 0
    matrix_width: int = 2
    offloaded: bool = False
    kernels: Kernels = "fused"

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    @property
    def share(self) -> float:
        """Number of trained parameters whose optimizer states a rank has."""
        return self.trained / self.ranks

    @property
    def bucket(self) -> int:
        """Number of elements in a bucket of gradients."""
        return self.zero.get("reduce_bucket_size", 500_000_000)


@dataclass(frozen=True)
class Peak:
    """The memory of a rank at the moment that needs most. `parts`: bytes by part."""

    moment: str
    parts: Mapping[str, float]
    by_moment: Mapping[str, float] = field(default_factory=dict)
    """Total bytes at each moment."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Bytes by part during an evaluation; {} if it is not counted."""

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


def peak(load: StepLoad, states: States) -> Peak:
    """Returns the memory of a rank at the moment of a step with the largest sum."""
    found = moments(load, states)
    sizes = {moment: sum(parts.values()) for moment, parts in found.items()}
    moment = max(sizes, key=sizes.__getitem__)
    return Peak(moment, found[moment], sizes, found.get(EVALUATION, {}))


def moments(load: StepLoad, states: States) -> dict[str, dict[str, float]]:
    """Returns the bytes of a rank by part, for each moment in the table of this module."""
    vision, text = encoder_kept(load, states), text_kept(load, states)
    distilled = _distilled(load, states)
    teacher = {} if load.teacher is None else {"teacher": load.teacher.weights}
    always = Counter(_between(states)) + Counter({"pixels": load.packs * load.pixels, **teacher})
    graphs = {"encoder activations": load.kept * vision, "text tower": load.kept * text}
    before = {name: (load.kept - 1) / load.kept * size for name, size in graphs.items()} if load.kept else {}
    running = _gathered(states)
    buckets = {"buckets": _buckets(states), **_gradients(load, states)}
    backward, after_text = {**running, **buckets}, {**_gathered(states, after_text=True), **buckets}
    own_text = {} if load.text is None else {"text tower": text_backward(load, states)}
    found = {
        "loss": [graphs, running, {"loss": _loss(load, states), "teacher": distilled}],
        "text backward": [graphs, backward, own_text, {"teacher": distilled}],
        "encoder backward": [graphs, after_text, {"encoder activations": encoder_backward(load, states)}],
        "gradients": [before, after_text, {"buckets": _exchange(states)}, _all_gradients(states)],
        "update": [_all_gradients(states), {"update": _update(states)}],
    }
    if load.teacher is not None:
        found["teacher"] = [before, running, {"teacher": _teacher_forward(load, states)}]
    found["encoder backward"].append({"text tower": -text})  # the graph of this pack's texts is freed by then
    moments_of_step = {name: _sum([always, *parts]) for name, parts in found.items()}
    if load.evaluation is None:
        return moments_of_step
    return {
        **moments_of_step,
        EVALUATION: _sum([_between(states), teacher, _evaluation(load, load.evaluation, states)]),
    }


def _evaluation(load: StepLoad, own: EvaluationLoad, states: States) -> dict[str, float]:
    """Returns the bytes that an evaluation adds, by part: weights (bfloat16 on a GPU), and the forward pass of a block
    without gradients: input, sum and norm; gate, up and their norm, of which plain torch has one more."""
    width = 2 if states.kernels == "fused" else FP32
    block = 3 * load.encoder.hidden_size + (4 if states.kernels == "plain" else 3) * load.encoder.inner_width
    copies = {"weights of the evaluation": own.weights * width + GATHERED_AT_ONCE * FP32}
    return {**copies, "encoder activations": own.tokens * block * width, "pixels": own.pixels}


def kept_bytes(encoder: EncoderConfig, kind: Kind, *, width: int, kernels: Kernels, tensor: int = 1) -> float:
    """Returns the bytes per token that an encoder keeps between its forward and backward pass.

    Args: kind: recomputation, as `checkpoint_every`; width: bytes of a value; tensor: ranks that share the weights of a
        block.
    """
    return activations.bytes_per_token(encoder, kind, width=width, tensor=tensor, block=_block(kernels, width, tensor))


def backward_bytes(encoder: EncoderConfig, kind: Kind, *, width: int, kernels: Kernels, tensor: int = 1) -> float:
    """Returns the bytes per token that the backward pass of a block adds: recomputed activations, and gradients.

    The peak is at the gradient of the feed-forward gate: two tensors of width F and two of width D; in plain torch four
    of width F.

    Args: as `kept_bytes`.
    """
    across, inner = encoder.hidden_size, encoder.inner_width
    of_inner = _SPLIT_GRADIENTS[width] if tensor > 1 else 4 if kernels == "plain" else 2
    gradients = width * (2 * across + of_inner * inner / tensor)
    block = activations.bytes_of_block(encoder, width=width, tensor=tensor, block=_block(kernels, width, tensor))
    if kind == "selective" and tensor > 1:
        return gradients + block - SELECTIVE.bytes(encoder, width=width, tensor=tensor)
    if kind == "selective":
        return gradients + width * (5 * across + inner)
    return gradients + (block - 2 * width * across if kind else 0)


def _block(kernels: Kernels, width: int, tensor: int) -> Kept:
    return (_BLOCK if tensor == 1 else _SPLIT_BLOCK)[kernels][width]


def encoder_kept(load: StepLoad, states: States) -> float:
    """Returns the bytes of the activations of encoder and pooling for a pack, between forward and backward pass."""
    if not load.trains_encoder:
        return 0.0
    kept = kept_bytes(load.encoder, load.kind, width=states.width, kernels=states.kernels, tensor=load.tensor)
    if load.sequence > 1:
        kept += activations.exchanged_bytes(load.encoder, load.kind, width=states.width)
    return load.tokens * (kept + _pooling(load, states))


def encoder_backward(load: StepLoad, states: States) -> float:
    """Returns the bytes that the backward pass of the last block adds for a pack, less those of the pooling, which are
    freed by then."""
    if not load.trains_encoder:
        return 0.0
    added = backward_bytes(load.encoder, load.kind, width=states.width, kernels=states.kernels, tensor=load.tensor)
    return load.tokens * (added - _pooling(load, states))


def text_kept(load: StepLoad, states: States) -> float:
    """Returns the bytes of the text tower's activations for a pack."""
    text = load.text
    if text is None or not text.trained:
        return 0.0
    block = _TEXT[0] * text.hidden + _TEXT[1] * text.inner
    return load.items * text.length * text.layers * block * states.width


def text_backward(load: StepLoad, states: States) -> float:
    """Returns the bytes of the gradients of activations in a text block, for a pack."""
    text = load.text
    if text is None or not text.trained:
        return 0.0
    return load.items * text.length * (2 * text.inner + 2 * text.hidden) * states.width


def _pooling(load: StepLoad, states: States) -> int:
    """Returns the bytes per token that the attention pooling keeps."""
    return states.width * _POOLING * load.encoder.hidden_size


def _between(states: States) -> dict[str, float]:
    """Returns the bytes that stay between steps, by part.

    ZeRO-2, and ZeRO-1 in float32, allocate their gradients in each step. ZeRO-3 with an offloaded optimizer keeps its
    bucket.
    """
    parts = dict(states.parts)
    if states.stage == 3 and not states.offloaded:
        return parts
    if states.stage == 3:
        return {**parts, "buckets": states.bucket * states.width}
    if states.stage == 2 or states.width == FP32:
        parts.pop("gradients", None)
    return parts


def _gradients(load: StepLoad, states: States) -> dict[str, float]:
    """Returns the bytes of the gradients of earlier packs during a backward pass, if they do not stay between steps."""
    if "gradients" in _between(states) or load.packs == 1:
        return {}
    return {"gradients": states.parts["gradients"]}


def _all_gradients(states: States) -> dict[str, float]:
    """Returns the bytes of all gradients of a rank after the backward pass, if they do not stay between steps."""
    return {} if "gradients" in _between(states) else {"gradients": states.parts["gradients"]}


def _gathered(states: States, *, after_text: bool = False) -> dict[str, float]:
    """Returns the bytes of the weights that ZeRO-3 holds gathered while modules run, and of those that it prefetches.

    If all weights may stay gathered (`stage3_max_live_parameters`), the backward pass prefetches nothing, and the text
    tower's weights are freed after its backward pass.

    Args: after_text: whether the backward pass of the text tower is over.
    """
    if states.stage != 3 or states.ranks == 1:
        return {}
    most = states.zero.get("stage3_max_live_parameters", 10**9)
    if after_text and states.parameters <= most:
        return {"gathered weights": (states.parameters - states.text) * states.width}
    live = min(states.parameters, max(states.block, most))
    prefetched = min(states.parameters, states.zero.get("stage3_prefetch_bucket_size", 50_000_000) + states.block)
    return {"gathered weights": (live + prefetched) * states.width}


def _buckets(states: States) -> float:
    """Returns the bytes of gradient buckets that exist only during the backward pass. With ZeRO-3 they hold gradients
    that are not reduced yet."""
    if states.stage == 3:
        return 0.0 if states.offloaded else min(states.bucket, states.trained) * states.width
    if states.stage == 1 and states.width < FP32:
        return 0.0
    return states.bucket * states.width * (2 if states.zero.get("overlap_comm") else 1)


def _exchange(states: States) -> float:
    """Returns the bytes of the copies through which gradients are exchanged at the end of a backward pass.

    ZeRO-1 in bf16 exchanges all gradients then: it holds them in bf16, and REDUCED_AT_ONCE of them also joined in
    float32 and in the dtype of the message.
    """
    if states.stage == 1 and states.width < FP32:
        at_once = min(states.trained, REDUCED_AT_ONCE)
        return states.trained * states.width + at_once * (FP32 + states.width)
    return min(states.bucket, states.trained) * (states.width if states.stage == 3 else FP32)


def _update(states: States) -> float:
    """Returns the bytes of the update: a float32 copy of the gradients of a group, and on a CPU AdamW's temporaries.

    For Muon, a rank adds five copies of its share of the matrices, in the dtype of the messages: momentum, send and
    receive buffers, and results.
    """
    most = states.zero.get("sub_group_size", 10**9) if states.stage == 3 else states.share
    muon = 5 * min(states.matrices / states.ranks, most) * states.matrix_width
    if states.offloaded:
        return muon
    group = min(states.share, most)
    copies = 1 if states.stage == 3 or states.width == FP32 else 0  # ZeRO 1 and 2 in bf16 have a float32 copy already
    return group * FP32 * (copies + (0 if states.kernels == "fused" else 2)) + muon


def _loss(load: StepLoad, states: States) -> float:
    """Returns the bytes of the contrastive loss: texts and their gradients, images, a chunk of logits.

    The texts are those of all ranks, or of a group of ranks if there are too many, see `objectives.exchange`.
    """
    own, row = load.packs * load.items, load.embed_dim * FP32
    ranks = max(1, round(load.texts / own))
    least = min(ranks, math.ceil(load.texts * row / GATHERED_BYTES))
    groups = next(number for number in range(max(1, least), ranks + 1) if ranks % number == 0)
    texts = load.texts / groups
    logits = own * min(load.chunk, texts) * FP32 * (1 if states.kernels == "fused" else 3)
    return (2 * texts + 6 * own) * row + logits


def _distilled(load: StepLoad, states: States) -> float:
    """Returns the bytes that distillation keeps for a pack: features of student and teacher in the teacher's width,
    both masked and normalized in float32, and the output of the norm before the student's head."""
    if load.teacher is None:
        return 0.0
    values = load.teacher.width * (2 * states.width + 4 * FP32) + load.encoder.hidden_size * states.width
    return load.tokens * values


def _teacher_forward(load: StepLoad, states: States) -> float:
    """Returns the bytes of the activations of a teacher's layer: input, norm, queries, keys, values, feed-forward."""
    assert load.teacher is not None
    return load.tokens * load.teacher.width * (2 + 3 + 2 * 4) * min(2, states.width)


def _sum(parts: list[Mapping[str, float]]) -> dict[str, float]:
    """Returns the sums of sizes by name, without those that are 0."""
    total: dict[str, float] = {}
    for one in parts:
        for name, size in one.items():
            total[name] = total.get(name, 0.0) + size
    return {name: size for name, size in total.items() if size}
