"""Patch embedding directly from bytes: tokens (T, D) from packed uint8 frames, without unfolded patches in memory.

A patch of one frame is 14 runs of 42 bytes, each at an even address for any image size, so pixels are read as 294
words of 16 bits. Bytes minus 128 are exact in bfloat16 and are multiplied with weights that include the normalisation,
in the order of the bytes (frame, row, column, channel). The forward launches two kernels:
    prepare   folds and transposes the weights to (bytes, D), adds 128 and the means to the bias, computes an address
              per token
    embed     gathers words, splits them into bytes, multiplies (tensor cores, float32 sums), adds the bias
The backward launches two kernels:
    gradient  gathers the same words and multiplies them with the gradient of the tokens, in splits over T, each of
              which writes a float32 part
    unfold    sums the parts in a fixed order, and reverses the folding
A pack of still images only is multiplied by the sum of the weights of both frames (588 bytes per token). A pack with a
video is multiplied by the weights of both frames (1176 bytes), and still images are read twice. Every sum has a fixed
order: the same inputs give the same bits.

In bfloat16 the pixels are exact, the folded weights are rounded once (at most 2^-8 of each product), the sums are
float32, and the result is rounded once. `normalise` and a linear layer would round the normalised pixels instead of the
folded weights. In the gradient only the result is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from univitar_ds.kernels import gpu
from univitar_ds.kernels.reference import CENTRE, CHANNELS, PATCH, PATCH_VALUES, check_frames, fold_constants

PATCH_SIDE = tl.constexpr(PATCH)
FRAME_WORDS = tl.constexpr(PATCH * PATCH * CHANNELS // 2)
RUN_WORDS = tl.constexpr(PATCH * CHANNELS // 2)
FRAME_BYTES = tl.constexpr(PATCH * PATCH * CHANNELS)
FRAME_PIXELS = tl.constexpr(PATCH * PATCH)
VALUES = tl.constexpr(PATCH_VALUES)
MIDDLE = tl.constexpr(CENTRE)
ONES = tl.constexpr(CENTRE + 1)
"""The byte that follows a patch's bytes. The byte minus 128 is 1, so its row of the product sums the gradients."""
PREPARE_KEYS = tl.constexpr(64)
PREPARE_WIDTH = tl.constexpr(32)
PREPARE_BIASES = tl.constexpr(4)
PREPARE_TOKENS = tl.constexpr(256)
WAVE = 132
"""The number of programs that run at once on the target GPUs (SMs of an H100 or H200)."""
MAX_SPLITS = 8
"""Maximum number of splits of the sum over tokens, if these splits are more than one wave of programs."""
PART_TOKENS = 384
"""The number of tokens whose products take as long as writing and reading one split's part. Derived, not measured:
128 x 256 float32, twice, at an SM's share of 4.8 TB/s, and products at 47 % of 989 TFLOP/s."""
MAX_SPLIT_TOKENS = 2**20
"""Maximum number of tokens of one split: their words are within 2^31 of each other (588 words per token, plus the rest
of the first and the last item)."""


@triton.jit
def _of_channel(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def _fold_weights(weight, folded, block, width, rows, red, green, blue, STILL: tl.constexpr):
    """Transposes (D, channel, frame, pixel) to (frame, pixel, channel | padding, D), times the channel's scale."""
    across = tl.cdiv(width, PREPARE_WIDTH)
    k = block // across * PREPARE_KEYS + tl.arange(0, PREPARE_KEYS)
    d = block % across * PREPARE_WIDTH + tl.arange(0, PREPARE_WIDTH)
    frame, channel, pixel = k // FRAME_BYTES, k % 3, k % FRAME_BYTES // 3
    source = weight + d[None, :] * VALUES + (channel * (2 * FRAME_PIXELS) + frame * FRAME_PIXELS + pixel)[:, None]
    inside = d[None, :] < width
    mask = inside & (k < (FRAME_BYTES if STILL else 2 * FRAME_BYTES))[:, None]
    value = tl.load(source, mask=mask, other=0).to(tl.float32)
    if STILL:
        value += tl.load(source + FRAME_PIXELS, mask=mask, other=0).to(tl.float32)
    value *= _of_channel(channel, red, green, blue)[:, None]
    tl.store(folded + k[:, None] * width + d[None, :], value, mask=inside & (k < rows)[:, None])


@triton.jit
def _fold_bias(weight, bias, offset, block, width, red, green, blue, HAS_BIAS: tl.constexpr):
    """Writes to `offset` (D,) float32 the bias plus the sum of each channel's weights times the channel's shift."""
    d = block * PREPARE_BIASES + tl.arange(0, PREPARE_BIASES)
    v = tl.arange(0, 512)
    mask = (d < width)[:, None] & (v < 2 * FRAME_PIXELS)[None, :]
    source = weight + d[:, None] * VALUES + v[None, :]
    total = tl.sum(tl.load(source, mask=mask, other=0).to(tl.float32), 1) * red
    total += tl.sum(tl.load(source + 2 * FRAME_PIXELS, mask=mask, other=0).to(tl.float32), 1) * green
    total += tl.sum(tl.load(source + 4 * FRAME_PIXELS, mask=mask, other=0).to(tl.float32), 1) * blue
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d < width, other=0).to(tl.float32)
    tl.store(offset + d, total, mask=d < width)


