"""Computes the bytes of activations that an encoder keeps for the backward pass, and chooses what to recompute.

With the fused token-wise operations, a block keeps these values per token (D: hidden width, F: inner width):

| kept for the backward pass | none | selective | whole |
|---|---|---|---|
| its input | D | D | D |
| results of the matrix products: qkv, projection, gate and up, second layer | 5 D + 2 F | 5 D + 2 F | |
| result of the attention | D | D | |
| norms, rotated queries and keys, sum and gate | 5 D + F | | |

`benchmarks/results/bench_recompute.csv` compares these with counted bytes.
"""

from __future__ import annotations

from typing import Literal

from univitar_ds.config.encoder import EncoderConfig

Kind = int | Literal["selective"]
"""A value of `checkpoint_every`: 0 recomputes no block, k every k-th block, "selective" a part of every block."""
LADDER: tuple[Kind, ...] = (0, "selective", 2, 1)
"""Kinds from the least to the most recomputation. Selective recomputes no matrix product and no attention; every 2nd
block costs half a forward pass and every block a whole one. Every 3rd block would keep more than selective does."""
FUSED = 12, 3
"""What a block keeps with the fused operations if nothing is recomputed, in multiples of (D, F)."""


def bytes_per_token(config: EncoderConfig, kind: Kind, *, width: int, block: tuple[int, int] = FUSED) -> float:
    """Returns the bytes that all blocks keep for one token.

    Args: width: bytes of a value, 2 in bfloat16; block: what a block keeps if nothing is recomputed, as FUSED.
    """
    hidden, inner, layers = config.hidden_size, config.inner_width, config.num_hidden_layers
    statistics = 4 * config.num_attention_heads  # float32, of the attention's softmax
    whole = width * hidden
    selective = width * (7 * hidden + 2 * inner) + statistics
    if kind == "selective":
        return layers * selective
    recomputed = -(-layers // kind) if kind else 0
    return recomputed * whole + (layers - recomputed) * bytes_of_block(config, width=width, block=block)


def bytes_of_block(config: EncoderConfig, *, width: int, block: tuple[int, int] = FUSED) -> float:
    """Returns the bytes that a block keeps for one token if nothing is recomputed. Args: as `bytes_per_token`."""
    across, inner = block
    return width * (across * config.hidden_size + inner * config.inner_width) + 4 * config.num_attention_heads


def bytes_of_pack(config: EncoderConfig, kind: Kind, tokens: float, *, width: int) -> float:
    """Returns the peak bytes of a pack: the kept ones and, if blocks are recomputed, those of one whole block."""
    block = bytes_of_block(config, width=width) if kind else 0
    return tokens * (bytes_per_token(config, kind, width=width) + block)


def least_recomputation(config: EncoderConfig, tokens: float, free: float, *, width: int) -> Kind:
    """Returns the first kind of `LADDER` with which a pack fits into `free` bytes; the last one if none does."""
    fitting = (kind for kind in LADDER if bytes_of_pack(config, kind, tokens, width=width) <= free)
    return next(fitting, LADDER[-1])
