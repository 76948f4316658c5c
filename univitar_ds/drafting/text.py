"""Chooses the text tower of a drafted run from the captions that were seen."""

from __future__ import annotations

from dataclasses import dataclass

from univitar_ds.drafting.sizes import Basis

_TOWERS = (
    (2_000, (128, 2, 2, 384, 1024)),
    (100_000, (192, 3, 3, 576, 2048)),
    (5_000_000, (384, 6, 6, 1536, 16_384)),
)
"""By number of different captions: width, layers, heads, width of the MLP, vocabulary."""
_LARGEST = (768, 12, 12, 3072, 32_768)
_TINY = (192, 3, 3, 576, 8192)
"""The largest tower beside the encoder `tiny`."""


@dataclass(frozen=True)
class Text:
    """Shape of a text tower and its reasons.

    `captions`: estimated number of different captions; `longest`: words of the 95th percentile of captions.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    captions: int
    longest: int


def text_of(basis: Basis) -> Text:
    """Returns a text tower that is small enough for the number of different captions."""
    seen = basis.facts.captions
    different = len(set(seen))
    texts = sum(len(survey.texts) for survey in basis.facts.training)
    if different > 0.5 * len(seen):  # most captions are unique, so samples that were not seen have others
        different = round(different * max(1.0, basis.facts.samples / texts))
    shape = next((shape for most, shape in _TOWERS if different < most), _LARGEST)
    if basis.small:
        shape = min(shape, _TINY)
    words = sorted(len(caption.split()) for caption in seen)
    longest = words[int(0.95 * (len(words) - 1))]
    context = min(77, max(16, -(-(2 * longest + 2) // 8) * 8))  # a word has less than two tokens on average
    return Text(*shape, context, different, longest)