@triton.jit
def _locate(items, places, strides, block, tokens, count, reach, merge):
    """Writes the first word of each token's patch to `places`. Writes to `strides` the number of words from one row of
    pixels to the next, and from one frame to the next.

    Args: items: (N, 5) int64, see `item_table`. reach: a power of two, at least N / 2.
    """
    t = block * PREPARE_TOKENS + tl.arange(0, PREPARE_TOKENS)
    low = tl.zeros((PREPARE_TOKENS,), tl.int32)
    step = reach
    while step > 0:  # searches the last item that starts at or before the token
        probe = low + step
        inside = probe < count
        start = tl.load(items + probe * 5, mask=inside, other=0)
        low = tl.where(inside & (start <= t), probe, low)
        step = step // 2
    item = items + low * 5
    rest = (t - tl.load(item)).to(tl.int32)
    h, w = tl.load(item + 2).to(tl.int32), tl.load(item + 3).to(tl.int32)
    moving = tl.load(item + 4).to(tl.int32)
    time, rest = rest // (h * w), rest % (h * w)
    band, rest = rest // (w * merge), rest % (w * merge)
    block_column, rest = rest // (merge * merge), rest % (merge * merge)
    row, column = band * merge + rest // merge, block_column * merge + rest % merge
    frame, line = h * w * FRAME_WORDS, w * RUN_WORDS
    place = tl.load(item + 1) + time.to(tl.int64) * 2 * frame + row * (PATCH_SIDE * line) + column * RUN_WORDS
    inside = t < tokens
    tl.store(places + t, place, mask=inside)
    tl.store(strides + t, line, mask=inside)
    tl.store(strides + tokens + t, frame * moving, mask=inside)


