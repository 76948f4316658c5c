"""Turns plans into batches: sets up decoding from the configuration, counts failures and collates packs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace

import torch
from tokenizers import Tokenizer

from univitar_ds import tokenization
from univitar_ds.config.data import DataConfig
from univitar_ds.data.batch import PackedBatch, rows
from univitar_ds.data.decoding.decode_job import DecodeItem, DecodeJob
from univitar_ds.data.decoding.pipeline import DecodedPack, Pipeline, PipelineConfig, PlansOf, decoded_inline
from univitar_ds.data.decoding.shared_slots import PageLock
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.sampler.bad_samples import INITIAL_STATE, BadPolicy, BadSampleMonitor
from univitar_ds.data.sampler.lanes import Plan
from univitar_ds.data.shards.samples import SizeRule
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import SampleError
from univitar_ds.geometry import TUBELET, Modality, item_bytes

AHEAD = 3
"""Number of packs decoded ahead if `data.prefetch_packs` is not set and workers share the CPU cores with the trainer.
While the trainer holds its maximum number of packs, `_FEWER` fewer are decoded ahead. Throughput stays the same."""
_FEWER = 2


def decoded(
    plans_of: PlansOf[Plan],
    data: DataConfig,
    sizes: Mapping[Modality, SizeRule],
    token_budget: int,
    *,
    packs_of_step: int = 1,
    prefetch_full_step: bool = False,
    from_s3: bool = False,
    page_lock: PageLock | None = None,
) -> Pipeline[Plan] | Generator[DecodedPack[Plan]]:
    """Iterates over the decoded packs of the plans; decodes in `data.workers` processes, or in this thread if 0.

    Args:
        sizes: size rule of each modality in the plans.
        token_budget: maximum number of tokens of a plan.
        packs_of_step: packs of one step. The trainer may hold max(packs_of_step, 2) packs without a copy.
        prefetch_full_step: whether to decode at least `packs_of_step` packs ahead.
        from_s3: whether shards are on S3.
        page_lock: see `Pipeline`.
    Returns: an iterator with a method `close`.
    """
    limits = DecodeLimits(data.max_image_px, data.decode_timeout_s, data.max_video_s)
    settings = StorageSettings.of(data)

    def job_of(plan: Plan) -> DecodeJob:
        rule = sizes[plan.modality]
        items = [DecodeItem.from_sample(sample, original=rule.original) for sample in plan.samples]
        return DecodeJob(plan.modality, rule.sampling, limits, items, plan.name, plan.whole_files)

    if data.workers == 0:
        return decoded_inline(plans_of, job_of, settings)
    config = PipelineConfig(
        workers=data.workers,
        prefetch_packs=data.prefetch_packs or (max(AHEAD, packs_of_step) if prefetch_full_step else AHEAD),
        slot_bytes=max(_bytes_of_a_token(modality) for modality in sizes) * token_budget,
        max_image_px=data.max_image_px,
        max_held_slots=max(packs_of_step, 2),
        shared_slots=0 if data.prefetch_packs or prefetch_full_step else _FEWER,
        restarts=data.worker_restarts,
        needs=[*sizes, "s3"] if from_s3 else [*sizes],
        settings=settings.shared(),
    )
    return Pipeline(plans_of, job_of, config, page_lock)


def _bytes_of_a_token(modality: Modality) -> int:
    """Returns the bytes of pixels per token: of TUBELET frames for a video, of one frame for an image."""
    return item_bytes((1, 1, 1), TUBELET if modality == "video" else 1)


class DecodingMonitor:
    """Applies the policy for bad samples to samples that fail to decode, in the order of the packs.

    The state is stored in the cursor of every pack and restored from the first pack of each lane.
    """

    def __init__(self, policy: BadPolicy) -> None:
        self._policy = policy
        self._monitors: dict[tuple[int, Modality], BadSampleMonitor] = {}

    def check(self, pack: DecodedPack) -> DecodedPack:
        """Counts the samples of a pack. Returns the pack with the new state in its cursor.

        Raises: DataError if the policy ends the run.
        """
        plan = pack.plan
        monitor = self._of(plan)
        counted = 0
        for index, kind, message in sorted(pack.failures):
            sample = plan.samples[index]
            monitor.good(index - counted)
            monitor.bad(f"{sample.name} at byte {sample.media_offset}", SampleError(kind, message))
            counted = index + 1
        monitor.good(len(plan.samples) - counted)
        if plan.cursor is None:
            return pack
        lane = {name: tuple(each.to_json()) for (lane, name), each in self._monitors.items() if lane == plan.lane}
        cursor = replace(plan.cursor, decoding={**plan.cursor.decoding, **lane})
        return replace(pack, plan=replace(plan, cursor=cursor))

    def _of(self, plan: Plan) -> BadSampleMonitor:
        stream = (plan.lane, plan.modality)
        if stream not in self._monitors:
            saved = INITIAL_STATE if plan.cursor is None else plan.cursor.decoding.get(plan.modality, INITIAL_STATE)
            where = f"lane {plan.lane}, {plan.modality}, decoding"
            self._monitors[stream] = BadSampleMonitor(self._policy, where, saved)
        return self._monitors[stream]


def tokenized(plans: Iterator[Plan], tokenizer: Tokenizer | None, context_length: int) -> Iterator[Plan]:
    """Yields the plans with the token ids of their captions. Runs in the planner's thread, not in the trainer's."""
    for plan in plans:
        if tokenizer is not None:
            captions = [sample.caption for sample in plan.samples]
            plan = replace(plan, token_rows=tokenization.token_rows(tokenizer, captions, context_length))
        yield plan


def collate(decoded: DecodedPack[Plan], tokenizer: Tokenizer | None) -> PackedBatch:
    """Returns the batch of a decoded, `tokenized` plan without its failed items. No tokenizer: no token ids."""
    plan = decoded.plan
    failed = {index for index, _, _ in decoded.failures}
    kept = [index for index in range(len(plan.samples)) if index not in failed]
    samples = [plan.samples[index] for index in kept]
    captions = [sample.caption for sample in samples]
    if tokenizer is None:
        token_ids, lengths = rows([()] * len(kept), 0), rows([0] * len(kept))
    else:
        assert plan.token_rows is not None, "the plan has not been tokenized"
        token_ids, lengths = tokenization.padded(tokenizer, [plan.token_rows[index] for index in kept])
    bad = Counter(plan.bad) + Counter(kind for _, kind, _ in decoded.failures)
    return PackedBatch(
        pixels=torch.from_numpy(decoded.pixels),
        frames=rows([sample.frames for sample in samples]),
        grid_thw=rows([sample.grid for sample in samples], 3),
        token_ids=token_ids,
        text_lengths=lengths,
        caption_ids=rows([tokenization.caption_id(caption) for caption in captions]),
        captions=captions,
        labels=[sample.label for sample in samples],
        sets=[sample.set for sample in samples],
        keys=[sample.name for sample in samples],
        modality=plan.modality,
        lane=plan.lane,
        index=plan.index,
        cursor=plan.cursor,
        bad=dict(bad),
        downscaled=sum(sample.downscaled for sample in samples),
        ignored=dict(plan.ignored),
        filtered=dict(plan.filtered),
        other_captions=[sample.other_captions for sample in samples],
    )
