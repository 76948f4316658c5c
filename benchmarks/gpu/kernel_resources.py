"""Resource usage of every compiled Triton kernel, without a GPU: registers, stack, shared memory, width of the loads.

    python benchmarks/gpu/kernel_resources.py [--out FILE] [--sizes 0.6b ...] [--ptx FOLDER]

The launchers are called with tensors of the real widths; their kernels are compiled for Ampere and Hopper instead of
being run. Rows are written to results/kernel_resources.csv, and a test compares that file with a new compilation.
`stack_bytes` is the size of spilled registers. `instructions` is the number of instructions that a warp issues for the
`rows` of its program, in a backward per round of its loop. The columns `loads_*` count load instructions;
`loads_ahead` counts loads that fetch the next rows into shared memory during the current round (cp.async).
`resident_warps` is the number of warps, of the 64 of an SM, for which registers and shared memory suffice.
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.rows import RESULTS, write_rows
from univitar_ds.kernels import fused, gpu

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_BYTES_PER_SM = {80: 164 * 1024, 90: 228 * 1024}  # CUDA programming guide, compute capabilities
SM_COUNT = {80: 108, 90: 132}
REGISTERS_PER_SM, WARPS_PER_SM, REGISTER_UNIT = 65536, 64, 256
TOKENS = 48
ARCHITECTURES = tuple(SHARED_BYTES_PER_SM)
SIZES = {"0.3b": (16, 64, 2816), "0.6b": (16, 80, 3456), "1b": (24, 80, 5120), "1b-16": (16, 120, 5120)}
"""(heads, head width, feed-forward width); "1b-16" is the 1B encoder with 16 heads instead of 24, also 1920 wide."""


@dataclass(frozen=True)
class Case:
    """One call of a public function, forward and backward if it has one; `size` is a key of `SIZES`."""

    operation: str
    size: str
    dtype: torch.dtype
    outputs: Callable[[], Any]


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")


def token_wise_cases() -> Iterator[Case]:
    for dtype, sizes in ((torch.bfloat16, list(SIZES)), (torch.float32, ["0.3b"])):
        for size in sizes:
            heads, width, inner = SIZES[size]
            zeros = lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype, requires_grad=True)  # noqa: E731
            x, d, f = zeros(TOKENS, heads * width), zeros(heads * width), zeros(inner)
            wide, qkv = zeros(TOKENS, inner), zeros(TOKENS, 3, heads, width)
            positions = torch.zeros(TOKENS, 2, dtype=torch.int64)
            yield Case(
                "rope2d_qk_norm", size, dtype,
                lambda q=qkv, p=positions, d=d: fused.rope2d_qk_norm(q, p, d, d, theta=1e4, eps=1e-6),
            )  # fmt: skip
            yield Case("swiglu_norm", size, dtype, lambda wide=wide, f=f: fused.swiglu_norm(wide, wide, f, 1e-6))
            if size != "1b-16":  # the rows are the same as those of 1b
                yield Case("add_norm", size, dtype, lambda x=x, d=d: fused.add_norm(x, x, d, d, 1e-6))
                yield Case("rms_norm", size, dtype, lambda x=x, d=d: fused.rms_norm(x, d, 1e-6))


def patch_embed_cases() -> Iterator[Case]:
    """Yields one width per dtype, since the tiles are the same at every width."""
    for dtype, size in ((torch.bfloat16, "0.6b"), (torch.float32, "0.3b")):
        heads, width, _ = SIZES[size]
        weight = torch.zeros(heads * width, 3, 2, 14, 14, dtype=dtype, requires_grad=True)
        bias = torch.zeros(heads * width, dtype=dtype, requires_grad=True)
        for media, frames, grid in (("stills", 1, (1, 6, 8)), ("videos", 4, (2, 6, 4))):
            pixels = torch.zeros(frames * grid[1] * grid[2] * 588, dtype=torch.uint8)
            yield Case(
                f"patch_embed {media}", size, dtype,
                lambda p=pixels, f=frames, g=grid, w=weight, b=bias: fused.patch_embed(
                    p, [f], [g], w, b, mean=(0.5,) * 3, std=(0.2,) * 3, merge=1
                ),
            )  # fmt: skip


def pair_cases() -> Iterator[Case]:
    """Yields the losses of 48 images and a chunk of 1,024 texts; the width of the embeddings does not matter."""
    logits, rows, columns = torch.zeros(TOKENS, 1024), torch.zeros(TOKENS), torch.zeros(1024)
    ids = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros(1024, dtype=torch.int64)
    for name, given in (("", None), (" captions", ids)):
        yield Case(
            f"sigmoid_pairs{name}", "0.6b", torch.float32, lambda g=given: fused.sigmoid_pairs(logits, rows, 5, g)
        )
        yield Case(
            f"softmax_norms{name}", "0.6b", torch.float32,
            lambda g=given: fused.softmax_norms(logits, rows, columns, rows, rows, 5, g),
        )  # fmt: skip
        yield Case(
            f"softmax_pairs{name}", "0.6b", torch.float32,
            lambda g=given: fused.softmax_pairs(logits, rows, columns, rows, 5, g),
        )  # fmt: skip


def launches_of(case: Case, arch: int) -> list[Launch]:
    """Returns the kernel launches of the forward and the backward of a case, without running them."""
    launches = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [name for name in kernel.arg_names if name not in kwargs]
        arguments = dict(zip(names, args, strict=True)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        launches.append(Launch(kernel, {name: arguments[name] for name in kernel.arg_names}, options))

    original, JITFunction.run = JITFunction.run, record
    shared = SHARED_BYTES_PER_SM[arch] - gpu.SYSTEM_BYTES
    limits, gpu.limits = gpu.limits, lambda device: gpu.Limits(SM_COUNT[arch], shared, wide=arch >= 90)
    try:
        outputs = case.outputs()
        if outputs is not None:  # the losses of pairs compute their gradients themselves
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    finally:
        JITFunction.run, gpu.limits = original, limits
    return launches


def compiled(launch: Launch, arch: int) -> Any:
    """Compiles a launch with Triton's own functions, specialised as at run time."""
    target, kernel = GPUTarget("cuda", arch, 32), launch.kernel
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options, debug=False)
    options, *source = kernel._pack_args(backend, launch.options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, *source), target=target, options=options.__dict__)


