"""Muon on the matrices of blocks and AdamW on all other parameters, as one optimizer under ZeRO 1, 2 and 3.

Muon updates a matrix by its momentum, whose singular values Newton-Schulz iterations bring near 1 (arXiv:2502.16982).
Momentum is stored and updated in shards, like AdamW's moments; the iterations need whole matrices, which
`matrices.WholeMatrices` gathers. The order of operations is that of torch.optim.Muon, so with equal gradients the
weights are bitwise equal under any sharding.

DeepSpeed's own Muon (0.19) is not used: it works on gradients before they are clipped, and needs ZeRO-3 without
reduce-scatter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from univitar_ds.config.schema import MuonConfig
from univitar_ds.training.engine.node_sharding import Sharding
from univitar_ds.training.optimizers.matrices import Part, WholeMatrices

KIND = "muon"
MOMENTUM = "momentum_buffer"
"""The name of the moment in checkpoints, as in torch.optim.Muon."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 in an iteration (https://kellerjordan.github.io/posts/muon/), as in
torch.optim.Muon."""
EPS = 1e-7
"""Minimum norm that a matrix is divided by."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class MatricesAndAdamW(torch.optim.AdamW):
    """Groups whose `kind` is KIND are updated by Muon, the others by AdamW.

    The name of the class must not contain "muon", or DeepSpeed applies its own Muon.

    `place` must be called once the parameters are sharded, before the first step.
    """

    def __init__(
        self, groups: list[dict[str, Any]], muon: MuonConfig, scales: Mapping[str, float], **options: Any
    ) -> None:
        """Args: scales: the factor of the learning rate of each matrix, by name; options: those of AdamW."""
        super().__init__(groups, **options)
        self._muon, self.scales = muon, scales
        self._placed: dict[Tensor, _Placed] = {}

    def place(
        self,
        masters: Sequence[Tensor],
        parts: Mapping[str, Part],
        sharding: Sharding,
        device: torch.device,
    ) -> None:
        """Sets where the matrices are stored.

        Args: masters: the flat tensors of all groups; parts: of each matrix of `scales`, by name; device: of the rank.
        """
        for number, master in enumerate(masters):
            here = [(parts[name], scale) for name, scale in self.scales.items() if parts[name].flat == number]
            if here:
                self._placed[master] = _Placed(here, sharding, device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates all groups. All ranks that share the training state call it, since Muon gathers matrices."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group.get("kind") != KIND]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("kind") == KIND:
                for master in group["params"]:
                    self._update(master, group)

    def _update(self, master: Tensor, group: Mapping[str, Any]) -> None:
        settings, state = self._muon, self.state[master]
        momentum, gradient = state[MOMENTUM], master.grad
        assert gradient is not None, "DeepSpeed gives every flat tensor a gradient"
        momentum.lerp_(gradient, 1 - settings.momentum)
        update = gradient.lerp(momentum, settings.momentum) if settings.nesterov else momentum
        state["step"] += 1
        # The iterations compute in this type, so sending values in it loses nothing.
        update = update.to(_DTYPES[settings.precision])
        self._placed[master].update(master.data, update, settings, group["lr"], group["weight_decay"])


class _Placed:
    """The matrices of one flat tensor. Parts with the same learning rate are updated together."""

    def __init__(self, parts: Sequence[tuple[Part, float]], sharding: Sharding, device: torch.device) -> None:
        self._whole = WholeMatrices([part for part, _ in parts], sharding, device)
        self._pieces = [(part, part.lengths[sharding.rank], scale) for part, scale in parts]

    def update(self, master: Tensor, update: Tensor, settings: MuonConfig, lr: float, weight_decay: float) -> None:
        found = self._whole.apply(lambda matrix: orthogonalised(matrix, settings.ns_steps), update)
        together: dict[tuple[float, float], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for (part, length, scale), change in zip(self._pieces, found, strict=True):
            if length:
                rate = lr * scale
                rates = 1 - rate * weight_decay, -rate * rate_ratio(part.shape, settings.adjust_lr)
                together[rates].append((master.narrow(0, part.offset, length), change.to(master)))
        for (kept, rate), pieces in together.items():
            weights, changes = [list(tensors) for tensors in zip(*pieces, strict=True)]
            torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, changes, alpha=rate)


def rate_ratio(shape: Sequence[int], adjust_lr: str) -> float:
    """Returns the factor of the learning rate of a matrix of shape (n, m).

    The entries of an orthogonal matrix have a root mean square of 1 / sqrt(max(n, m)). With `match_rms_adamw` that of
    an update is 0.2 times the learning rate, about as with AdamW (arXiv:2502.16982); `original` needs other rates.
    """
    n, m = shape
    return 0.2 * math.sqrt(max(n, m)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1.0, n / m))


def orthogonalised(matrix: Tensor, iterations: int) -> Tensor:
    """Returns a matrix (n, m) with the same singular vectors, and singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)  # no singular value above 1
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
