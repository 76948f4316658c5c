"""Counts what the kinds of activation checkpointing keep and compute, for one training step of encoders.

`python -m benchmarks.bench_recompute` needs no GPU: bytes and FLOPs are counted, not timed. Blocks of the real width
run forward and backward in bfloat16 with the compiled token-wise operations, which keep the tensors that the Triton
kernels keep and one float32 per token and norm. Bytes are those of all tensors that were made in the forward pass and
are alive after it; FLOPs are those of matrix products and attention. The counts of one block are differences of two
depths, so that embedding and loss cancel. A block that is not recomputed keeps the attention's result twice on a CPU,
item by item and joined, and once on a GPU, where the predicted bytes belong.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.rows import RESULTS, add_rows, git_commit, processor
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.kernels.dispatch import compile_on_cpu
from univitar_ds.model.blocks.activations import bytes_of_pack, bytes_per_token
from univitar_ds.model.config import PRESETS
from univitar_ds.model.encoder import UniViTAR

Kind = int | Literal["selective"]
KINDS: dict[Kind, str] = {0: "none", "selective": "selective", 2: "every 2nd block", 1: "every block"}
GRIDS = [[1, 8, 16], [1, 8, 8], [1, 8, 8]]
TOKENS = sum(t * h * w for t, h, w in GRIDS)


class Counter(TorchDispatchMode):
    """Counts FLOPs of matrix products and attention, and remembers the storages of all tensors.

    Args: given: tensors that exist already; they and their views are not counted.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **kwargs or {})
        self.flops += flops_of(operation.name(), args)
        for tensor in tree_leaves((args, kwargs, result)):  # results of compiled operations are seen as arguments
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.given:
                    continue
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        """Returns the bytes of the results that are still alive."""
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def flops_of(name: str, args: Sequence[Any]) -> int:
    """Returns the FLOPs of an operation; 0 if it is no matrix product or attention."""
    if name in ("aten::mm", "aten::addmm"):
        first, second = args[-2:] if name == "aten::mm" else args[1:3]
        return 2 * first.shape[0] * first.shape[1] * second.shape[1]
    if name.startswith("aten::_scaled_dot_product"):
        query, key = args[1:3] if "backward" in name else args[:2]  # the backward pass has the gradient first
        _, heads, queries, width = query.shape
        forward = 4 * heads * queries * key.shape[2] * width
        return 2 * forward if "backward" in name else forward
    return 0


def counted(config: EncoderConfig, kind: Kind) -> tuple[int, int]:
    """Returns (bytes after the forward pass, FLOPs of forward and backward) of an encoder on one pack."""
    model = UniViTAR(config, checkpoint_every=kind).bfloat16()
    patches = torch.zeros(TOKENS, 1176, dtype=torch.bfloat16)
    with Counter([*model.parameters(), patches]) as counter:
        output = model(patches, GRIDS)
        kept = counter.alive()
        output.backward(torch.zeros_like(output))
    return kept, counter.flops


def rows_of(name: str, config: EncoderConfig) -> list[dict[str, Any]]:
    """Returns a row for each kind of an encoder."""
    found = {}
    for kind in KINDS:
        depths = [dataclasses.replace(config, num_hidden_layers=depth) for depth in (2, 4)]
        (less, fewer), (more, further) = (counted(one, kind) for one in depths)
        found[kind] = (more - less) / 2 / TOKENS, (further - fewer) / 2
    plain_bytes, plain_flops = found[0]
    layers = config.num_hidden_layers
    return [
        {
            "encoder": name,
            "kind": KINDS[kind],
            "tokens": TOKENS,
            "block_bytes_per_token": round(size, 1),
            "predicted_bytes_per_token": round(bytes_per_token(config, kind, width=2) / layers, 1),
            "of_bytes": round(size / plain_bytes, 3),
            "predicted_pack_of_32768_gb": round(bytes_of_pack(config, kind, 32768, width=2) / 1e9, 1),
            "of_flops": round(flops / plain_flops, 3),
            "torch": torch.__version__,
            "machine": processor(),
            "commit": git_commit(),
        }
        for kind, (size, flops) in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["0.3b", "0.6b", "1b"], choices=sorted(PRESETS))
    parser.add_argument("--out", default=str(RESULTS / "bench_recompute.csv"), help="CSV that rows are added to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compile_on_cpu(True)
    for name in arguments.encoders:
        rows = rows_of(name, PRESETS[name])
        for row in rows:
            print(*(f"{value}" for value in list(row.values())[:8]), sep="\t")
        add_rows(Path(arguments.out), rows)


if __name__ == "__main__":
    main()