def resources(case: Case, launch: Launch, arch: int, ptx_folder: Path | None = None) -> dict[str, Any]:
    """Returns one row of the table. Writes the kernel's PTX to a file in `ptx_folder` if given."""
    kernel = compiled(launch, arch)
    if ptx_folder is not None:
        names = (case.operation.replace(" ", "_"), launch.name, case.size, str(case.dtype), f"sm_{arch}.ptx")
        (ptx_folder / "-".join(names)).write_text(kernel.asm["ptx"], encoding="utf-8")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    ptx = kernel.asm["ptx"]
    loads = [int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", ptx)]
    loads += [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.\S+ [^,]+, [^,]+, (0x\w+)", ptx)]
    warps = kernel.metadata.num_warps
    return {
        "operation": case.operation,
        "kernel": launch.name,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "arch": f"sm_{arch}",
        "warps": warps,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": kernel.metadata.shared,
        "resident_warps": _resident_warps(warps, registers, kernel.metadata.shared, arch),
        "loads_16_bytes": loads.count(16),
        "loads_8_bytes": loads.count(8),
        "loads_narrower": sum(width < 8 for width in loads),
        "instructions": _instructions(code),
        "rows": launch.arguments.get("R", launch.arguments.get("TOKENS")),
        "loads_ahead": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        "barriers": ptx.count("bar.sync"),
        "triton": triton.__version__,
    }


def _instructions(code: str) -> int:
    """Returns the number of machine instructions of the largest loop, or of the whole kernel if no loop has more than
    50."""
    count, labels, loops = 0, {}, [0]
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/ ", line) and "NOP" not in line:
            count += 1
            if (jump := re.search(r"BRA\S* .*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
                loops.append(count - labels[jump[1]])
    return max(loops) if max(loops) > 50 else count


def _resident_warps(warps: int, registers: int, shared: int, arch: int) -> int:
    by_registers = REGISTERS_PER_SM // (warps * -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT)
    by_shared = SHARED_BYTES_PER_SM[arch] // (shared + gpu.SYSTEM_BYTES)
    return warps * min(by_registers, by_shared, WARPS_PER_SM // warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel_resources.csv")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ptx", type=Path, help="folder for the PTX of every kernel")
    options = parser.parse_args()
    if options.ptx:
        options.ptx.mkdir(parents=True, exist_ok=True)
    cases = [case for case in (*token_wise_cases(), *patch_embed_cases(), *pair_cases()) if case.size in options.sizes]
    work = [
        (case, launch, arch)
        for case in cases
        for launches in zip(*(launches_of(case, arch) for arch in ARCHITECTURES), strict=True)
        for launch, arch in zip(launches, ARCHITECTURES, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda each: resources(*each, options.ptx), work))
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
