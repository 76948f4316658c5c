"""Distillation losses between the features of a student and of a frozen teacher, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes 1 - cosine similarity of every row: (R, Dt), (R, Dt) -> (R,)."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the smooth L1 distance of every row, mean over Dt: (R, Dt), (R, Dt) -> (R,).

    The distance is quadratic up to a difference of 1, and linear above."""
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "smooth_l1": smooth_l1}


def distill(student: Tensor, teacher: Tensor, valid: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Sums the distances between the rows of student and teacher. The caller divides by the rows of all packs and
    ranks.

    Distances are computed in float32 for any precision of the features.
    Args:
        student: (R, Dt), gets a gradient.
        teacher: (R, Dt), gets no gradient.
        valid: (R,) bool. Invalid rows add nothing and get a gradient of 0, whatever they contain.
        kind: a key of DISTANCES.
    Returns: the sum of the distances of the valid rows (), and the sum of their cosine similarities (), no gradient.
    """
    # Both inputs are masked, not only the distances: 0 times a NaN of a masked row would be a NaN gradient.
    student, teacher = (rows.float().where(valid[:, None], 0.0) for rows in (student, teacher.detach()))
    distances = DISTANCES[kind](student, teacher).where(valid, 0.0)
    with torch.no_grad():
        agreement = F.cosine_similarity(student, teacher, dim=-1).where(valid, 0.0)
    return distances.sum(), agreement.sum()
