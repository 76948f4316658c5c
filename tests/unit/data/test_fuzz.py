"""Thousands of damaged shards: scans neither raise nor loop nor exceed the shard, and find every intact sample."""

import io
import random
import re
import tarfile
from dataclasses import dataclass, field

import pytest

from tests.support.shards import image
from univitar_ds.data.sampler.bad_samples import KINDS
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.samples import SizeRule, read_samples
from univitar_ds.data.shards.tar_index import BLOCK, TAIL_LIMIT, Damage, Group, groups, scan
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.errors import SampleError
from univitar_ds.geometry import Resolution

SHARDS_EACH = 300
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@dataclass
class Mutant:
    """A damaged shard; `untouched` maps the key of each sample with all its bytes to its new offset."""

    data: bytes
    untouched: dict[str, int] = field(default_factory=dict)


class Counting(io.BytesIO):
    """A stream that counts the bytes read from it."""

    read_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        self.read_bytes += len(data)
        return data


def content(rng: random.Random) -> bytes:
    """Random bytes, zeros, or bytes that contain the magic of a tar header."""
    body = bytearray(rng.randbytes(rng.choice((0, 30, 512, 900, 2000, 4096))))
    if rng.random() < 0.2:
        body = bytearray(len(body))
    if rng.random() < 0.2 and len(body) > 600:
        body[257:262] = b"ustar"
    return bytes(body)


def shard_of(rng: random.Random, form: int) -> tuple[bytes, list[Group]]:
    buffer = io.BytesIO()
    folder = "folder/" if form == tarfile.USTAR_FORMAT else "folder/" * rng.choice((1, 30))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(rng.randrange(1, 14)):
            extensions = rng.choice((["jpg", "json"], ["json", "jpg"], ["jpg", "txt", "cls"], ["png"]))
            for extension in extensions:
                body = content(rng)
                info = tarfile.TarInfo(f"{folder}{number:05d}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    data = buffer.getvalue()
    return data, list(groups(io.BytesIO(data), "s", len(data)))


def flipped(rng: random.Random, data: bytes, samples: list[Group]) -> Mutant:
    body = bytearray(data)
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 3, 20)))]
    for place in places:
        body[place] ^= 1 << rng.randrange(8)
    return Mutant(bytes(body), {g.key: g.offset for g in samples if not any(g.offset <= p < g.end for p in places)})


def cut(rng: random.Random, data: bytes, samples: list[Group]) -> Mutant:
    end = rng.randrange(len(data))
    return Mutant(data[:end], {g.key: g.offset for g in samples if g.end <= end})


def zeroed(rng: random.Random, data: bytes, samples: list[Group]) -> Mutant:
    low = rng.randrange(len(data))
    high = min(len(data), low + rng.choice((1, 100, 512, 4096, 70000)))
    if rng.random() < 0.5:
        low = low // BLOCK * BLOCK
    whole = {g.key: g.offset for g in samples if g.end <= low or g.offset >= high}
    return Mutant(data[:low] + bytes(high - low) + data[high:], whole)


