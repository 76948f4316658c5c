"""The packs of an evaluation: every readable sample once, in the order of the shards."""

import numpy as np
import pytest

from tests.support.loading import STAGE, same
from tests.support.shards import image, video, write_demo_shards, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data import loader
from univitar_ds.data.loader import EvalShare, eval_packs
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo_shards(tmp_path_factory.mktemp("demo"), images=60, videos=12, shards=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    train_tokenizer(["a red image number one", "a bar moves left"], 300).save(str(path))
    return path


def sweep(folder, modality="image", *, workers=0, token_budget=100, split="test", tokenizer=None, share=None):
    return list(
        eval_packs(
            [SourceConfig(path=str(folder), split=split)],
            modality=modality,
            resolution=STAGE.resolution(modality),
            video_frames=4,
            token_budget=token_budget,
            tokenizer=tokenizer,
            context_length=16,
            data=DataConfig(sources=[SourceConfig(path=str(folder))], workers=workers),
            share=share,
        )
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_without_a_readable_sample_counts_the_bad_samples_and_ends(tmp_path, workers):
    write_tar(tmp_path / "a.tar", [(f"k{n}", {"jpg": image(40, 40)}) for n in range(3)])
    assert [(len(pack), pack.bad) for pack in sweep(tmp_path, workers=workers)] == [(0, {"no_caption": 3})]


def test_an_evaluation_sees_every_sample_once_in_order(folder, tokenizer):
    packs = sweep(folder, tokenizer=tokenizer)
    keys = [key for pack in packs for key in pack.keys]
    assert keys == [f"test-image-000000/i{n:05d}" for n in range(60, 75)]
    assert all(caption.startswith("a ") for pack in packs for caption in pack.captions)
    assert all(pack.tokens <= 100 for pack in packs)
    assert [pack.index for pack in packs] == list(range(len(packs)))
    videos = sweep(folder, "video")
    assert sum(len(pack) for pack in videos) == 3
    assert all(set(pack.frames.tolist()) == {4} for pack in videos)


def test_evaluation_packs_are_the_same_with_and_without_workers(folder, tokenizer):
    inline, decoded = (sweep(folder, tokenizer=tokenizer, workers=n) for n in (0, 1))
    assert all(same(a, b) for a, b in zip(inline, decoded, strict=True))


def test_an_item_above_the_token_budget_has_a_pack_to_itself(folder):
    packs = sweep(folder, token_budget=10, workers=1)
    assert sum(len(pack) for pack in packs) == 15
    assert max(pack.tokens for pack in packs) > 10
    assert min(len(pack) for pack in packs) == 1
    assert all(len(pack) == 1 for pack in packs if pack.tokens > 10)


def test_bad_samples_at_the_end_of_an_evaluation_are_counted_too(tmp_path):
    samples = [("a", {"png": image(28, 28, form="PNG"), "txt": b"t"}), ("b", {"png": b"junk", "txt": b"t"})]
    folder = write_tar(tmp_path / "t" / "a.tar", samples).parent
    (pack,) = sweep(folder)
    assert (pack.keys, pack.bad) == (["a/a"], {"unreadable": 1})
    write_tar(folder / "a.tar", [samples[1], samples[0], ("c", samples[0][1]), ("d", samples[0][1])])
    packs = sweep(folder, token_budget=4)
    assert [pack.bad for pack in packs] == [{"unreadable": 1}, {}, {}]
    write_tar(folder / "a.tar", samples[1:])
    (pack,) = sweep(folder)
    assert (len(pack), pack.bad) == (0, {"unreadable": 1})


def test_a_video_keeps_its_frames_in_order(tmp_path):
    content = video(28, 56, frames=4)
    folder = write_tar(tmp_path / "t" / "a.tar", [("c", {"mp4": content, "txt": b"t"})]).parent
    (pack,) = sweep(folder, "video")
    t, h, w = pack.grid_thw[0].tolist()
    frames = pack.pixels.reshape(2 * t, h * 14, w * 14, 3).numpy().astype(np.int64)
    bright = frames.sum(axis=(1, 3)).argmax(axis=1)
    assert list(bright) == sorted(bright)
    assert bright[0] < bright[-1]


@pytest.mark.parametrize(("split", "whole"), [("test", False), ("train", True)])
def test_the_shares_of_ranks_are_all_samples_once(folder, monkeypatch, split, whole):
    monkeypatch.setattr(loader, "WHOLE_SHARDS", 1)  # three shards for training, one for test
    sources = [SourceConfig(path=str(folder), split=split)]
    shards = find_shards(sources, StorageSettings())
    keys = [
        [key for pack in sweep(folder, split=split, share=EvalShare(shards, place, 2)) for key in pack.keys]
        for place in range(2)
    ]
    assert sorted(keys[0] + keys[1]) == sorted(key for pack in sweep(folder, split=split) for key in pack.keys)
    owners = [{key.split("/")[0] for key in own} for own in keys]
    assert owners[0].isdisjoint(owners[1]) == whole, "many shards are shared as a whole, few by their samples"
    assert abs(len(keys[0]) - len(keys[1])) <= (20 if whole else 1)


def test_a_bad_sample_is_counted_by_one_rank(tmp_path):
    samples = [(f"k{n}", {"png": b"junk" if n == 2 else image(28, 28, form="PNG"), "txt": b"t"}) for n in range(5)]
    folder = write_tar(tmp_path / "t" / "a.tar", samples).parent
    shards = find_shards([SourceConfig(path=str(folder))], StorageSettings())
    packs = [pack for place in range(3) for pack in sweep(folder, split=None, share=EvalShare(shards, place, 3))]
    assert sum(len(pack) for pack in packs) == 4
    assert [pack.bad for pack in packs if pack.bad] == [{"unreadable": 1}]
