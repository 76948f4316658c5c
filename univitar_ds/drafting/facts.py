"""Combines the surveys of several sources into facts about the data of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.tools.survey import Survey
from univitar_ds.drafting.held_out import divided
from univitar_ds.errors import DataError
from univitar_ds.geometry import Modality, Resolution, token_count

FEWEST = 4
"""Minimum number of samples: two steps of two pairs."""


@dataclass(frozen=True)
class Facts:
    """The data of a run. `training`: the surveys to train on; `evaluation`: sources and splits to evaluate on."""

    training: tuple[Survey, ...]
    evaluation: tuple[tuple[Survey, str | None], ...]

    @property
    def exact(self) -> bool:
        """Whether the samples were counted, not estimated."""
        return all(survey.exact for survey in self.training)

    def count(self, modality: Modality) -> int:
        """Returns the number of training samples of a modality."""
        return sum(survey.counts[survey.training].get(modality, 0) for survey in self.training)

    @property
    def samples(self) -> int:
        return self.count("image") + self.count("video")

    def media(self, modality: Modality) -> list[MediaSize]:
        """Returns the sizes of the samples of a modality that were seen."""
        return [size for survey in self.training for size in survey.media if size.kind == modality]

    def sizes(self, modality: Modality) -> list[tuple[float, MediaSize]]:
        """Returns (weight, size) of the samples of a modality that were seen. Weights sum to the sample counts."""
        found = []
        for survey in self.training:
            own = [size for size in survey.media if size.kind == modality]
            count = survey.counts[survey.training].get(modality, 0)
            found += [(count / len(own), size) for size in own]
        return found

    def native_tokens(self, modality: Modality, share: float) -> float | None:
        """Returns the quantile `share` of the tokens of a frame at its native size; None if no size is known."""
        ordered = sorted((size.height * size.width / 196, weight) for weight, size in self.sizes(modality))
        left = share * sum(weight for _, weight in ordered)
        for tokens, weight in ordered:
            left -= weight
            if left <= 0:
                return tokens
        return ordered[-1][0] if ordered else None

    def mean_tokens(self, modality: Modality, rule: Resolution, frames: int = 1) -> float:
        """Returns the expected tokens of an item under a size rule; half of the range if no size is known."""
        found = self.sizes(modality)
        if not found:
            return (rule.min_tokens + rule.max_tokens) / 2
        counts = [
            (weight, token_count(rule.grid(size.height, size.width, min(frames, max(size.frames, 1)))))
            for weight, size in found
        ]
        return sum(weight * tokens for weight, tokens in counts) / sum(weight for weight, _ in counts)

    @property
    def captioned(self) -> float:
        """Share of the samples that have a caption."""
        return self._share(lambda texts: bool(texts.captions))

    def has_captions(self, survey: Survey) -> bool:
        """Whether every sample of a source that was seen has a caption."""
        return all(texts.captions for texts in survey.texts)

    def _share(self, has) -> float:
        shares = [(s, sum(map(has, s.texts)) / len(s.texts)) for s in self.training if s.texts]
        counts = [sum(survey.counts[survey.training].values()) for survey, _ in shares]
        total = sum(counts)
        return sum(count * share for count, (_, share) in zip(counts, shares, strict=True)) / total if total else 0.0

    @property
    def captions(self) -> list[str]:
        """The captions that were seen."""
        return [caption for survey in self.training for texts in survey.texts for caption in texts.captions]

    @property
    def classes(self) -> int:
        """Number of labels that were seen, in data sets with at least two."""
        found: dict[str | None, set[str]] = {}
        for name, label in (pair for survey in self.training for pair in survey.labels):
            found.setdefault(name, set()).add(label)
        return sum(len(labels) for labels in found.values() if len(labels) > 1)


def facts_of(surveys: Sequence[Survey]) -> Facts:
    """Returns the facts. A source with only held-out data is used for evaluation if another has training data. If there
    is nothing to evaluate on, a part of the sources without splits is held out.

    Raises: DataError if there is too little to train on.
    """
    held_out = [survey for survey in surveys if survey.only_evaluation]
    training = [survey for survey in surveys if not survey.only_evaluation] or held_out
    evaluation: list[tuple[Survey, str | None]] = [
        (survey, survey.evaluation) for survey in training if survey.evaluation is not None
    ]
    if training is not held_out:
        evaluation += [(survey, survey.training) for survey in held_out]
    if not evaluation:
        training = divided(training, FEWEST)
        evaluation = [(survey, survey.evaluation) for survey in training if survey.hold_out is not None]
    facts = Facts(tuple(training), tuple(evaluation))
    named = ", ".join(survey.path for survey in training)
    if facts.samples < FEWEST:
        raise DataError(
            f"{named}: {facts.samples} samples to train on, at least {FEWEST} are needed; add some, or check the files"
        )
    if not any(survey.texts for survey in training):
        raise DataError(
            f"{named}: no sample that was looked at has a caption or a label; `univitar-ds data verify` lists faults"
        )
    if not facts.captions and facts.classes < 2:
        raise DataError(
            f"{named}: no captions, and a single label; a run needs captions, or labels of at least two classes"
        )
    return facts
