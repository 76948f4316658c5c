"""Distillation: losses between features of the student and those of a frozen teacher, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine similarity of every row: (R, Dt), (R, Dt) -> (R,)."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's distance, quadratic up to a difference of 1 and linear beyond, mean over Dt: (R, Dt), (R, Dt) -> (R,)."""
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "smooth_l1": smooth_l1}


def distill(student: Tensor, teacher: Tensor, valid: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Sum of the distances between the rows of two feature sets; a caller divides by the rows of all packs and ranks.

    Args:
        student: (R, Dt), carries the gradient; teacher: (R, Dt), does not. Any precision: computed in float32.
        valid: (R,) bool; other rows, with any content, add nothing and get the gradient 0.
        kind: a name of DISTANCES.
    Returns: sum of the distances of the valid rows (), and of their cosine similarities (), which has no gradient.
    """
    # Both inputs are masked, not only the distances: 0 times a NaN of a masked row would be a NaN gradient.
    student, teacher = (rows.float().where(valid[:, None], 0.0) for rows in (student, teacher.detach()))
    distances = DISTANCES[kind](student, teacher).where(valid, 0.0)
    with torch.no_grad():
        agreement = F.cosine_similarity(student, teacher, dim=-1).where(valid, 0.0)
    return distances.sum(), agreement.sum()