def removed(rng: random.Random, data: bytes, samples: list[Group], step: int = BLOCK) -> Mutant:
    """Removes some blocks; later samples move towards the beginning by the removed length."""
    low = rng.randrange(len(data) // step) * step
    high = min(len(data), low + step * rng.choice((1, 1, 2, 3, 10, 40)))
    kept = {g.key: g.offset - (high - low) * (g.offset >= high) for g in samples if g.end <= low or g.offset >= high}
    aligned = {key: offset for key, offset in kept.items() if offset % BLOCK == 0}
    return Mutant(data[:low] + data[high:], aligned)


def removed_bytes(rng: random.Random, data: bytes, samples: list[Group]) -> Mutant:
    return removed(rng, data, samples, step=rng.choice((1, 7)))


def duplicated(rng: random.Random, data: bytes, samples: list[Group]) -> Mutant:
    """Inserts a copy of some blocks anywhere. Samples in the copied blocks and around the insertion are touched."""
    low = rng.randrange(len(data) // BLOCK) * BLOCK
    high = min(len(data), low + BLOCK * rng.choice((1, 1, 2, 5, 20)))
    at = rng.randrange(len(data) // BLOCK) * BLOCK
    whole = {
        g.key: g.offset + (high - low) * (g.offset >= at)
        for g in samples
        if not g.offset < at < g.end and (g.end <= low or g.offset >= high)
    }
    return Mutant(data[:at] + data[low:high] + data[at:], whole)


def swapped(rng: random.Random, data: bytes, samples: list[Group]) -> Mutant:
    """Swaps two members with their headers."""
    spans = []
    for sample in samples:
        start = sample.offset
        for member in sample.members:
            end = member.offset + -(-member.length // BLOCK) * BLOCK
            spans.append((start, end, sample.key))
            start = end
    (a, b, one), (c, d, other) = sorted(rng.choices(spans, k=2)) if len(spans) > 1 else [spans[0]] * 2
    if a == c:
        return Mutant(data, {g.key: g.offset for g in samples})
    body = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    shift = (d - c) - (b - a)
    whole = {g.key: g.offset + shift * (b <= g.offset < c) for g in samples if g.key not in (one, other)}
    return Mutant(body, whole)


def several(rng: random.Random, data: bytes, samples: list[Group]) -> Mutant:
    """Several damages in sequence; only order and bounds can be checked."""
    for _ in range(4):
        change = rng.choice((flipped, zeroed, removed, removed_bytes, duplicated, swapped))
        data = change(rng, data, samples).data
        whole = [one for one in scan(io.BytesIO(data), "s", len(data)) if isinstance(one, Group)]
        samples = whole or samples
        if len(data) < 4 * BLOCK or samples[-1].end > len(data):
            break
    return Mutant(data)


MUTATIONS = (flipped, cut, zeroed, removed, removed_bytes, duplicated, swapped, several)


def scanned(data: bytes, start: int = 0) -> list[Group | Damage]:
    stream = Counting(data)
    found = list(scan(stream, "s", len(data), start))
    damages = sum(isinstance(one, Damage) for one in found)
    assert stream.read_bytes <= 2 * len(data) + (damages + 1) * (TAIL_LIMIT + 8192), "the shard is read several times"
    return found


def check_order(found: list[Group | Damage], size: int) -> None:
    position = 0
    for one in found:
        assert position <= one.offset <= one.end <= size, (one, size)
        position = one.end
        if isinstance(one, Damage):
            assert one.kind in KINDS
            assert re.match(r"shard s: .* at byte \d+", one.message)
            continue
        within = one.offset
        assert one.members
        for member in one.members:
            assert within < member.offset <= member.offset + member.length <= one.end, (one, member)
            within = member.offset + member.length


def claimed(found: list[Group | Damage], low: int, high: int) -> bool:
    """Whether a member overlaps these bytes: one that lost blocks and, by chance, ends at another header."""
    members = [member for one in found if isinstance(one, Group) for member in one.members]
    return any(member.offset < high and low < member.offset + member.length for member in members)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda one: one.__name__)
def test_scanning_a_damaged_shard_yields_its_intact_samples_and_the_damage(mutate):
    rng = random.Random(f"{mutate.__name__} 7")
    promised = excused = noticed = 0
    for number in range(SHARDS_EACH):
        data, samples = shard_of(rng, FORMATS[number % 3])
        mutant = mutate(rng, data, samples)
        found = scanned(mutant.data)
        check_order(found, len(mutant.data))
        assert scanned(mutant.data) == found
        for index in rng.sample(range(len(found)), min(2, len(found))):
            if isinstance(found[index], Group) or found[index].end < len(mutant.data):
                assert scanned(mutant.data, found[index].end) == found[index + 1 :]
        noticed += any(isinstance(one, Damage) for one in found)
        got = {one.offset: mutant.data[one.offset : one.end] for one in found if isinstance(one, Group)}
        for sample in samples:
            if sample.key not in mutant.untouched:
                continue
            offset = mutant.untouched[sample.key]
            promised += 1
            if got.get(offset) == data[sample.offset : sample.end]:
                continue
            assert claimed(found, offset, offset + sample.length), (number, sample.key, found)
            excused += 1
    assert excused <= promised / 100
    assert noticed >= SHARDS_EACH // 20 or mutate is swapped


def test_reading_a_damaged_shard_yields_samples_or_counted_errors(tmp_path):
    rng = random.Random(11)
    rule = SizeRule("image", Resolution(16, 400, 28, None), 1, 400, 10**7)
    images = [image(40 + 9 * n, 60, n, form) for n, form in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP"))]
    outcomes = set()
    for number in range(200):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for index, body in enumerate(images):
                for extension, part in (("jpg", body), ("json", b'{"caption": "a", "crc32": 1}')):
                    info = tarfile.TarInfo(f"{index}.{extension}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
        data = buffer.getvalue()
        mutant = rng.choice(MUTATIONS)(rng, data, list(groups(io.BytesIO(data), "s", len(data)))).data
        path = tmp_path / f"{number}.tar"
        path.write_bytes(mutant)
        shard = Shard("s", str(path), LocalStorage(), len(mutant))
        for one in scanned(mutant):
            if isinstance(one, Group):
                (found,) = read_samples([(shard, one)], rule)
                outcomes.add(found.kind if isinstance(found, SampleError) else type(found).__name__)
    assert {"Sample", "no_media", "bad_json"} <= outcomes <= {"Sample", *KINDS}
