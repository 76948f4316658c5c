"""The softmax contrastive loss of this rank's images and one block of texts after another, in chunks of texts.

`Fused` is for kernels that process all that a chunk needs at once. `Plain` is for plain torch on a CPU, where every
operation reads the logits once more: a chunk has three operations for the normalisers and five for the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from univitar_ds.kernels import dispatch
from univitar_ds.objectives.chunks import compared

Ids = tuple[Tensor, Tensor] | None
"""Caption ids (n,) of the images and (m,) of the texts if equal captions are positive; else None."""


class _Compared:
    """The images of this rank, and what the texts so far have given for each of them.

    `row_norms`: (n,) log-sum-exp of the logits; `counts`, `sums`: (n,) number of positive texts and sum of their
    logits; `pulls`: (n, E) the sum over texts of gradient times text, without the scale.
    """

    def __init__(self, images: Tensor, own_ids: Tensor | None, chunk: int) -> None:
        """Args: images: (n, E), multiplied by the scale; own_ids: their caption ids if equal captions are positive."""
        self._images, self._own_ids, self._chunk = images, own_ids, chunk
        self.row_norms = images.new_full((len(images),), -torch.inf)
        self.counts, self.sums = torch.zeros_like(self.row_norms), torch.zeros_like(self.row_norms)
        self.pulls = torch.zeros_like(images)


class Fused(_Compared):
    """Compares with the kernels of `dispatch`, which find the positive pairs of a chunk themselves."""

    def norms(self, texts: Tensor, ids: Ids, first: int) -> Tensor:
        """Adds a block of texts to `row_norms`, `counts` and `sums`. Returns the log-sum-exp of each text, (m,).

        Args: texts: (m, E). first: index of the text of image 0; m or more if it is in another block.
        """
        norms = texts.new_full((len(texts),), -torch.inf)
        for part in compared(self._images, texts, ids, chunk=self._chunk, first=first):
            state = self.row_norms, norms[part.span], self.counts, self.sums
            dispatch.softmax_norms(part.logits, *state, part.first, part.ids)
        return norms

    def gradient(self, texts: Tensor, ids: Ids, norms: Tensor, first: int) -> Tensor:
        """Adds a block of texts to `pulls`. Returns the sum over images of gradient times image, (m, E).

        Must be called after `norms` was called with all blocks. Args: norms: (m,) of the texts, over all ranks.
        """
        gradient = texts.new_zeros(texts.shape)
        row_shifts, shifts, weights = -self.row_norms, -norms, 2 / self.counts
        for part in compared(self._images, texts, ids, chunk=self._chunk, first=first):
            dispatch.softmax_pairs(part.logits, row_shifts, shifts[part.span], weights, part.first, part.ids)
            self.pulls.addmm_(part.logits, texts[part.span])
            torch.mm(part.logits.T, self._images, out=gradient[part.span])
        return gradient


class Plain(_Compared):
    """Compares with plain torch. Methods as those of `Fused`.

    The chunks do not distinguish positive pairs. Sums over positive pairs are computed once for each block, from sums
    of the texts, or of the images, with the same caption.
    """

    def __init__(self, images: Tensor, own_ids: Tensor | None, chunk: int) -> None:
        super().__init__(images, own_ids, chunk)
        if own_ids is not None:
            self._captions, self._caption_of = own_ids.unique(return_inverse=True)

    def norms(self, texts: Tensor, ids: Ids, first: int) -> Tensor:
        """See `Fused.norms`. The log-sum-exp of each row and chunk is kept, 4 * n bytes, and added up at the end."""
        norms = texts.new_full((len(texts),), -torch.inf)
        if not len(self._images) or not len(texts):
            return norms
        rows = texts.new_empty(-(-len(texts) // self._chunk), len(self._images))
        for part, of_rows in zip(compared(self._images, texts, chunk=self._chunk, first=first), rows, strict=True):
            torch.logsumexp(part.logits, 1, out=of_rows)
            torch.logsumexp(part.logits, 0, out=norms[part.span])
        torch.logaddexp(self.row_norms, rows.logsumexp(0), out=self.row_norms)
        if ids is None:
            if first < len(texts):
                self.counts += 1
                self.sums += _products(self._images, texts[first : first + len(self._images)])
        else:
            captions = self._of_texts(ids[1])
            self.counts += captions.bincount(minlength=len(self._captions) + 1)[self._caption_of]
            self.sums += _products(self._images, self._summed(captions, texts)[self._caption_of])
        return norms

    def gradient(self, texts: Tensor, ids: Ids, norms: Tensor, first: int) -> Tensor:
        """See `Fused.gradient`."""
        gradient = texts.new_zeros(texts.shape)
        if not len(self._images) or not len(texts):
            return gradient
        weights = 2 / self.counts[:, None]
        if ids is None:
            own = slice(first, first + len(self._images))
            if first < len(texts):
                gradient[own].addcmul_(self._images, weights, value=-1)
                self.pulls.addcmul_(texts[own], weights, value=-1)
        else:
            captions = self._of_texts(ids[1])
            images = self._summed(self._caption_of, self._images * weights)
            torch.index_select(images.neg_(), 0, captions, out=gradient)
            self.pulls.addcmul_(self._summed(captions, texts)[self._caption_of], weights, value=-1)
        shifts = -self.row_norms, -norms
        for part in compared(self._images, texts, chunk=self._chunk, first=first, shifts=shifts):
            part.logits.exp_()  # the softmax over the row plus that over the column
            self.pulls.addmm_(part.logits, texts[part.span])
            gradient[part.span].addmm_(part.logits.T, self._images)
        return gradient

    def _of_texts(self, ids: Tensor) -> Tensor:
        """Returns the index of each text's caption among those of the images, (m,); their number if no image has it."""
        places = torch.searchsorted(self._captions, ids)
        known = self._captions[places.clamp(max=len(self._captions) - 1)] == ids
        return places.masked_fill_(~known, len(self._captions))

    def _summed(self, captions: Tensor, rows: Tensor) -> Tensor:
        """Returns the sums of the rows (r, E) with the same caption; one for each caption of the images, and a last one
        for other captions. Args: captions: (r,) indices."""
        sums = rows.new_zeros(len(self._captions) + 1, rows.shape[1])
        return sums.index_add_(0, captions, rows)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Returns the scalar product of each row of `a` with that of `b`: (n, E), (n, E) -> (n,)."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
