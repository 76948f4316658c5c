"""All tokens of items in memory-mapped files: their values, limits of space, and calls that were killed."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from tests.support.cached_tokens import GivenTokens, cached, given
from univitar_ds.errors import CheckpointError, StorageError
from univitar_ds.inference import embed_files
from univitar_ds.tasks.cached import feature_cache, token_cache
from univitar_ds.tasks.cached.token_cache import Standard, tokens

CPU = torch.device("cpu")


def items(count: int = 48, width: int = 8) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=draws).tolist()
    spread = torch.logspace(-1, 3, width)
    return [spread * torch.randn(length, width, generator=draws) + 100 for length in lengths]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(feature_cache, "PART_ROWS", 10)


def test_items_are_read_in_any_order_and_standardised(tmp_path):
    made = items()
    with cached(tmp_path, made) as (found,):
        assert found.lengths == [len(one) for one in made]
        every = torch.cat(made).double()
        standard = Standard(found, range(48), CPU)
        values = standard.read(found, range(48)).double()
        # Stored values reach some deviations of the first items, and float16 rounds them by 2**-11 of that.
        assert (values - (every - every.mean(0)) / every.std(0, correction=0)).abs().max() < 10 * 2**-10
        assert values.mean(0).abs().max() < 1e-5  # float32 sums of 200 values near 1
        assert (values.std(0, correction=0) - 1).abs().max() < 1e-5
        parts = values.float().split(found.lengths)
        assert torch.equal(standard.read(found, [40, 3]), torch.cat([parts[40], parts[3]]))
        packs = list(found.packs(range(48), 20))
        assert all(sum(found.lengths[item] for item in pack) <= 20 for pack in packs)
        assert [item for pack in packs for item in pack] == list(range(48))


class Killed(BaseException):
    pass


def test_a_killed_call_continues_with_the_first_unfinished_part(tmp_path, monkeypatch):
    made, computed = items(), []
    with cached(tmp_path / "whole", made) as (found,):
        wanted = found.read(range(48), CPU)
    finish = embed_files.Destination.finish

    def killed(self, number, part, about):
        if number == 3:
            raise Killed
        finish(self, number, part, about)

    monkeypatch.setattr(embed_files.Destination, "finish", killed)
    with pytest.raises(Killed), cached(tmp_path / "killed", made):
        pass
    monkeypatch.setattr(embed_files.Destination, "finish", finish)
    with tokens([given(made, computed)], tmp_path / "killed", 1) as (found,):
        assert torch.equal(found.read(range(48), CPU), wanted)
    assert computed == [str(index) for index in range(30, 48)]
    with tokens([given(made, computed)], tmp_path / "killed", 1):
        assert len(computed) == 18  # nothing more


def test_damaged_parts_are_computed_again(tmp_path, caplog):
    made, computed = items(), []
    with cached(tmp_path, made) as (found,):
        wanted = found.read(range(48), CPU)
    part = next(tmp_path.glob("*/features-00001.safetensors"))
    data = bytearray(part.read_bytes())
    data[-40] ^= 1
    part.write_bytes(data)
    with tokens([given(made, computed)], tmp_path, 1) as (found,):
        assert torch.equal(found.read(range(48), CPU), wanted)
    assert len(computed) == 48
    assert "are damaged and computed again" in caplog.text


def test_checksums_of_a_large_entry_are_read_with_a_progress_bar(tmp_path, monkeypatch):
    made, shown = items(), []

    @contextmanager
    def bar(*, total, desc, disable, **settings):
        read = []
        yield SimpleNamespace(update=read.append)
        shown.append((desc, disable, total == sum(read) > 0))

    with cached(tmp_path, made):
        monkeypatch.setattr(feature_cache, "progress_bar", bar)
    monkeypatch.setattr(feature_cache, "SHOWN_BYTES", 1)
    for progress in (True, False):
        with tokens([replace(given(made), progress=progress)], tmp_path, 1):
            pass
    assert shown == [("checking features of some", False, True), ("checking None", True, True)]


def test_a_part_that_is_cut_is_found_before_the_others_are_read(tmp_path, monkeypatch, caplog):
    made, read = items(), []
    with cached(tmp_path, made):
        pass
    part = next(tmp_path.glob("*/features-00002.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    sum_of = feature_cache._sum_of
    monkeypatch.setattr(feature_cache, "_sum_of", lambda *given: read.append(given) or sum_of(*given))
    assert not feature_cache.is_complete(part.parent)
    assert read == []
    assert "are damaged and computed again" in caplog.text


def test_a_damaged_part_of_a_killed_call_is_computed_again(tmp_path, caplog):
    made = items()
    with cached(tmp_path, made) as (found,):
        wanted = found.read(range(48), CPU)
    next(tmp_path.glob("*/complete.json")).unlink()
    next(tmp_path.glob("*/features-00001.safetensors")).write_bytes(b"short")
    with cached(tmp_path, made) as (found,):
        assert torch.equal(found.read(range(48), CPU), wanted)
    assert "are damaged and computed again" in caplog.text


@dataclass(frozen=True)
class Failing(GivenTokens):
    """Fails at item 35, as a bug would."""

    def read(self, rank, units, finished):
        for unit in units:
            if "35" in unit.files:
                raise ValueError("a bug")
            yield from super().read(rank, iter([unit]), finished)


def test_an_error_of_the_model_keeps_the_finished_parts(tmp_path):
    made, computed = items(), []
    with pytest.raises(ValueError, match="a bug"), tokens([given(made, setup=Failing(made, []))], tmp_path, 1):
        pass
    with tokens([given(made, computed)], tmp_path, 1):
        assert computed == [str(index) for index in range(20, 48)]  # a part is finished when the next one begins


def test_tokens_of_one_split_stay_while_those_of_the_other_are_computed(tmp_path, monkeypatch):
    learned, scored, computed = items(), items(20), []
    monkeypatch.setattr(feature_cache, "KEPT_BYTES", 1)

    @dataclass(frozen=True)
    class MakingRoom(GivenTokens):
        def read(self, rank, units, finished):
            feature_cache.make_room(tmp_path, None)  # as another call does when it ends
            return super().read(rank, units, finished)

    wanted = [given(learned, computed), given(scored, setup=MakingRoom(scored, []))]
    with tokens(wanted, tmp_path, 1) as found:
        assert [len(one) for one in found] == [48, 20]
    assert len(computed) == 48


def test_the_expected_size_is_limited_after_the_first_part_and_a_larger_limit_continues(tmp_path):
    made, computed = [torch.ones(100, 50) * index for index in range(40)], []  # 10 kB each
    with pytest.raises(StorageError, match=r"tokens of 40 items take about 0.0004 GB .* --max-gb 0.0002; raise it"):
        cached(tmp_path, made, most_gb=2e-4).__enter__()
    with tokens([given(made, computed)], tmp_path, 1) as (found,):
        assert len(found) == 40
    assert computed == [str(index) for index in range(10, 40)]


def test_a_split_above_the_limit_is_an_error_also_within_a_part(tmp_path):
    with pytest.raises(StorageError, match=r"the tokens of 0 of 4 items take 4e-05 GB in .*, above --max-gb 1e-05"):
        cached(tmp_path, [torch.ones(100, 50)] * 4, most_gb=1e-5).__enter__()


def test_a_disk_that_is_nearly_full_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_SPARE_BYTES", 1 << 62)
    with pytest.raises(StorageError, match="--cache, or use fewer items"):
        cached(tmp_path, items()).__enter__()


def test_tokens_that_are_not_finite_are_an_error(tmp_path):
    made = items(3)
    made[1][0, 2] = torch.nan
    with pytest.raises(CheckpointError, match="of some by made up are not finite in 1 of"):
        cached(tmp_path, made).__enter__()


def test_more_than_the_kept_size_is_removed_after_use_and_unfinished_tokens_after_a_week(tmp_path, monkeypatch):
    made = items()
    with pytest.raises(StorageError):
        cached(tmp_path, made, most_gb=1e-9).__enter__()
    (unfinished,) = tmp_path.glob("*/")
    monkeypatch.setattr(feature_cache, "KEPT_BYTES", 1)
    with cached(tmp_path, made[:3]):
        assert len(list(tmp_path.glob("*/complete.json"))) == 1
    assert list(tmp_path.glob("*/")) == [unfinished]
    monkeypatch.setattr(feature_cache, "ABANDONED_S", -1)
    with cached(tmp_path, made[:3]):
        pass
    assert list(tmp_path.glob("*/")) == []
