"""Slices of tensors for tensor parallelism: which elements of a whole tensor each slice has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Slice `place` of `count` slices of one size.

    The flattened whole tensor consists of runs of `run` elements, of which each slice has one in turn. A slice of rows
    has one run; a slice of columns one in each row; a slice of whole heads of attn.qkv three, in q, k and v.
    """

    run: int
    count: int
    place: int
    whole_shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """Returns this slice of a whole tensor, flattened."""
        return whole.reshape(-1, self.count, self.run)[:, self.place].reshape(-1)

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Copies this slice, flattened, to its places in the flat `whole`."""
        whole.view(-1, self.count, self.run)[:, self.place].copy_(part.view(-1, self.run))
