"""Patch embedding directly from bytes: tokens (T, D) from packed uint8 frames, without unfolded patches in memory.

A patch of one frame is 14 runs of 42 bytes, each at an even address for any image size, so pixels are read as 294
words of 16 bits. Bytes minus 128 are exact in bfloat16 and are multiplied with weights that include the normalisation,
in the order of the bytes (frame, row, column, channel). Three launches forward:
    prepare   weights folded and transposed to (bytes, D), the bias including 128 and the means, an address per token
    embed     gathers words, splits them into bytes, multiplies (tensor cores, float32 sums), adds the bias
Two backward:
    gradient  the same gather against the gradient of the tokens, in splits over T, each with its float32 part
    unfold    sums the parts in a fixed order, and reverses the folding
A pack of stills only is multiplied with the sum of the two temporal kernels (588 bytes per token); a pack with a video
with both (1176), where a still is read twice. Every sum has a fixed order: the same inputs give the same bits.

Error in bfloat16: pixels are exact, folded weights rounded once (2^-8 of each product), sums in float32, the result
rounded once. The float path rounds normalised pixels instead. In the gradient only the result is rounded.
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
"""The byte after a patch's last one: minus 128 it is 1, so its row of the product sums the tokens."""
PREPARE_KEYS = tl.constexpr(64)
PREPARE_WIDTH = tl.constexpr(32)
PREPARE_BIASES = tl.constexpr(4)
PREPARE_TOKENS = tl.constexpr(256)
WAVE = 132
"""Programs that run at once on the target GPUs (SMs of an H100 or H200)."""
SPLITS = 8
"""Most splits of the sum over tokens, if they are more than one wave of programs."""
PART_TOKENS = 384
"""Tokens whose products take as long as a split's part takes to be written and read (derived, not measured: 128 x 256
float32, twice, at an SM's share of 4.8 TB/s, and products at 47 % of 989 TFLOP/s)."""
LONGEST = 2**20
"""Tokens whose words are within 2^31 of each other: 588 words per token, plus the rest of their first and last
items."""


