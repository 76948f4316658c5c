"""Exports a model as a program that runs without this package: torch.export, or ONNX for fixed grids.

Both programs take normalised patches, as `Preprocessor` makes them, and have the outputs

    tokens        (T, D), the encoder's output in the precision of its weights
    embeddings    (N, E) float32 unit vectors, if the model is whole

`config.json` beside the program has the preprocessing. The text tower is not exported.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.encoder import CONFIG_FILE, EncoderConfig
from univitar_ds.errors import CheckpointError, ConfigError, writing
from univitar_ds.extras import extra
from univitar_ds.formats.recognise import PROGRAM_FILES
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.formats.weight_files import remembering
from univitar_ds.geometry import cumulative, token_count
from univitar_ds.kernels import reference
from univitar_ds.model.contrastive import AttentionPool, ContrastiveModel
from univitar_ds.model.encoder import UniViTAR, grid_positions
from univitar_ds.model.weights import describe_misfit
from univitar_ds.owned import Names

PROGRAM, ONNX = PROGRAM_FILES["program"], PROGRAM_FILES["onnx"]
FILES: Names = {rf"{re.escape(PROGRAM)}|{re.escape(ONNX)}(\.data)?|{re.escape(CONFIG_FILE)}": None}
"""All entries that both exports make."""
LARGEST_FILE = 2**31 - 2**26
"""Maximum size in bytes of weights within the ONNX file. protobuf reads at most 2 GiB; 64 MiB are left for the graph.
"""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps q, k, v, each (T, H, K), to (T, H * K)."""


def export_program(model: StoredModel | nn.Module, folder: str | Path) -> dict[str, int]:
    """Writes `model.pt2`, a program of torch.export, and `config.json` to `folder`.

    The program takes `pixel_values` (T, 1176) float32, and `positions` and `cu_seqlens` of `program_inputs`. The
    numbers of tokens and items are free. Attention has a mask of T * T values, so the memory grows with the square of
    the pack: run long packs in parts. The whole model is in memory.

    Args: model: a stored model, a `UniViTAR` or a `ContrastiveModel`; see `image_program`.
    Returns: the size in bytes of each file.
    Raises: CheckpointError if tensors and configuration do not fit; StorageError if `folder` cannot be written.
    """
    folder = Path(folder)
    program = image_program(model)
    grids = [[1, 2, 4], [1, 4, 2], [1, 2, 2]]
    if (merge := program.config.spatial_merge_size) > 1:
        grids = [[t, h * merge, w * merge] for t, h, w in grids]
    tokens, bounds = torch.export.Dim("tokens"), torch.export.Dim("bounds")
    shapes = {"pixel_values": {0: tokens}, "positions": {0: tokens}, "cu_seqlens": {0: bounds}}
    with torch.no_grad():
        exported = torch.export.export(program, (_example(grids), *program_inputs(grids, merge)), dynamic_shapes=shapes)
    _prepare(folder, program.config)
    with writing(folder), (folder / PROGRAM).open("wb") as file, remembering(file) as stream:
        torch.export.save(exported, stream)
    return _sizes(folder)


def export_onnx(
    model: StoredModel | nn.Module, folder: str | Path, grid_thw: Sequence[Sequence[int]]
) -> dict[str, int]:
    """Writes `model.onnx`, which encodes packs of one sequence of grids, and `config.json` to `folder`.

    The only input is `pixel_values` (T, 1176) float32 with T the sum of t * h * w. The weights are converted to
    float32. The file's metadata has `grid_thw` as JSON. If the weights exceed `LARGEST_FILE`, they are in
    `model.onnx.data`, which must stay beside `model.onnx`. The whole model is in memory.

    Args: model: see `image_program`; grid_thw: (N, 3) tokens along time, height, width of the items.
    Returns: the size in bytes of each file.
    Raises: ConfigError if a grid is impossible; CheckpointError if tensors and configuration do not fit;
        InstallationError without the extra `onnx`; StorageError if `folder` cannot be written.
    """
    folder = Path(folder)
    free = image_program(model).float()
    grids = _checked(grid_thw, free.config.spatial_merge_size)
    with extra("onnx"):
        import onnxscript  # noqa: F401, torch.onnx imports it later
    program = FixedProgram(free, grids).eval()
    outputs = ["tokens"] if free.pool is None else ["tokens", "embeddings"]
    with torch.no_grad(), _quiet_exporter():
        exported = torch.onnx.export(
            program,
            (_example(grids),),
            input_names=["pixel_values"],
            output_names=outputs,
            dynamo=True,
            verbose=False,
        )
    exported.model.metadata_props["grid_thw"] = json.dumps(grids)
    size = sum(tensor.nbytes for tensor in program.state_dict().values())
    _prepare(folder, free.config)
    with writing(folder):
        exported.save(folder / ONNX, external_data=size > LARGEST_FILE)
    return _sizes(folder)


