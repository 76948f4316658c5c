"""What stands between plans and the trainer: decoding set up from the configuration, failures counted, batches made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping

import torch
from tokenizers import Tokenizer

from univitar_ds.config.schema import DataConfig
from univitar_ds.data import text
from univitar_ds.data.batch import PackedBatch, rows
from univitar_ds.data.lanes import Item, Plan, check_bad_in_a_row, report_bad
from univitar_ds.data.layout import Modality, item_bytes
from univitar_ds.data.pipeline import Pipeline, Rendered, rendered_inline
from univitar_ds.data.render import DecodeLimits, RenderItem, RenderJob
from univitar_ds.data.samples import SizeRule
from univitar_ds.errors import SampleError
from univitar_ds.geometry import TUBELET


def decoded(
    plans: Iterator[Plan], data: DataConfig, sizes: Mapping[Modality, SizeRule], token_budget: int
) -> Pipeline | Generator[Rendered]:
    """The decoded packs of `plans`, by `data.workers` processes or, with 0, in line. Both have `close`.

    `sizes` are the rules of the modalities in `plans`; `token_budget` the most tokens of a plan.
    """
    limits = DecodeLimits(data.max_image_px, data.decode_timeout_s)

    def job_of(plan: Plan) -> RenderJob:
        return RenderJob(plan.modality, sizes[plan.modality].sampling, limits, list(map(_render_item, plan.items)))

    if data.workers == 0:
        return rendered_inline(plans, job_of)
    # A clip stores TUBELET frames a token, a picture one: the slot fits either.
    slot_bytes = item_bytes((1, 1, token_budget), TUBELET)
    return Pipeline(plans, job_of, workers=data.workers, prefetch_packs=data.prefetch_packs, slot_bytes=slot_bytes)


def _render_item(item: Item) -> RenderItem:
    sample = item.sample
    return RenderItem(
        sample.shard.path,
        sample.media_offset,
        sample.media_length,
        sample.grid,
        sample.frames,
        sample.crc32,
        item.draw,
    )


class FailureCount:
    """Samples that failed in decoding, in the order of delivery: logged, and too many in a row are an error."""

    def __init__(self, max_bad_in_a_row: int) -> None:
        self._limit = max_bad_in_a_row
        self._in_a_row: Counter[tuple[int, Modality]] = Counter()

    def check(self, pack: Rendered) -> None:
        """Raises: DataError once more than the limit in a row have failed in one lane and modality."""
        plan = pack.plan
        reasons = {index: SampleError(kind, message) for index, kind, message in pack.failures}
        stream = (plan.lane, plan.modality)
        for index, item in enumerate(plan.items):
            error = reasons.get(index)
            if error is None:
                self._in_a_row[stream] = 0
                continue
            self._in_a_row[stream] += 1
            report_bad(item.sample.name, item.sample.media_offset, error)
            check_bad_in_a_row(self._in_a_row[stream], self._limit, f"lane {plan.lane}, step {plan.index}", error)


def collate(rendered: Rendered, tokenizer: Tokenizer | None, context_length: int) -> PackedBatch:
    """The batch of a decoded pack, without the items that failed; (N, 0) token ids without a tokenizer."""
    plan = rendered.plan
    failed = {index for index, _, _ in rendered.failures}
    items = [item for index, item in enumerate(plan.items) if index not in failed]
    captions = [item.caption for item in items]
    if tokenizer is None:
        token_ids, lengths = torch.zeros(len(items), 0, dtype=torch.int64), torch.zeros(len(items), dtype=torch.int64)
    else:
        token_ids, lengths = text.encode(tokenizer, captions, context_length)
    grids = [item.sample.grid for item in items]
    bad = Counter(plan.bad) + Counter(kind for _, kind, _ in rendered.failures)
    return PackedBatch(
        pixels=torch.from_numpy(rendered.pixels),
        frames=rows([item.sample.frames for item in items]),
        grid_thw=rows(grids, 3),
        token_ids=token_ids,
        text_lengths=lengths,
        caption_ids=rows([text.caption_id(caption) for caption in captions]),
        captions=captions,
        labels=[item.sample.label for item in items],
        sets=[item.sample.set for item in items],
        keys=[item.sample.name for item in items],
        modality=plan.modality,
        lane=plan.lane,
        index=plan.index,
        cursor={} if plan.cursor is None else plan.cursor.to_json(),
        bad=dict(bad),
    )