@triton.jit
def _of_channel(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def _fold_weights(weight, folded, block, width, rows, red, green, blue, STILL: tl.constexpr):
    """(D, channel, frame, pixel) to (frame, pixel, channel | padding, D), times the channel's scale."""
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
    """The bias plus each channel's weights times its shift, (D,) float32."""
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
    """Of every token: the word its patch starts at, words from one row of pixels to the next, and to the next frame.

    `items` (N, 5) int64: first token, first word, h, w, 1 for a video. `reach`: a power of two, at least N / 2.
    """
    t = block * PREPARE_TOKENS + tl.arange(0, PREPARE_TOKENS)
    low = tl.zeros((PREPARE_TOKENS,), tl.int32)
    step = reach
    while step > 0:  # the last item that starts at or before the token
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
    """Of tokens `t`: where they start, in words from `first`, and their strides (see `_locate`). All tokens of
    a program are so near to each other that the offset to the first one fits into 32 bits."""
    inside = t < tokens
    start = (tl.load(places + t, mask=inside, other=first) - first).to(tl.int32)
    line = tl.load(strides + t, mask=inside, other=0)
    frame = line if STILL else tl.load(strides + tokens + t, mask=inside, other=0)
    return start, line, frame


@triton.jit
def _words(pixels, start, line, frame, k, STILL: tl.constexpr, PAST: tl.constexpr):
    """Words `k` of patches: (tokens, words). `PAST` (None: there is no such word) follows the last one."""
    run = k % FRAME_WORDS
    place = start[:, None] + (run // RUN_WORDS)[None, :] * line[:, None] + (run % RUN_WORDS)[None, :]
    if not STILL:
        place += (k // FRAME_WORDS)[None, :] * frame[:, None]
    if PAST is None:
        return tl.load(pixels + place)
    return tl.load(pixels + place, mask=(k < (FRAME_WORDS if STILL else 2 * FRAME_WORDS))[None, :], other=PAST)


@triton.jit
def _centred(words, TOKENS: tl.constexpr, WORDS: tl.constexpr, TYPE: tl.constexpr):
    """(tokens, words) to (tokens, 2 * words): bytes minus 128."""
    wide = words.to(tl.int32)
    low = ((wide & 255).to(tl.float32) - MIDDLE).to(TYPE)
    high = ((wide >> 8 & 255).to(tl.float32) - MIDDLE).to(TYPE)
    return tl.reshape(tl.join(low, high), (TOKENS, 2 * WORDS))


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    # The interpreter multiplies the bits of bfloat16 like integers.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def embed_kernel(
    pixels, places, strides, folded, offset, out, tokens, width,
    STILL: tl.constexpr, STEPS: tl.constexpr, TAIL: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, WIDTH)  # neighbours share the pixels; the weights stay in L2
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
        # The words of the next step are loaded while these are multiplied. They are converted at the end: a left
        # operand computed in the step of its product stays in registers, and Triton 3.7 overwrites registers of
        # Hopper's asynchronous products while they are read. Carried through the loop it goes to shared memory.
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
    # Words are loaded one step ahead, their addresses two steps ahead. Beyond the end any pixel may be read, since
    # its gradient is 0.
    first = tl.load(places + tl.program_id(2) * span)
    start, line, frame = _where(places, strides, t, tokens, first, STILL)
    pixels += first
    ahead = _words(pixels, start, line, frame, k, STILL, ONES)
    left = _centred(ahead, TOKENS, WORDS, grad.dtype.element_ty)  # carried, as in `embed_kernel`
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
    v = tl.program_id(0) * KEYS + tl.arange(0, KEYS)  # (channel, frame, pixel), as the module has them
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
    """One program's share: `tokens` x `width` values of the result, `words` of the patches at a time (forward);
    2 * `words` rows x `width` of the gradient, `tokens` at a time (backward)."""

    tokens: int
    width: int
    words: int
    warps: int
    stages: int


def forward_tiles(half: bool, wide: bool) -> Tiles:
    """Wide tiles for tensor cores: a byte is split and converted once for all products of its row. With `wide` (see
    `kernels.gpu`) two warp groups hold 128 x 256 sums, for which other GPUs lack registers. Small tiles in float32."""
    if not half:
        return Tiles(64, 64, 16, 4, 2)
    return Tiles(128, 256, 32, 8, 4) if wide else Tiles(128, 128, 32, 8, 3)


def gradient_tiles(half: bool, wide: bool) -> Tiles:
    """As `forward_tiles`; a tile is 128 bytes of the patch high."""
    if not half:
        return Tiles(32, 64, 32, 4, 2)
    return Tiles(64, 256, 64, 8, 3) if wide else Tiles(64, 128, 64, 8, 3)


def cdiv(a: int, b: int) -> int:
    """Like triton.cdiv, which takes more than a microsecond outside kernels."""
    return -(-a // b)


def split_span(tokens: int, tiles: int, step: int) -> int:
    """Tokens of one of the splits of `tiles` tiles, a multiple of `step`, limited so that its offsets fit into 32 bits.

    Programs run in waves of `WAVE`. The number of splits is chosen whose waves end first, and the smallest of
    those: 80 tiles leave 52 SMs of one wave idle, but in three splits they fill 1.8 of two waves.
    """
    least = cdiv(tokens, LONGEST)
    counts = range(least, max(least, SPLITS, WAVE // tiles) + 1)
    spans = [cdiv(cdiv(tokens, splits), step) * step for splits in counts]
    return min(spans, key=lambda span: cdiv(tiles * cdiv(tokens, span), WAVE) * (span + PART_TOKENS))


def loop(still: bool, words: int) -> tuple[int, int]:
    """(full steps, words of a last short one) over the words of a patch; a product takes at least 16 bytes."""
    steps, rest = divmod(FRAME_WORDS.value * (1 if still else 2), words)
    return steps, triton.next_power_of_2(max(rest, 8))


def item_table(frames: Sequence[int], grid_thw: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of every item: first token, first word, h, w, 1 for a video."""
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
    """See `kernels.reference.patch_embed`; the weight in bfloat16, float16 or float32."""
    tokens = check_frames(pixels, frames, grid_thw)
    if not tokens:
        return F.linear(weight.new_empty(0, PATCH_VALUES), weight.flatten(1), bias)
    scales, shifts = fold_constants(mean, std)
    even = pixels if pixels.data_ptr() % 2 == 0 else pixels.clone()  # a slice may start at an odd address
    table = torch.tensor(item_table(frames, grid_thw), pin_memory=pixels.is_cuda)  # pinned: the host does not wait
    items = table.to(pixels.device, non_blocking=True)
    still = all(count == 1 for count in frames)
    return _PatchEmbed.apply(
        weight.contiguous(), bias, even.view(torch.int16), items, tokens, still, merge, (*scales, *shifts)
    )