def program_inputs(grid_thw: Sequence[Sequence[int]] | Tensor, merge: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the inputs of an exported program that follow from the grids.

    Args: grid_thw: (N, 3) tokens along time, height, width; merge: `spatial_merge_size` of config.json.
    Returns: positions (T, 2) int64, row and column of each token; cu_seqlens (N + 1,) int64, the boundaries of the
        items along the tokens.
    """
    grids = [[int(side) for side in grid] for grid in grid_thw]
    return grid_positions(grids, merge), torch.tensor(cumulative([token_count(grid) for grid in grids]))


def image_program(model: StoredModel | nn.Module) -> ImageProgram:
    """Returns a copy of the encoder, with pooling and projection if the model is whole, on the CPU.

    Args: model: a stored model, a `UniViTAR` or a `ContrastiveModel`.
    Raises: CheckpointError if the tensors of a stored model do not fit its configuration; TypeError for other modules.
    """
    if isinstance(model, StoredModel):
        return _from_stored(model)
    if isinstance(model, UniViTAR):
        program = ImageProgram(model)
    elif isinstance(model, ContrastiveModel):
        program = ImageProgram(model.vision, model.pool, model.vision_proj)
    else:
        raise TypeError(f"model must be a StoredModel, UniViTAR or ContrastiveModel, got {type(model).__name__}")
    return copy.deepcopy(program).cpu().eval()


class ImageProgram(nn.Module):
    """The image side of a model for packs of any size, in operations that torch.export can record.

    The names of its tensors are those of `StoredModel`. The arithmetic is that of `kernels.reference`.
    """

    def __init__(self, vision: UniViTAR, pool: AttentionPool | None = None, vision_proj: nn.Linear | None = None):
        super().__init__()
        self.config = vision.config
        self.vision = vision
        self.pool = pool
        self.vision_proj = vision_proj

    def forward(self, pixel_values: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Returns tokens (T, D), or tokens and embeddings (N, E).

        Args: pixel_values: (T, 1176); positions: (T, 2); cu_seqlens: (N + 1,). Each item has at least one token.
        """
        index = torch.arange(pixel_values.shape[0], device=pixel_values.device)
        items = torch.bucketize(index, cu_seqlens, right=True) - 1
        mask = items[:, None] == items[None]
        tokens = self.encode(pixel_values, positions, lambda q, k, v: _masked(q, k, v, mask))
        if self.pool is None:
            return tokens
        # The number of items is read from the data: otherwise torch.export would require more than one item.
        count = items[-1].item() + 1
        torch._check(count >= 1)
        q, k, v = self.pool_inputs(tokens)
        return tokens, self.project(_pooled(q, k, v, items, count))

    def encode(self, pixel_values: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Returns the tokens, (T, D)."""
        x = self.vision.embeddings["patch_embedding"](pixel_values)
        for block in self.vision.encoder["layers"]:
            x = _block(block, x, positions, attend)
        return x

    def pool_inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the query (H, K), and keys and values (T, H, K) of the attention pooling."""
        pool = self.pool
        width = tokens.shape[1] // pool.heads
        normed = reference.rms_norm(tokens, pool.norm.weight, pool.norm.eps)
        k, v = pool.kv(normed).view(-1, 2, pool.heads, width).unbind(1)
        return pool.query.view(pool.heads, width), k, v

    def project(self, pooled: Tensor) -> Tensor:
        """Returns (N, E) unit vectors. Args: pooled: (N, D)."""
        return F.normalize(self.vision_proj(pooled).float(), dim=-1)


class FixedProgram(nn.Module):
    """An `ImageProgram` for packs of one sequence of grids: attention runs item by item, without a mask."""

    def __init__(self, program: ImageProgram, grids: list[list[int]]) -> None:
        super().__init__()
        self.program = program
        self.lengths = [token_count(grid) for grid in grids]
        positions = grid_positions(grids, program.config.spatial_merge_size)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Returns tokens (T, D), or tokens and embeddings (N, E). Args: pixel_values: (T, 1176)."""
        program, lengths = self.program, self.lengths
        tokens = program.encode(pixel_values, self.positions, lambda q, k, v: _by_item(q.split(lengths), k, v, lengths))
        if program.pool is None:
            return tokens
        query, k, v = program.pool_inputs(tokens)
        return tokens, program.project(_by_item([query[None]] * len(lengths), k, v, lengths))


def _block(block: nn.Module, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Returns the output of a block, (T, D), as its forward does.

    A block's own forward chooses kernels by device and back ends by number of items, which cannot be recorded.
    """
    attn, mlp = block.attn, block.mlp
    normed = reference.rms_norm(x, block.norm1.weight, block.norm1.eps)
    qkv = attn.qkv(normed).view(x.shape[0], 3, attn.heads, x.shape[1] // attn.heads)
    q_weight, k_weight = attn.external_parameters() or (None, None)
    q, k, v = reference.rope2d_qk_norm(qkv, positions, q_weight, k_weight, theta=attn.theta, eps=attn.eps)
    branch = attn.proj(attend(q, k, v))
    x, normed = reference.add_norm(x, branch, block.ls1, block.norm2.weight, block.norm2.eps)
    gated = reference.swiglu_norm(mlp.fc1(normed), mlp.fc3(normed), mlp.norm.weight, mlp.norm.eps)
    return torch.addcmul(x, mlp.fc2(gated), block.ls2)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns attention (Tq, H * K). Args: q: (Tq, H, K); k, v: (T, H, K); mask: (Tq, T), whether a query attends to a
    key; None: every query attends to every key.
    """
    heads = (part.transpose(0, 1)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask)[0].transpose(0, 1).flatten(1)


def _by_item(queries: Sequence[Tensor], k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Returns attention within items. Args: queries: of each item, (Tq, H, K); k, v: (T, H, K); lengths: tokens."""
    items = zip(queries, k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_masked(*item) for item in items])


def _pooled(q: Tensor, k: Tensor, v: Tensor, items: Tensor, count: int) -> Tensor:
    """Returns the attention (N, H * K) of one query over the tokens of each item, by sums over the tokens.

    Args: q: (H, K); k, v: (T, H, K); items: (T,) index of the item of each token; count: N.
    """
    heads, width = q.shape
    scores = (k.float() * q.float()).sum(-1) * width**-0.5
    highest = scores.new_zeros(count, heads).scatter_reduce(
        0, items[:, None].expand(-1, heads), scores, "amax", include_self=False
    )
    weights = (scores - highest.index_select(0, items)).exp()
    total = weights.new_zeros(count, heads).index_add(0, items, weights)
    summed = weights.new_zeros(count, heads, width).index_add(0, items, weights[:, :, None] * v.float())
    return (summed / total[:, :, None]).flatten(1).to(v.dtype)


def _from_stored(model: StoredModel) -> ImageProgram:
    config, joint = model.encoder, model.joint
    pool = projection = None
    with torch.device("meta"):
        vision = UniViTAR(config, attention="sdpa")
        if joint is not None:
            pool = AttentionPool(config.hidden_size, joint.pool_heads, config.layer_norm_eps, "sdpa")
            projection = nn.Linear(config.hidden_size, joint.embed_dim, bias=False)
        program = ImageProgram(vision, pool, projection)
    wanted = program.state_dict()
    found = {name: info for name, info in model.tensors.infos.items() if name in wanted}
    if complaint := describe_misfit(wanted, found):
        raise CheckpointError(
            f"the weights in {model.path} do not fit its configuration: {complaint}. Use the files of one model."
        )
    program.load_state_dict({name: model.tensors[name] for name in wanted}, assign=True)
    return program.eval()


def _checked(grid_thw: Sequence[Sequence[int]] | Tensor, merge: int) -> list[list[int]]:
    """Returns the grids as lists. Raises: ConfigError if there is none, or one is impossible."""
    grids = [[int(side) for side in grid] for grid in grid_thw]
    if not grids:
        raise ConfigError("there is no grid; give time, height and width of at least one item, in tokens")
    for grid in grids:
        if len(grid) != 3 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            blocks = f", height and width divisible by {merge} for this model" if merge > 1 else ""
            raise ConfigError(
                f"the grid {','.join(map(str, grid))} cannot be encoded; give time, height and width in tokens, each "
                f"at least 1{blocks}"
            )
    return grids


def _example(grids: Sequence[Sequence[int]]) -> Tensor:
    """Returns patches to record a program with, (T, 1176); their values do not matter."""
    return torch.zeros(sum(token_count(grid) for grid in grids), reference.PATCH_VALUES)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences warnings of the exporter that users cannot act on: about torchvision, which is unused, and its types."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _prepare(folder: Path, config: EncoderConfig) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def _sizes(folder: Path) -> dict[str, int]:
    names = (PROGRAM, ONNX, f"{ONNX}.data", CONFIG_FILE)
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