@triton.jit(do_not_specialize=["tokens", "count", "reach", "merge"])
def prepare_kernel(
    weight, bias, folded, offset, items, places, strides,
    width, rows, weight_programs, bias_programs, tokens, count, reach, merge,
    red, green, blue, red_shift, green_shift, blue_shift,
    STILL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < weight_programs:
        _fold_weights(weight, folded, program, width, rows, red, green, blue, STILL)
    elif program < weight_programs + bias_programs:
        block = program - weight_programs
        _fold_bias(weight, bias, offset, block, width, red_shift, green_shift, blue_shift, HAS_BIAS)
    else:
        _locate(items, places, strides, program - weight_programs - bias_programs, tokens, count, reach, merge)


@triton.jit
def _where(places, strides, t, tokens, first, STILL: tl.constexpr):
    """Returns the starts of the patches of tokens `t`, in words from `first`, and their strides (see `_locate`).

    All tokens of a program are so near to each other that the offset from the first token fits into 32 bits."""
    inside = t < tokens
    start = (tl.load(places + t, mask=inside, other=first) - first).to(tl.int32)
    line = tl.load(strides + t, mask=inside, other=0)
    frame = line if STILL else tl.load(strides + tokens + t, mask=inside, other=0)
    return start, line, frame


@triton.jit
def _words(pixels, start, line, frame, k, STILL: tl.constexpr, PAST: tl.constexpr):
    """Returns words `k` of the patches, (tokens, words). Words beyond the patch have the value `PAST`; with PAST None,
    no word of `k` is beyond the patch."""
    run = k % FRAME_WORDS
    place = start[:, None] + (run // RUN_WORDS)[None, :] * line[:, None] + (run % RUN_WORDS)[None, :]
    if not STILL:
        place += (k // FRAME_WORDS)[None, :] * frame[:, None]
    if PAST is None:
        return tl.load(pixels + place)
    return tl.load(pixels + place, mask=(k < (FRAME_WORDS if STILL else 2 * FRAME_WORDS))[None, :], other=PAST)


@triton.jit
def _centred(words, TOKENS: tl.constexpr, WORDS: tl.constexpr, TYPE: tl.constexpr):
    """Splits words (tokens, words) into bytes minus 128 (tokens, 2 * words)."""
    wide = words.to(tl.int32)
    low = ((wide & 255).to(tl.float32) - MIDDLE).to(TYPE)
    high = ((wide >> 8 & 255).to(tl.float32) - MIDDLE).to(TYPE)
    return tl.reshape(tl.join(low, high), (TOKENS, 2 * WORDS))


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    # The interpreter would multiply the bits of bfloat16 as integers.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def embed_kernel(
    pixels, places, strides, folded, offset, out, tokens, width,
    STILL: tl.constexpr, STEPS: tl.constexpr, TAIL: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, WIDTH)  # neighbouring programs share the pixels; the weights stay in L2
    t = tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    inside, known = t < tokens, (d < width)[None, :]
    first = tl.load(places + tl.program_id(0) // across * TOKENS)
    start, line, frame = _where(places, strides, t, tokens, first, STILL)
    pixels += first
    # The short step comes first: otherwise its words would occupy registers during all other steps.
    k = STEPS * WORDS + tl.arange(0, TAIL)
    tail = _words(pixels, start, line, frame, k, STILL, 0)
    keys = STEPS * 2 * WORDS + tl.arange(0, 2 * TAIL)
    tail_values = tl.load(folded + keys[:, None] * width + d[None, :], mask=known, other=0)
    k, keys = tl.arange(0, WORDS), tl.arange(0, 2 * WORDS)
    ahead = _words(pixels, start, line, frame, k, STILL, None)
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    total = _dot(_centred(tail, TOKENS, TAIL, folded.dtype.element_ty), tail_values, total, UPCAST)
    left = _centred(ahead, TOKENS, WORDS, folded.dtype.element_ty)
    for step in range(STEPS):
        # The words of the next step are loaded while those of this step are multiplied, and converted at the end. A
        # left operand that is computed in the step of its product stays in registers, and Triton 3.7 overwrites the
        # registers of Hopper's asynchronous products while they are read. An operand carried through the loop goes to
        # shared memory.
        ahead = _words(pixels, start, line, frame, tl.minimum(step + 1, STEPS - 1) * WORDS + k, STILL, None)
        values = tl.load(folded + (step * 2 * WORDS + keys)[:, None] * width + d[None, :], mask=known, other=0)
        total = _dot(left, values, total, UPCAST)
        left = _centred(ahead, TOKENS, WORDS, folded.dtype.element_ty)
    total += tl.load(offset + d, mask=d < width, other=0)[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * width + d[None, :], total, mask=inside[:, None] & known)


@triton.jit(do_not_specialize=["tokens", "span"])
def gradient_kernel(
    pixels, places, strides, grad, parts, tokens, width, span, rows,
    STILL: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    known = (d < width)[None, :]
    t = tl.program_id(2) * span + tl.arange(0, TOKENS)
    # Words are loaded one step ahead, and their addresses two steps ahead. Beyond the last token any pixel may be read,
    # since the gradient there is 0.
    first = tl.load(places + tl.program_id(2) * span)
    start, line, frame = _where(places, strides, t, tokens, first, STILL)
    pixels += first
    ahead = _words(pixels, start, line, frame, k, STILL, ONES)
    left = _centred(ahead, TOKENS, WORDS, grad.dtype.element_ty)  # carried through the loop as in `embed_kernel`
    start, line, frame = _where(places, strides, t + TOKENS, tokens, first, STILL)
    total = tl.zeros((2 * WORDS, WIDTH), tl.float32)
    for _ in range(tl.cdiv(span, TOKENS)):
        ahead = _words(pixels, start, line, frame, k, STILL, ONES)
        start, line, frame = _where(places, strides, t + 2 * TOKENS, tokens, first, STILL)
        mask = (t < tokens)[:, None] & known
        values = tl.load(grad + t.to(tl.int64)[:, None] * width + d[None, :], mask=mask, other=0)
        total = _dot(tl.trans(left), values, total, UPCAST)
        left = _centred(ahead, TOKENS, WORDS, grad.dtype.element_ty)
        t += TOKENS
    keys = tl.program_id(0) * 2 * WORDS + tl.arange(0, 2 * WORDS)
    part = parts + tl.program_id(2).to(tl.int64) * rows * width
    tl.store(part + keys[:, None] * width + d[None, :], total, mask=known)


@triton.jit(do_not_specialize=["splits"])
def unfold_kernel(
    parts, grad_weight, grad_bias, width, rows, splits,
    red, green, blue, red_shift, green_shift, blue_shift,
    STILL: tl.constexpr, HAS_BIAS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * KEYS + tl.arange(0, KEYS)  # (channel, frame, pixel), the order of the module's weight
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    channel, frame, pixel = v // (2 * FRAME_PIXELS), v // FRAME_PIXELS % 2, v % FRAME_PIXELS
    k, ones = pixel * 3 + channel, FRAME_BYTES
    if not STILL:
        k, ones = k + frame * FRAME_BYTES, 2 * FRAME_BYTES
    known = d < width
    mask = (v < VALUES)[:, None] & known[None, :]
    total, sums = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for _ in range(splits):
        total += tl.load(parts + k[:, None] * width + d[None, :], mask=mask, other=0)
        sums += tl.load(parts + ones * width + d, mask=known, other=0)
        parts += rows * width
    total *= _of_channel(channel, red, green, blue)[:, None]
    total += _of_channel(channel, red_shift, green_shift, blue_shift)[:, None] * sums[None, :]
    tl.store(grad_weight + d[None, :] * VALUES + v[:, None], total, mask=mask)
    if HAS_BIAS and tl.program_id(0) == 0:
        tl.store(grad_bias + d, sums, mask=known)


class Tiles(NamedTuple):
    """Tile sizes of one program, and its numbers of warps and pipeline stages.

    A forward program computes `tokens` x `width` values of the result, from `words` words of the patches per step. A
    backward program computes 2 * `words` rows x `width` of the gradient, from `tokens` tokens per step."""

    tokens: int
    width: int
    words: int
    warps: int
    stages: int


def forward_tiles(half: bool, wide: bool) -> Tiles:
    """Returns the tiles of `embed_kernel`: wide tiles for tensor cores if `half`, small tiles in float32.

    In a wide tile a byte is split and converted once for all products of its row. With `wide` (see `kernels.gpu`) two
    warp groups store 128 x 256 sums, for which other GPUs lack registers."""
    if not half:
        return Tiles(64, 64, 16, 4, 2)
    return Tiles(128, 256, 32, 8, 4) if wide else Tiles(128, 128, 32, 8, 3)


def gradient_tiles(half: bool, wide: bool) -> Tiles:
    """Returns the tiles of `gradient_kernel`; the arguments are those of `forward_tiles`.

    A tile has 128 bytes of the patch if `half`, 64 in float32."""
    if not half:
        return Tiles(32, 64, 32, 4, 2)
    return Tiles(64, 256, 64, 8, 3) if wide else Tiles(64, 128, 64, 8, 3)


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up. triton.cdiv takes more than a microsecond outside kernels."""
    return -(-a // b)


def split_span(tokens: int, tiles: int, step: int) -> int:
    """Returns the number of tokens of one split, a multiple of `step`, small enough for offsets of 32 bits.

    Each split runs `tiles` programs, and programs run in waves of `WAVE`. The chosen number of splits is the one whose
    waves end first, and the smallest of several: 80 tiles leave 52 SMs of one wave idle, but three splits of 80 tiles
    fill 1.8 of two waves.
    """
    min_splits = cdiv(tokens, MAX_SPLIT_TOKENS)
    counts = range(min_splits, max(min_splits, MAX_SPLITS, WAVE // tiles) + 1)
    spans = [cdiv(cdiv(tokens, splits), step) * step for splits in counts]
    return min(spans, key=lambda span: cdiv(tiles * cdiv(tokens, span), WAVE) * (span + PART_TOKENS))


def loop(still: bool, words: int) -> tuple[int, int]:
    """Returns the number of full steps over the words of a patch, and the number of words of the short step.

    The words of the short step are a power of two and at least 8, since a product needs at least 16 bytes."""
    steps, rest = divmod(FRAME_WORDS.value * (1 if still else 2), words)
    return steps, triton.next_power_of_2(max(rest, 8))


def item_table(frames: Sequence[int], grid_thw: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns one row per item: first token, first word, h, w, and 1 for a video or 0 for a still image."""
    table, token, word = [], 0, 0
    for count, (t, h, w) in zip(frames, grid_thw, strict=True):
        table.append([token, word, h, w, int(count > 1)])
        token, word = token + t * h * w, word + count * h * w * FRAME_WORDS.value
    return table


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, words: Tensor, items: Tensor, tokens: int, still: bool,
        merge: int, constants: tuple[float, ...],
    ) -> Tensor:  # fmt: skip
        width, device = weight.shape[0], weight.device
        tiles = forward_tiles(weight.itemsize < 4, gpu.limits(device).wide)
        steps, tail = loop(still, tiles.words)
        rows = 2 * (steps * tiles.words + tail)
        folded = torch.empty(rows, width, dtype=weight.dtype, device=device)
        offset = torch.empty(width, dtype=torch.float32, device=device)
        places = torch.empty(tokens, dtype=torch.int64, device=device)
        strides = torch.empty(2, tokens, dtype=torch.int32, device=device)
        out = torch.empty(tokens, width, dtype=weight.dtype, device=device)
        weight_programs = cdiv(rows, PREPARE_KEYS.value) * cdiv(width, PREPARE_WIDTH.value)
        bias_programs = cdiv(width, PREPARE_BIASES.value)
        token_programs = cdiv(tokens, PREPARE_TOKENS.value)
        reach = triton.next_power_of_2(len(items)) // 2
        gpu.launch(
            prepare_kernel, (weight_programs + bias_programs + token_programs,),
            weight, bias, folded, offset, items, places, strides,
            width, rows, weight_programs, bias_programs, tokens, len(items), reach, merge, *constants,
            STILL=still, HAS_BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
        gpu.launch(
            embed_kernel, (cdiv(tokens, tiles.tokens) * cdiv(width, tiles.width),),
            words, places, strides, folded, offset, out, tokens, width,
            STILL=still, STEPS=steps, TAIL=tail, TOKENS=tiles.tokens, WIDTH=tiles.width, WORDS=tiles.words,
            UPCAST=triton.knobs.runtime.interpret, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        ctx.save_for_backward(words, places, strides)
        ctx.still, ctx.constants, ctx.weight_shape = still, constants, weight.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        words, places, strides = ctx.saved_tensors
        grad = grad.contiguous()
        tokens, width = grad.shape
        tiles = gradient_tiles(grad.itemsize < 4, gpu.limits(grad.device).wide)
        values = FRAME_BYTES.value * (1 if ctx.still else 2)
        grid = cdiv(values + 1, 2 * tiles.words), cdiv(width, tiles.width)
        span = split_span(tokens, grid[0] * grid[1], tiles.tokens)
        splits, rows = cdiv(tokens, span), grid[0] * 2 * tiles.words
        parts = torch.empty(splits, rows, width, dtype=torch.float32, device=grad.device)
        gpu.launch(
            gradient_kernel, (*grid, splits),
            words, places, strides, grad, parts, tokens, width, span, rows,
            STILL=ctx.still, TOKENS=tiles.tokens, WIDTH=tiles.width, WORDS=tiles.words,
            UPCAST=triton.knobs.runtime.interpret, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        grad_weight = torch.empty(ctx.weight_shape, dtype=grad.dtype, device=grad.device)
        grad_bias = None if ctx.bias_dtype is None else torch.empty(width, dtype=ctx.bias_dtype, device=grad.device)
        gpu.launch(
            unfold_kernel, (cdiv(PATCH_VALUES, 64), cdiv(width, 32)),
            parts, grad_weight, grad_bias, width, rows, splits, *ctx.constants,
            STILL=ctx.still, HAS_BIAS=grad_bias is not None, KEYS=64, WIDTH=32, num_warps=4,
        )  # fmt: skip
        return grad_weight, grad_bias, *[None] * 6


def patch_embed(
    pixels: Tensor,
    frames: Sequence[int],
    grid_thw: Sequence[Sequence[int]],
    weight: Tensor,
    bias: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    merge: int,
) -> Tensor:
    """Computes `kernels.reference.patch_embed` on a GPU; the weight is bfloat16, float16 or float32."""
    tokens = check_frames(pixels, frames, grid_thw)
    if not tokens:
        return F.linear(weight.new_empty(0, PATCH_VALUES), weight.flatten(1), bias)
    scales, shifts = fold_constants(mean, std)
    even = pixels if pixels.data_ptr() % 2 == 0 else pixels.clone()  # a slice of a tensor may start at an odd address
    table = torch.tensor(item_table(frames, grid_thw), pin_memory=pixels.is_cuda)  # pinned: the host does not wait
    items = table.to(pixels.device, non_blocking=True)
    still = all(count == 1 for count in frames)
    return _PatchEmbed.apply(
        weight.contiguous(), bias, even.view(torch.int16), items, tokens, still, merge, (*scales, *shifts)
    )
