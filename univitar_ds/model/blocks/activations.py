"""Computes the bytes of activations that an encoder keeps for the backward pass, and chooses what to recompute.

With the fused token-wise operations, a block keeps these values per token (D: hidden width, F: inner width):

| kept for the backward pass | none | selective | whole |
|---|---|---|---|
| its input | D | D | D |
| results of the matrix products: qkv, projection, gate and up, second layer | 5 D + 2 F | 5 D + 2 F | |
| result of the attention | D | D | |
| norms, rotated queries and keys, sum and gate | 5 D + F | | |

`benchmarks/results/bench_recompute.csv` compares these with counted bytes.

With tensor parallelism over t ranks a rank has 1/t of the heads and of F, but whole inputs, norms and results of a
block. Norms over a width that is split run in plain torch in float32. In bfloat16 (in float32) a block then keeps:

| kept for the backward pass | none | selective | whole |
|---|---|---|---|
| its input, two norms, the sum, results of the projection and of the second layer | 6 D | 3 D | D |
| qkv, result of the attention | 4 D / t | 4 D / t | |
| gate and up | 4 F / t (2 F / t) | 2 F / t | |
| queries and keys, in float32 before and after the division by the root, and normed | 10 D / t (6 D / t) | | |
| activated gate, product, divided by the root, in float32; the norm | 7 F / t (4 F / t) | | |
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from univitar_ds.config.encoder import EncoderConfig

Kind = int | Literal["selective"]
"""A value of `checkpoint_every`: 0 recomputes no block, k every k-th block, "selective" a part of every block."""
LADDER: tuple[Kind, ...] = (0, "selective", 2, 1)
"""Kinds from the least to the most recomputation. Selective recomputes no matrix product and no attention; every 2nd
block costs half a forward pass and every block a whole one. Every 3rd block would keep more than selective does."""


class Kept(NamedTuple):
    """Values of a token that a block keeps: in multiples of D, of the D of a rank's heads and of a rank's part of F."""

    whole: float
    heads: float
    inner: float

    def bytes(self, config: EncoderConfig, *, width: int, tensor: int = 1) -> float:
        """Returns the bytes for one token, with the statistics of the attention's softmax in float32.

        Args: width: bytes of a value; tensor: ranks that share the heads and F."""
        own = self.heads * config.hidden_size + self.inner * config.inner_width
        return width * (self.whole * config.hidden_size + own / tensor) + 4 * config.num_attention_heads / tensor


FUSED = Kept(6, 6, 3)
"""What a block keeps with the fused operations if nothing is recomputed."""
SPLIT = {2: Kept(6, 14, 11), 4: Kept(6, 10, 6)}
"""The same with tensor parallelism, by the bytes of a value."""
SELECTIVE = Kept(3, 4, 2)
"""What a block keeps with "selective"."""


def bytes_per_token(
    config: EncoderConfig, kind: Kind, *, width: int, tensor: int = 1, block: Kept | None = None
) -> float:
    """Returns the bytes that all blocks keep for one token.

    Args: width: bytes of a value, 2 in bfloat16; tensor: ranks that share the weights of a block; block: what a block
    keeps if nothing is recomputed, None: with the fused operations.
    """
    layers = config.num_hidden_layers
    if kind == "selective":
        return layers * SELECTIVE.bytes(config, width=width, tensor=tensor)
    recomputed = -(-layers // kind) if kind else 0
    kept = (layers - recomputed) * bytes_of_block(config, width=width, tensor=tensor, block=block)
    return recomputed * width * config.hidden_size + kept


def bytes_of_block(config: EncoderConfig, *, width: int, tensor: int = 1, block: Kept | None = None) -> float:
    """Returns the bytes that a block keeps for one token if nothing is recomputed. Args: as `bytes_per_token`."""
    fused = FUSED if tensor == 1 else SPLIT[width]
    return (block or fused).bytes(config, width=width, tensor=tensor)


def exchanged_bytes(config: EncoderConfig, kind: Kind, *, width: int) -> float:
    """Returns the bytes that all blocks keep for one token in addition if ranks share a pack: copies of the values and
    of the attention's result, in the order of heads."""
    layers = config.num_hidden_layers
    recomputed = -(-layers // kind) if isinstance(kind, int) and kind else 0
    return (layers - recomputed) * width * 2 * config.hidden_size


def bytes_of_pack(
    config: EncoderConfig, kind: Kind, tokens: float, *, width: int, tensor: int = 1, sequence: int = 1
) -> float:
    """Returns the peak bytes of a pack: the kept ones and, if blocks are recomputed, those of one whole block.

    Args: sequence: ranks that share the pack, of which each has `tokens` tokens.
    """
    block = bytes_of_block(config, width=width, tensor=tensor) if kind else 0
    exchanged = exchanged_bytes(config, kind, width=width) if sequence > 1 else 0
    return tokens * (bytes_per_token(config, kind, width=width, tensor=tensor) + block + exchanged)


def least_recomputation(
    config: EncoderConfig, tokens: float, free: float, *, width: int, tensor: int = 1, sequence: int = 1
) -> Kind:
    """Returns the first kind of `LADDER` with which a pack fits into `free` bytes; the last one if none does."""
    size = {"width": width, "tensor": tensor, "sequence": sequence}
    return next((kind for kind in LADDER if bytes_of_pack(config, kind, tokens, **size) <= free), LADDER[-1])
