"""The loader end to end: packs do not depend on ranks and workers, and failures are errors instead of hangs."""

import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tests.support.decoding import decoders, gone, servers
from tests.support.loading import STAGE, loader, same, schedule, take
from tests.support.paths import ROOT
from tests.support.progress import output_of, run_watched
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import AugmentConfig
from univitar_ds.data.loader import LaneSet, PackLoader
from univitar_ds.data.sampler.cursor import parse
from univitar_ds.data.sampler.lanes import Lane
from univitar_ds.data.shards.sources import stage_modalities
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.geometry import item_bytes
from univitar_ds.tokenization import caption_id, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo_shards(tmp_path_factory.mktemp("demo"), images=60, videos=12, shards=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    train_tokenizer(["a red image number one", "a bar moves left"], 300).save(str(path))
    return path


def drain(packs, steps=200):
    for _ in range(steps):
        next(packs)


def broken_image(tmp_path):
    """A shard in which every third image has a valid header and truncated data."""
    samples = []
    for index in range(30):
        content = image(80, 60, index)
        content = content[:-200] if index % 3 == 0 else content
        samples.append((f"k{index:02d}", {"jpg": content, "txt": f"caption {index}".encode()}))
    return write_tar(tmp_path / "broken" / "a.tar", samples).parent


def test_a_step_has_one_pack_of_every_lane_with_the_documented_shapes(folder, tokenizer):
    for step, packs in enumerate(take(8, folder, tokenizer=tokenizer)):
        assert [(pack.lane, pack.index, pack.modality) for pack in packs] == [(n, step, schedule(step)) for n in (0, 1)]
        for pack in packs:
            n = len(pack)
            frames = 4 if pack.modality == "video" else 1
            assert n > 0
            assert pack.frames.tolist() == [frames] * n
            assert pack.grid_thw.shape == (n, 3)
            assert set(pack.grid_thw[:, 0].tolist()) == {frames // 2 or 1}
            assert pack.pixels.shape == (sum(item_bytes(grid, frames) for grid in pack.grid_thw.tolist()),)
            assert pack.tokens == pack.grid_thw.prod(dim=1).sum() <= STAGE.token_budget
            assert pack.token_ids.shape[0] == n == len(pack.captions) == len(pack.labels)
            assert pack.text_lengths.max() == pack.token_ids.shape[1] <= 16
            assert pack.caption_ids.tolist() == [caption_id(caption) for caption in pack.captions]
            assert parse(json.loads(json.dumps(pack.cursor.to_json()))) == pack.cursor
            dtypes = {pack.frames.dtype, pack.grid_thw.dtype, pack.token_ids.dtype, pack.caption_ids.dtype}
            assert (pack.pixels.dtype, dtypes) == (torch.uint8, {torch.int64})


def test_the_pixels_of_an_item_belong_to_its_key(tmp_path):
    colours = {f"k{n}": (n * 20, 255 - n * 20, n * 7) for n in range(10)}
    samples = []
    for n, (key, colour) in enumerate(colours.items()):
        from PIL import Image

        path = tmp_path / "one.png"
        Image.new("RGB", (14 * (1 + n % 3), 28), colour).save(path)
        samples.append((key, {"png": path.read_bytes(), "txt": key.encode()}))
    folder = write_tar(tmp_path / "tars" / "a.tar", samples).parent
    for packs in take(3, folder, modality_of=lambda _: "image"):
        for pack in packs:
            start = 0
            for key, grid in zip(pack.keys, pack.grid_thw.tolist(), strict=True):
                end = start + item_bytes(grid, 1)
                pixels = pack.pixels[start:end].reshape(-1, 3)
                assert (pixels == torch.tensor(colours[key.split("/")[1]], dtype=torch.uint8)).all()
                start = end
            assert start == len(pack.pixels)


def test_packs_are_bitwise_equal_with_and_without_workers(folder, tokenizer):
    inline = take(12, folder, tokenizer=tokenizer)
    decoded = take(12, folder, tokenizer=tokenizer, workers=2)
    assert all(same(a, b) for x, y in zip(inline, decoded, strict=True) for a, b in zip(x, y, strict=True))


def test_packs_do_not_depend_on_the_assignment_of_lanes_or_on_a_resume(folder):
    whole = take(10, folder)
    cursors = {pack.lane: pack.cursor for pack in whole[5]}
    resumed = {
        lane: take(4, folder, lanes_of_rank=[lane], cursors={lane: cursors[lane]}, first_step=6) for lane in (0, 1)
    }
    for step in range(4):
        for lane in (0, 1):
            assert same(resumed[lane][step][0], whole[6 + step][lane])


def test_a_resume_repeats_packs_that_were_prefetched_but_not_used(folder):
    whole = take(6, folder)
    first = take(2, folder, workers=1, limits={"prefetch_packs": 8})
    rest = take(4, folder, cursors={pack.lane: pack.cursor for pack in first[-1]}, first_step=2)
    assert [[p.keys for p in step] for step in first + rest] == [[p.keys for p in step] for step in whole]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_counted_and_missing_from_its_pack(tmp_path, workers, caplog):
    folder = broken_image(tmp_path)
    packs = [pack for step in take(4, folder, workers=workers, modality_of=lambda _: "image") for pack in step]
    assert sum(pack.bad.get("corrupt", 0) for pack in packs) >= 4
    good = {f"a/k{n:02d}" for n in range(30) if n % 3}
    for pack in packs:
        assert set(pack.keys) <= good
        assert pack.pixels.shape == (sum(item_bytes(grid, 1) for grid in pack.grid_thw.tolist()),)
    assert "sample left out (corrupt, number 1; lane 0, image, decoding): a/k" in caplog.text


def test_all_lanes_of_a_rank_begin_before_the_first_lane_is_read(folder, monkeypatch):
    """So the first shards of all lanes are fetched concurrently."""
    order = []
    begin, next_plan = Lane.begin, Lane.next_plan
    monkeypatch.setattr(Lane, "begin", lambda lane, modality: order.append("begin") or begin(lane, modality))
    monkeypatch.setattr(Lane, "next_plan", lambda lane, *asked: order.append("plan") or next_plan(lane, *asked))
    take(1, folder)
    assert order[:3] == ["begin", "begin", "plan"]


@pytest.mark.parametrize("shards", [1, 64])
def test_the_limit_of_open_files_is_raised_for_many_lanes_and_sources(tmp_path, shards):
    """Each of 8 lanes keeps a shard of each of 10 sources open, whether shards are divided among lanes or not."""
    samples = [(f"k{n:02d}", {"jpg": image(80, 60), "txt": b"t"}) for n in range(16)]
    sources = []
    for name in map(str, range(10)):
        for number in range(shards):
            write_tar(tmp_path / name / f"{number}.tar", samples)
        sources.append(SourceConfig(path=str(tmp_path / name)))
    data = DataConfig(sources=sources, workers=0, pool_samples=24)
    stage = STAGE.model_copy(update={"video_ratio": 0.0, "weights": {str(name): 1.0 for name in range(10)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        loader = PackLoader(
            data,
            stage,
            LaneSet(range(8), 8, 0),
            modality_of=lambda _: "image",
            tokenizer=None,
            context_length=16,
        )
        with loader:
            assert len(next(loader)) == 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pack_without_a_decodable_item_is_empty_and_well_formed(tmp_path, tokenizer):
    cut = image(80, 60)[:-200]
    folder = write_tar(tmp_path / "t" / "a.tar", [(f"k{n}", {"jpg": cut, "txt": b"t"}) for n in range(4)]).parent
    ((pack,),) = take(1, folder, lanes_of_rank=[0], lanes=1, tokenizer=tokenizer)
    assert (len(pack), pack.tokens, pack.bad) == (0, 0, {"corrupt": 4})
    assert pack.grid_thw.shape == (0, 3)
    assert pack.pixels.shape == pack.frames.shape == pack.text_lengths.shape == pack.caption_ids.shape == (0,)
    assert pack.token_ids.shape[0] == 0
    assert pack.cursor.packs == 1


def test_too_many_decoding_failures_in_a_row_end_the_run(tmp_path):
    cut = image(80, 60)[:-200]
    folder = write_tar(tmp_path / "t" / "a.tar", [(f"k{n}", {"jpg": cut, "txt": b"t"}) for n in range(4)]).parent
    with pytest.raises(
        DataError, match=r"lane 0, image, decoding: 7 samples in a row cannot be used \(data.max_bad_in_a_row is 6\)"
    ):
        take(4, folder, lanes_of_rank=[0], lanes=1, limits={"max_bad_in_a_row": 6})


def test_decoding_failures_with_good_samples_in_between_are_not_in_a_row(tmp_path):
    limits = {"max_bad_in_a_row": 8, "max_bad_per_thousand": 1000}
    steps = take(12, broken_image(tmp_path), modality_of=lambda _: "image", limits=limits)
    assert min(sum(step[lane].bad.get("corrupt", 0) for step in steps) for lane in (0, 1)) > 8


def test_a_resumed_run_continues_the_count_of_decoding_failures(tmp_path):
    folder, given = broken_image(tmp_path), {"modality_of": lambda _: "image", "lanes_of_rank": [0], "lanes": 1}
    limits = {"max_bad_per_thousand": 18}
    whole, message = until_the_end(folder, limits=limits, **given)
    assert "19 of the last" in message
    resumed, again = until_the_end(folder, limits=limits, cursors={0: whole[1][0].cursor}, first_step=2, **given)
    assert again == message
    assert [step[0].keys for step in resumed] == [step[0].keys for step in whole[2:]]


def until_the_end(folder, **given):
    """All steps until a DataError, and its message."""
    steps = []
    with loader(folder, **given) as packs, pytest.raises(DataError) as caught:
        steps.extend(packs)
    return steps, str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_tar_is_counted_or_raised_in_the_trainer(tmp_path, workers):
    samples = [(f"k{n}", {"png": image(28, 28, n, "PNG"), "txt": b"t"}) for n in range(20)]
    path = write_tar(tmp_path / "t" / "a.tar", samples)
    size = path.read_bytes().index(b"k17.png") + 700
    with open(path, "r+b") as file:
        file.truncate(size)
    packs = take(1, path.parent, workers=workers)[0]
    assert sum(pack.bad.get("cut", 0) for pack in packs) >= 1
    assert {key for pack in packs for key in pack.keys} == {f"a/k{n}" for n in range(17)}
    with pytest.raises(DataError, match=rf"data.on_bad is fail.*shard a: cut off at byte {size}, inside .*restore the"):
        take(1, path.parent, workers=workers, limits={"on_bad": "fail"})


def test_a_shard_that_is_deleted_during_decoding_is_a_data_error(tmp_path):
    samples = [(f"k{n}", {"png": image(28, 28, n, "PNG"), "txt": b"t"}) for n in range(8)]
    path = write_tar(tmp_path / "t" / "a.tar", samples)
    with loader(path.parent, workers=1, modality_of=lambda _: "image", limits={"prefetch_packs": 1}) as packs:
        next(packs)
        path.unlink()
        with pytest.raises(DataError, match=r"a\.tar: cannot be read"):
            drain(packs)


def test_killed_decoding_processes_are_restarted_and_packs_stay_the_same(folder):
    whole = take(12, folder)
    with loader(folder, workers=2) as packs:
        steps = []
        for number in range(12):
            for pid in {1: decoders, 4: servers, 7: decoders}.get(number, list)():
                os.kill(pid, signal.SIGKILL)
            steps.append(next(packs))
    assert all(same(a, b) for x, y in zip(whole, steps, strict=True) for a, b in zip(x, y, strict=True))
    assert not servers()


def test_a_killed_decoding_process_without_restarts_left_is_an_error_and_no_hang(folder):
    with loader(folder, workers=2, limits={"worker_restarts": 0}) as packs:
        next(packs)
        pids = decoders()
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"was ended by SIGKILL.*data.worker_restarts is 0\).*memory"):
            drain(packs)
    assert not servers()


def test_close_ends_the_processes_and_delivered_packs_stay_valid(folder):
    with loader(folder, workers=2) as packs:
        step = next(packs)
        pids = [*servers(), *decoders()]
        assert len(pids) >= 2
    assert all(gone(int(pid)) for pid in pids)
    del packs
    gc.collect()
    assert int(step[0].pixels.sum()) == int(take(1, folder)[0][0].pixels.sum())


SCRIPT = textwrap.dedent("""
    import sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from tests.support.decoding import decoders, servers
    from tests.support.loading import loader
    packs = loader(Path({folder!r}), workers=1)
    next(packs)
    print(*servers(), *decoders(), flush=True)
    {end}
""")


@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_survives_a_trainer_that_ends_without_close(folder, end):
    script = SCRIPT.format(root=str(ROOT), folder=str(folder), end=end)
    result = run_watched([sys.executable, "-c", script])
    pids = result.stdout.split()
    assert len(pids) == 2
    assert all(gone(int(pid)) for pid in pids)
    assert "leaked" not in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_interrupts_a_trainer_that_waits_for_data(folder):
    end = "import os, signal\nos.kill(decoders()[0], signal.SIGSTOP)\nwhile True: next(packs)"  # what never comes
    script = SCRIPT.format(root=str(ROOT), folder=str(folder), end=end)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores SIGINT
    )
    pids = process.stdout.readline().split()
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = output_of(process, "the interrupted trainer")
    assert stderr.strip().endswith("KeyboardInterrupt")
    assert stderr.count("Traceback") == 1
    assert len(pids) == 2
    assert all(gone(int(pid)) for pid in pids)


def test_decoding_processes_import_neither_the_engine_nor_the_text_libraries():
    code = (
        "import sys, univitar_ds.data.decoding.worker, univitar_ds.data.decoding.decode_job;"
        "print([m for m in ('deepspeed', 'transformers', 'tokenizers', 'triton') if m in sys.modules])"
    )
    result = run_watched([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_cursors_of_other_data_and_missing_cursors_are_refused(folder, tmp_path):
    cursors = {pack.lane: pack.cursor for pack in take(1, folder)[0]}
    other = write_demo_shards(tmp_path, images=30, videos=8, shards=2)
    with pytest.raises(DataError, match="the sources have changed since the data cursor was saved"):
        loader(other, cursors=cursors)
    with pytest.raises(DataError, match="no saved data cursor for lane 1 of 2"):
        loader(folder, cursors={0: cursors[0]})


def faulty_shard(folder, first):
    """A shard with all that a lane warns of while it reads, also of its source."""
    samples = []
    for index in range(first, first + 24):
        content = image(80 if index % 4 < 2 else 50, 60, index)
        members = {"jpg": content, "txt": f"caption {index}\nand another line".encode()}
        if index % 8 == 1:
            members["jpg"] = content[:-200]
        elif index % 8 == 2:
            members["json"] = b'{"label": [1]}'
        elif index % 8 == 3:
            del members["txt"]
        samples.append((f"k{index:02d}", members))
    return write_tar(folder / "a.tar", samples).parent


def test_of_several_ranks_with_the_same_lanes_one_warns_and_all_read_the_same_packs(tmp_path, caplog):
    images, limits = STAGE.model_copy(update={"video_ratio": 0.0}), {"max_bad_per_thousand": 1000}
    before, after = faulty_shard(tmp_path / "before", 0), faulty_shard(tmp_path / "after", 100)
    given = {"stage": images, "modality_of": lambda step: "image"}
    cursors = {pack.lane: pack.cursor for pack in take(3, before, limits=limits, warns=False, **given)[-1]}
    resumed = given | {"cursors": cursors, "first_step": 3}
    starts = [
        (before, limits, given),
        (before, limits | {"max_image_px": 4000}, resumed),
        (after, limits | {"accept_changed_sources": True}, resumed),
    ]

    def read(warns):
        return [take(3, folder, limits=limits, warns=warns, **settings) for folder, limits, settings in starts]

    with caplog.at_level(logging.INFO):
        silent = read(False)  # first, since some warnings are logged once per process
        assert caplog.text == ""
        warned = read(True)
    for said in (
        "sample left out (no_caption, number 1; lane ",
        "sample left out (corrupt, number 1; lane ",
        "bad_label ignored (number 1; lane ",
        "its .txt members have several lines",
        "reported only once), because",
        "this stage leaves out samples (too_large)",
        "the sources have changed since the data cursors were saved",
    ):
        assert said in caplog.text, said
    for one, other in zip(silent, warned, strict=True):
        for steps in zip(one, other, strict=True):
            assert all(same(*packs) for packs in zip(*steps, strict=True))


def test_a_missing_tokenizer_or_modality_is_an_error_before_processes_start(folder, tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer at"):
        loader(folder, tokenizer=tmp_path / "none.json", workers=1)
    images = write_demo_shards(tmp_path / "images", images=8, videos=0, shards=1)
    with pytest.raises(DataError, match="needs video samples"):
        loader(images, workers=1)
    assert not servers()
    assert stage_modalities(STAGE) == {"image", "video"}


AUGMENTED = STAGE.model_copy(
    update={"augment": AugmentConfig(crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2), flip=0.5, brightness=0.5, grey=0.3)}
)


def tokens_of(pack):
    return pack.grid_thw.prod(dim=1).tolist()


def test_an_augmented_item_has_the_size_that_its_crop_has_by_the_rule(folder):
    """So packs are filled with what is decoded, and hold their budget."""
    plain, changed = take(8, folder), take(8, folder, stage=AUGMENTED)
    kinds = set()
    for pack in (pack for step in changed for pack in step):
        assert pack.tokens <= STAGE.token_budget
        assert sum(map(torch.Tensor.numel, pack.images())) == len(pack.pixels)
        kinds.add(pack.modality)
    assert kinds == {"image", "video"}
    before, after = (
        {
            key: int(tokens)
            for step in steps
            for pack in step
            for key, tokens in zip(pack.keys, tokens_of(pack), strict=True)
        }
        for steps in (plain, changed)
    )
    both = before.keys() & after.keys()
    assert len(both) > 20
    assert sum(after[key] for key in both) < 0.75 * sum(before[key] for key in both)


def test_each_epoch_draws_another_augmentation(folder):
    seen = {}
    for step in take(
        40, folder, stage=AUGMENTED.model_copy(update={"video_ratio": 0.0}), modality_of=lambda _: "image"
    ):
        for pack in step:
            for key, pixels in zip(pack.keys, pack.images(), strict=True):
                seen.setdefault(key, []).append(pixels.clone())
    repeated = [versions for versions in seen.values() if len(versions) > 1]
    assert len(repeated) > 20
    assert all(one[0].shape != one[1].shape or not torch.equal(one[0], one[1]) for one in repeated)
