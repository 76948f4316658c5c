"""The encoder, which maps packed patches to packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from univitar_ds.config.encoder import EncoderConfig, read_encoder_config
from univitar_ds.geometry import token_count
from univitar_ds.model.attention import CuSeqlens
from univitar_ds.model.dropping import DropPlan
from univitar_ds.model.layers import Block, PatchEmbedding
from univitar_ds.model.transfer import to_device


class UniViTAR(nn.Module):
    """A native-resolution vision transformer for images and videos (arXiv 2504.01792).

    The encoder has no class token, learned positions or final norm: the output of the last block is the result.
    `attention` selects the back end. `checkpoint_every` k recomputes every k-th block in the backward pass (0: none).
    """

    def __init__(self, config: EncoderConfig, *, attention: str = "auto", checkpoint_every: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every = checkpoint_every
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
                `kernels.reference.patchify`, which need less time and memory and give the same result to rounding.
            grid_thw: (N, 3) numbers of tokens along time, height, width; on the host.
            frames: (N,) number of frames per item in the pixels, 1 for an image; on the host.
            output_hidden_states: whether to return the inputs of all blocks and the last output as well.
            drops: tokens and branches that are dropped in training.
        Returns: (T, D), or with hidden states a pair of (T, D) and a list of layers + 1 tensors (T, D); T without
        dropped tokens.
        Raises: ValueError if the number of patches does not fit the grids.
        """
        grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else [list(grid) for grid in grid_thw]
        lengths: Sequence[int] = [token_count(grid) for grid in grids]
        positions = grid_positions(grids, self.config.spatial_merge_size)
        if isinstance(frames, Tensor):
            frames = frames.tolist()
        x = self.embeddings["patch_embedding"](pixel_values, frames, grids)
        if len(positions) != len(x):
            raise ValueError(f"{len(x)} patches, the grids take {len(positions)}")
        factors = None
        if drops is not None:
            lengths, factors = drops.lengths, drops.token_factors(x.device)
            if drops.kept is not None:
                x, positions = x.index_select(0, to_device(drops.kept, x.device)), positions[drops.kept]
        spans = CuSeqlens.of(lengths, x.device)
        positions = to_device(positions, x.device)
        states = [x]
        for index, block in enumerate(self.encoder["layers"]):
            arguments = (x, positions, spans, None if factors is None else factors[index])
            if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
                # No block draws random numbers, so the random state is not saved and restored.
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
            if output_hidden_states:
                states.append(x)
        return (x, states) if output_hidden_states else x


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
