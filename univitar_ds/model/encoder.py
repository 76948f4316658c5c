"""The encoder, which maps packed patches to packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from univitar_ds.config.encoder import EncoderConfig, read_encoder_config
from univitar_ds.errors import UserError
from univitar_ds.geometry import token_count
from univitar_ds.model.blocks.activations import Kind
from univitar_ds.model.blocks.attention import CuSeqlens
from univitar_ds.model.blocks.dropping import DropPlan
from univitar_ds.model.blocks.layers import Block, PatchEmbedding
from univitar_ds.model.blocks.rank_group import RankGroup
from univitar_ds.model.blocks.recompute import run_checkpointed
from univitar_ds.model.blocks.sequence_parallel import SplitPack
from univitar_ds.model.transfer import to_device


class UniViTAR(nn.Module):
    """A native-resolution vision transformer for images and videos (arXiv 2504.01792).

    The encoder has no class token, learned positions or final norm: the output of the last block is the result.
    `attention` selects the back end. `checkpoint_every` k recomputes every k-th block in the backward pass (0: none);
    "selective" recomputes norms, rotary positions and gates of every block, see `model.blocks.recompute`.
    """

    def __init__(self, config: EncoderConfig, *, attention: str = "auto", checkpoint_every: Kind = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every = checkpoint_every
        self.sequence = RankGroup()
        """The ranks over which the tokens of a pack are split in `forward`, see `blocks.sequence_parallel`."""
        self.embeddings = nn.ModuleDict({"patch_embedding": PatchEmbedding(config)})
        blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.apply(_initialise)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, attention: str = "auto", checkpoint_every: int = 0) -> Self:
        """Returns the encoder in a folder with the release's layout, in the stored precision and in evaluation mode.

        Raises: CheckpointError if the folder is incomplete or damaged, or if weights and configuration do not fit.
        """
        from univitar_ds.model.weights import load_into  # needs safetensors, which the encoder alone does not need

        with torch.device("meta"):
            model = cls(read_encoder_config(folder), attention=attention, checkpoint_every=checkpoint_every)
        load_into(model, folder, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` in the release's layout. Raises: StorageError."""
        from univitar_ds.model.weights import save_encoder

        save_encoder(folder, self)

    def forward(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | Sequence[Sequence[int]],
        *,
        frames: Tensor | Sequence[int] | None = None,
        output_hidden_states: bool = False,
        drops: DropPlan | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encodes a pack.

        Args:
            pixel_values: (T, 1176) normalised patches of all items in order; or, with `frames`, pixels (B,) uint8, see
                `kernels.reference.patchify`, which need less time and memory and give the same result up to rounding.
            grid_thw: (N, 3) numbers of tokens along time, height, width; on the host.
            frames: (N,) number of frames per item in the pixels, 1 for an image; on the host.
            output_hidden_states: whether to return the inputs of all blocks and the last output as well.
            drops: tokens and branches that are dropped in training.
        Returns: (T, D), or with hidden states a pair of (T, D) and a list of layers + 1 tensors (T, D); T without
        dropped tokens. If the pack is split over `sequence`, (T, D) are the tokens of the items that this rank owns,
        and hidden states those of its range of tokens.
        Raises: ValueError if the number of patches does not fit the grids.
        """
        if self.sequence.size > 1:
            x, states = self._forward_split(pixel_values, _as_lists(grid_thw), frames, drops)
            return (x, states) if output_hidden_states else x
        x, positions, grids = self._embedded(pixel_values, grid_thw, frames)
        lengths: Sequence[int] = [token_count(grid) for grid in grids]
        factors = None
        if drops is not None:
            lengths, factors = drops.lengths, drops.token_factors(x.device)
            if drops.kept is not None:
                x, positions = x.index_select(0, to_device(drops.kept, x.device)), positions[drops.kept]
        spans = CuSeqlens.of(lengths, x.device)
        positions = to_device(positions, x.device)
        states = [x]
        for index in range(len(self.encoder["layers"])):
            x = self._block(index, x, positions, spans, None if factors is None else factors[index])
            if output_hidden_states:
                states.append(x)
        return (x, states) if output_hidden_states else x

    def lengths(self, grids: Sequence[Sequence[int]], drops: DropPlan | None = None) -> Sequence[int]:
        """Returns the number of tokens of each item in the result of `forward` for a pack with these grids."""
        lengths = [token_count(grid) for grid in grids] if drops is None else drops.lengths
        if self.sequence.size == 1:
            return lengths
        first, end = SplitPack.of(grids, drops, self.sequence).items
        return lengths[first:end]

    def _forward_split(
        self,
        pixel_values: Tensor,
        grids: list[list[int]],
        frames: Tensor | Sequence[int] | None,
        drops: DropPlan | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the tokens of the items that this rank owns, and the hidden states of its range of tokens."""
        pack = SplitPack.of(grids, drops, self.sequence)
        frames = frames.tolist() if isinstance(frames, Tensor) else frames
        x = pack.own(self.embeddings["patch_embedding"](*pack.patches(pixel_values, frames)))
        begin, end = pack.tokens
        positions = grid_positions(grids, self.config.spatial_merge_size)[pack.indices]
        positions, spans = to_device(positions, x.device), pack.spans(x.device)
        factors = None if drops is None else drops.token_factors(x.device)
        states = [x]
        for index in range(len(self.encoder["layers"])):
            x = self._block(index, x, positions, spans, None if factors is None else factors[index, :, begin:end])
            states.append(x)
        return pack.to_owners(x), states

    def forward_intermediates(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | Sequence[Sequence[int]],
        indices: int | Sequence[int] | None = None,
        *,
        frames: Tensor | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Any]] | list[Any]:
        """Encodes a pack and returns the outputs of some blocks, as timm's method of this name, with gradients.

            final, (early, late) = encoder.forward_intermediates(pixel_values, grid_thw, [3, -1])
            late[0]             # (t, D, h, w) of item 0; an image has t = 1

        Args:
            pixel_values, grid_thw, frames: see `forward`.
            indices: blocks by number from 0; -1 is the last one. A single number n: the last n blocks. None: all.
            norm: whether to divide each token by its root mean square. The encoder has no final norm, and the size of
                tokens grows from block to block.
            stop_early: whether to end after the last of these blocks, whose output is then the first result.
            output_fmt: "NCHW": a list with a map (t, D, h, w) of each item, rows and columns in the order of the image;
                "NLC": the packed tokens (T, D) in the order of `forward`.
            intermediates_only: whether to return the second result only.
        Returns: the encoder's output (T, D), to which `norm` does not apply, and a list with an entry for each index,
        in their order.
        Raises: UserError if a block or format does not exist; ValueError as `forward`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f'output_fmt must be "NCHW" (maps of items) or "NLC" (packed tokens), got {output_fmt!r}')
        wanted = self._numbers(indices)
        end = max(wanted, default=-1) + 1 if stop_early or intermediates_only else len(self.encoder["layers"])
        x, positions, grids = self._embedded(pixel_values, grid_thw, frames)
        spans = CuSeqlens.of([token_count(grid) for grid in grids], x.device)
        positions = to_device(positions, x.device)
        found: dict[int, Tensor] = {}
        for index in range(end):
            x = self._block(index, x, positions, spans)
            if index in wanted:
                found[index] = x
        outputs: list[Any] = [found[index] for index in wanted]
        if norm:
            outputs = [_divided(output, self.config.layer_norm_eps) for output in outputs]
        if output_fmt == "NCHW":
            outputs = [token_maps(output, grids, self.config.spatial_merge_size) for output in outputs]
        return outputs if intermediates_only else (x, outputs)

    def attention_maps(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | Sequence[Sequence[int]],
        layer: int = -1,
        *,
        frames: Tensor | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Returns the attention probabilities of a block, (H, n, n) for each item of n = t*h*w tokens.

        Row i has the weights that token i gives to all tokens of its item, and sums to 1; tokens are in the order of
        `forward`. The probabilities are computed in float32 or wider, so an item needs at least 4 * H * n^2 bytes.
        `token_maps` makes a map from a row, or from the mean over heads and rows:

            (one,) = encoder.attention_maps(pixel_values, grid_thw)        # a pack of one item
            (seen,) = token_maps(one.mean(dim=(0, 1))[:, None], grid_thw, encoder.config.spatial_merge_size)

        Args: pixel_values, grid_thw, frames: see `forward`; layer: a block by number from 0; -1 is the last one.
        Raises: UserError if the block does not exist; ValueError as `forward`.
        """
        (number,) = self._numbers([layer])
        x, positions, grids = self._embedded(pixel_values, grid_thw, frames)
        spans = CuSeqlens.of([token_count(grid) for grid in grids], x.device)
        positions = to_device(positions, x.device)
        for index in range(number):
            x = self._block(index, x, positions, spans)
        block = self.encoder["layers"][number]
        return block.attn.probabilities(block.norm1(x), positions, spans)

    def _embedded(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | Sequence[Sequence[int]],
        frames: Tensor | Sequence[int] | None,
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Returns the patch embeddings (T, D), the positions (T, 2) on the host, and the grids of the items."""
        grids = _as_lists(grid_thw)
        positions = grid_positions(grids, self.config.spatial_merge_size)
        if isinstance(frames, Tensor):
            frames = frames.tolist()
        x = self.embeddings["patch_embedding"](pixel_values, frames, grids)
        if len(positions) != len(x):
            raise ValueError(f"{len(x)} patches, the grids take {len(positions)}")
        return x, positions, grids

    def _block(
        self, index: int, x: Tensor, positions: Tensor, spans: CuSeqlens, factors: Tensor | None = None
    ) -> Tensor:
        block = self.encoder["layers"][index]
        every, selective = self.checkpoint_every, self.checkpoint_every == "selective"
        if torch.is_grad_enabled() and (selective or (every and index % every == 0)):
            return run_checkpointed(block, x, positions, spans, factors, selective=selective)
        return block(x, positions, spans, factors)

    def _numbers(self, indices: int | Sequence[int] | None) -> list[int]:
        """Returns the numbers of blocks from 0, see `forward_intermediates`. Raises: UserError."""
        count = len(self.encoder["layers"])
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 0 < indices <= count:
                raise UserError(f"the last {indices} blocks were asked for, the encoder has {count}; give 1 to {count}")
            return list(range(count - indices, count))
        if strange := [index for index in indices if not -count <= index < count]:
            raise UserError(f"the encoder has no block {strange[0]}; its {count} blocks are {-count} to {count - 1}")
        return [index % count for index in indices]


def _as_lists(grid_thw: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    return grid_thw.tolist() if isinstance(grid_thw, Tensor) else [list(grid) for grid in grid_thw]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def grid_positions(grids: Sequence[Sequence[int]], merge: int) -> Tensor:
    """Returns row and column of every token of a pack, (T, 2) int64, in the order of `kernels.reference.patchify`."""
    steps = [np.empty((0, 2), dtype=np.int32)]
    for t, h, w in grids:
        steps += [_step_positions(h, w, merge)] * t
    return torch.from_numpy(np.concatenate(steps, dtype=np.int64))


@lru_cache(maxsize=1024)
def _step_positions(h: int, w: int, merge: int) -> np.ndarray:
    """Returns the positions of the tokens of one time step, (h * w, 2), in a read-only array that packs share."""
    cells = np.indices((h, w), dtype=np.int32).reshape(2, h // merge, merge, w // merge, merge)
    positions = cells.transpose(1, 3, 2, 4, 0).reshape(h * w, 2)
    positions.flags.writeable = False
    return positions


def raster_order(tokens: Tensor, grid: Sequence[int], merge: int) -> Tensor:
    """Reorders tokens of one item, (t*h*w, D) in `merge` x `merge` blocks, to raster order (t, h, w, D)."""
    t, h, w = grid
    blocks = tokens.reshape(t, h // merge, w // merge, merge, merge, -1)
    return blocks.transpose(2, 3).reshape(t, h, w, -1)


def token_maps(tokens: Tensor, grid_thw: Tensor | Sequence[Sequence[int]], merge: int) -> list[Tensor]:
    """Returns the packed tokens of each item as a map (t, D, h, w) with rows and columns in the order of the image.

    Args: tokens: (T, D) in the order of the encoder; grid_thw: (N, 3); merge: the encoder's `spatial_merge_size`.
    """
    grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    items = zip(tokens.split([token_count(grid) for grid in grids]), grids, strict=True)
    return [raster_order(item, grid, merge).permute(0, 3, 1, 2) for item, grid in items]


def _divided(x: Tensor, eps: float) -> Tensor:
    """Returns `x` divided by its root mean square over the last dimension, computed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return nn.functional.rms_norm(wide, x.shape[-1:], eps=eps).to(x.dtype)
