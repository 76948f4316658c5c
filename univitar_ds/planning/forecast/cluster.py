"""The cluster of a plan, and the assumptions of a plan in addition to those of `planning.step_time`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from univitar_ds.errors import ConfigError
from univitar_ds.planning.gpus import GPUS, Assumption, Gpu, known_gpu

USABLE = 0.9
"""Share of a GPU's memory that a plan may fill. The rest is for CUDA itself and for fragmentation."""
MOST_GPUS = 1 << 16
"""Maximum number of GPUs of a cluster."""
ASSUMPTIONS = {
    "usable_memory": Assumption(USABLE, "of a GPU's memory", "chosen", "the rest is for CUDA itself and fragmentation"),
    "image_bytes": Assumption(100e3, "bytes", "chosen", "mean of an encoded image with its caption"),
    "video_bytes": Assumption(2e6, "bytes", "chosen", "mean of an encoded video with its caption"),
    "shard_bytes": Assumption(1e9, "bytes", "chosen", "of a shard; one GET reads all of it"),
    "image_cpu": Assumption(
        0.75e-3, "core s", "measured", "an image read, decoded, resized and packed (docs/performance.md)"
    ),
    "video_cpu": Assumption(
        40e-3, "core s", "measured", "8 frames of h264 at 640 x 480 (benchmarks/results/bench_video_decode.csv)"
    ),
    "decoded_frames": Assumption(8, "frames", "measured", "of video_cpu, which grows with the frames of a stage"),
    "rank_bytes": Assumption(
        0.6e9, "bytes", "measured", "host memory of a rank after its imports, on a CPU (bench_plan_memory.py)"
    ),
    "cuda_bytes": Assumption(2e9, "bytes", "chosen", "host memory that CUDA and NCCL add to a rank"),
    "worker_bytes": Assumption(
        80e6, "bytes", "measured", "of a decoding process, without pixels (docs/performance.md)"
    ),
    "evaluation_items": Assumption(
        50_000, "items", "chosen", "of evaluation.sources, where no manifest on this machine has their number"
    ),
    "evaluation_start": Assumption(
        10, "s", "chosen", "of an evaluation during training: listing of sources, start of decoders, and figures"
    ),
    "write_rate": Assumption(1e9, "bytes/s of a machine", "chosen", "to the folder of checkpoints"),
    "copy_rate": Assumption(
        10e9, "bytes/s of a GPU", "chosen", "of a checkpoint to host memory; half of what a PCIe 4 x16 link carries"
    ),
    "native_tokens": Assumption(1024, "tokens", "chosen", "mean image at native size, within the stage's limits"),
    "attended": Assumption(1500 / 1024, "of the mean", "chosen", "tokens that a token attends to, at native sizes"),
    "sizes": Assumption(24, "sizes", "chosen", "of the items of a pack at native sizes"),
    "fill": Assumption(0.985, "of token_budget", "measured", "packs of several sizes (docs/performance.md)"),
    "fused_host": Assumption(
        0.25, "of the host time of a launch", "measured", "with cached launchers (benchmarks/results/bench_launch.csv)"
    ),
    "loss_kernels": Assumption(
        8, "kernels a chunk", "derived", "of the contrastive loss, whose texts are gathered at once"
    ),
    "balanced": Assumption(
        1.02, "of the mean", "measured", "longest pack with cost_budget_tflops (docs/performance.md)"
    ),
    "unbalanced": Assumption(1.36, "of the mean", "measured", "longest of 256 packs without (docs/performance.md)"),
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `per_node` GPUs each. `name`: the key of the GPU in `planning.gpus.GPUS`."""

    nodes: int
    per_node: int
    name: str

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.name]

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def room(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return USABLE * self.gpu.memory.value

    @property
    def title(self) -> str:
        machines = f"{self.nodes:,} machine{'' if self.nodes == 1 else 's'}"
        return f"{self.ranks:,} {self.name} of {self.gpu.memory.value / 1e9:.0f} GB on {machines}"


def cluster_of(nodes: int, per_node: int, gpu: str) -> Cluster:
    """Returns a cluster. Args: nodes: machines; per_node: GPUs of each; gpu: name of the GPU, in upper or lower case.

    Raises: ConfigError for an unknown GPU or too many GPUs.
    """
    name = gpu.upper()
    if name not in GPUS:
        raise ConfigError(f"--gpu {gpu} is not known; give one of {', '.join(known.lower() for known in GPUS)}")
    if nodes * per_node > MOST_GPUS:
        raise ConfigError(
            f"--nodes {nodes} x --gpus-per-node {per_node} are {nodes * per_node:,} GPUs; give at most {MOST_GPUS:,}"
        )
    return Cluster(nodes, per_node, name)


def this_gpu() -> str | None:
    """Returns the key in GPUS of this machine's first GPU; None without a GPU or for one that is not in GPUS."""
    import torch

    return known_gpu(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def of_ranks(cluster: Cluster, ranks: int) -> Cluster:
    """Returns a cluster of the same machines with at least `ranks` GPUs: a part of one machine, or whole machines."""
    per_node = min(cluster.per_node, ranks)
    return Cluster(-(-ranks // per_node), per_node, cluster.name)


def value(name: str) -> float:
    """Returns the value of an assumption."""
    return ASSUMPTIONS[name].value


def assumption_lines(cluster: Cluster, step: dict[str, Assumption]) -> Iterator[str]:
    """Yields a line for each assumption of a plan. Args: step: the assumptions of `step_time` that it uses."""
    yield "teachers and texts run packed, SigLIP's texts padded to full length (derived: as the trainer on GPUs)"
    for name, one in [*ASSUMPTIONS.items(), *step.items(), *cluster.gpu.assumptions()]:
        yield f"{name}: {one.value:.4g} {one.unit} ({one.kind}: {one.source})"
