import random
import struct
import subprocess
import sys
import time
import zlib

import pytest

from tests.support import media
from univitar_ds.data.media import mp4_tables
from univitar_ds.data.media.mp4_tables import check_mp4_tables
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.errors import SampleError

MANY = 60_000_000


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def words(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def track(*tables: bytes, handler: bytes = b"vide") -> bytes:
    holders = box(b"minf", box(b"stbl", b"".join(tables)))
    return box(b"trak", box(b"mdia", box(b"hdlr", words(0, 0) + handler + bytes(13)) + holders))


def movie(*boxes: bytes, bulk: int = 0) -> bytes:
    return box(b"ftyp", b"isom" + words(0)) + box(b"moov", b"".join(boxes)) + box(b"mdat", bytes(bulk))


def altered(data: bytes, table: bytes, at: int, *numbers: int) -> bytes:
    """With other numbers from an offset on in the contents of the only box of that name."""
    assert data.count(table) == 1
    begin = data.index(table) + 4 + at
    return data[:begin] + words(*numbers) + data[begin + 4 * len(numbers) :]


def bomb(samples: int = MANY) -> bytes:
    """A whole video of some hundred bytes whose tables claim many samples of one byte."""
    data = altered(media.video(media.grey_frames(8)), b"stsz", 4, 1, samples)
    return altered(altered(data, b"stts", 8, samples), b"stsc", 12, samples)


def refused(data: bytes) -> str:
    with pytest.raises(SampleError) as caught:
        check_mp4_tables(data)
    assert caught.value.kind == "corrupt"
    return str(caught.value)


def test_a_small_file_that_claims_millions_of_samples_is_refused_without_their_memory(tmp_path):
    path = tmp_path / "bomb.mp4"
    path.write_bytes(bomb())
    code = """
import resource, sys
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.data.media.probe import probe
from univitar_ds.errors import SampleError
data, before = open(sys.argv[1], "rb").read(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (lambda: probe(data, "mp4"), lambda: decode_video(data, frames=2, max_px=10**6, timeout_s=9.0)):
    try:
        read()
    except SampleError as error:
        print(error.kind, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    lines = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    probed, decoded, grown = lines.splitlines()
    length = path.stat().st_size
    assert probed == decoded
    assert probed.startswith("corrupt the mov container cannot be opened: stts claims 60000000 samples, ")
    assert probed.endswith(f"the {length} bytes of the file can hold {length}; replace the file or write it anew")
    assert int(grown) < 50, "MiB"


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "mpeg4"), ("mov", "mjpeg"), ("mp4", "libx264"), ("mp4", "libx265")]
)
@pytest.mark.parametrize("options", [{}, {"movflags": "frag_keyframe+empty_moov"}])
def test_a_sound_video_passes(form, codec, options):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = media.video(media.moving_frames(30), form, codec, pix_fmt, rate=25, options=options)
    began = time.process_time()
    check_mp4_tables(data)
    assert time.process_time() - began < 0.05
    assert decode_video(data, frames=2, max_px=10**6, timeout_s=60.0).shape == (2, 48, 64, 3)
    check_mp4_tables(media.sound())


TABLES = [
    (b"stts", words(0, MANY, 1, 1), "stts claims 60000000 entries, the box can hold 1"),
    (b"stts", words(0, 1, MANY, 512), "stts claims 60000000 samples, the "),
    (b"ctts", words(0, MANY, 1, 1), "ctts claims 60000000 entries"),
    (b"stsc", words(0, MANY, 1, 1, 1), "stsc claims 60000000 entries"),
    (b"stco", words(0, 3, 1, 1), "stco claims 3 entries, the box can hold 2"),
    (b"co64", words(0, 2, 1, 1), "co64 claims 2 entries, the box can hold 1"),
    (b"stss", words(0, MANY), "stss claims 60000000 entries, the box can hold 0"),
    (b"stsz", words(0, 0, 3, 1, 1), "stsz claims 3 samples, the box can hold 2"),
    (b"stsz", words(0, 1, MANY), "stsz claims 60000000 samples of size 1"),
    (b"stsz", words(0, 1000, 3), "stsz claims 3 samples of size 1000, the "),
    (b"stz2", words(0, 4, 9, 1), "stz2 claims 9 samples, the box can hold 8"),
]


@pytest.mark.parametrize(("name", "content", "told"), TABLES)
def test_each_table_is_held_to_its_box_or_to_the_file(name, content, told):
    assert told in refused(movie(track(box(name, content)), bulk=100))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (words(0, MANY), "stsz and trun claims 60000000 samples"),
        (words(0x200, 3, 1, 1), "trun claims 3 samples, the box can hold 2"),
        (words(0x305, 2, 0, 0, 1, 1, 1), "trun claims 2 samples, the box can hold 1"),
    ],
)
def test_a_fragment_is_held_to_them_too(content, told):
    assert told in refused(movie() + box(b"moof", box(b"traf", box(b"trun", content))))


def test_claims_that_are_small_each_are_added():
    assert "stsz and trun claims" in refused(movie(*[track(box(b"stsz", words(0, 1, 300)))] * 3, bulk=100))
    assert "stsz and trun claims" in refused(movie(bulk=9) + box(b"moof", box(b"trun", words(0, 40)) * 3))


def audio(count: int, chunk: int, ticks: int = 1) -> bytes:
    tables = [(b"stts", words(0, 1, count, ticks)), (b"stsz", words(0, 1, count)), (b"stco", words(0, 2, 0, 0)),
              (b"stsc", words(0, 1, 1, chunk, 1))]  # fmt: skip
    return track(*[box(name, content) for name, content in tables], handler=b"soun")


def test_compressed_sound_may_count_amplitudes():
    check_mp4_tables(movie(audio(44_000, 22_000), bulk=1000))
    assert "stts claims 44000 samples" in refused(movie(audio(44_000, 22_000, ticks=2), bulk=1000))
    assert "stsc claims 4294967294 samples" in refused(movie(audio(44_000, 2**31 - 1), bulk=1000))


def hidden(kind: str, tables: bytes) -> bytes:
    if kind == "cmov":
        header = box(b"moov", track(tables))
        body = box(b"dcom", b"zlib") + box(b"cmvd", words(len(header)) + zlib.compress(header))
        return movie(box(b"cmov", body))
    if kind == "stsd":
        return movie(track(box(b"stsd", words(0, 1) + box(b"avc1", bytes(78) + tables))))
    if kind == "meta":
        return movie(box(b"meta", words(0) + box(b"hdlr", bytes(24)) + box(b"stbl", tables)))
    if kind == "free":
        return movie() + box(b"free", box(b"mvhd", bytes(100)) + track(tables))
    return movie(box(b"udta", box(b"ilst", tables)))


@pytest.mark.parametrize("kind", ["cmov", "stsd", "meta", "free", "udta"])
def test_tables_are_found_wherever_ffmpeg_reads_them(kind):
    assert "claims 60000000 samples" in refused(hidden(kind, box(b"stsz", words(0, 1, MANY))))


def test_a_compressed_header_that_is_a_flood_is_refused():
    flood = box(b"dcom", b"zlib") + box(b"cmvd", words(1 << 30) + zlib.compress(bytes(1 << 22)))
    assert "compressed header (cmov) is longer than 1048576 bytes" in refused(movie(box(b"cmov", flood)))


def test_the_number_of_boxes_is_bounded_and_their_depth(monkeypatch):
    deep = box(b"stsz", words(0, 0, 0))
    for _ in range(3000):
        deep = box(b"udta", deep)
    check_mp4_tables(movie(deep))
    monkeypatch.setattr(mp4_tables, "_MOST_BOXES", 100)
    assert "more than 100 boxes" in refused(movie(box(b"free", b"") * 200))


def test_whatever_the_bytes_are_nothing_but_a_sample_error_is_raised():
    chance = random.Random(0)
    whole = [bomb(), media.video(media.grey_frames(8), options={"movflags": "frag_keyframe+empty_moov"})]
    whole += [hidden(kind, box(b"stsz", words(0, 0, 1, 1))) for kind in ("cmov", "stsd", "meta", "free")]
    whole += [movie(audio(1000, 500), bulk=100)]
    names = sorted(mp4_tables._TABLES | mp4_tables._HOLDERS | {b"hdlr", b"stsd", b"cmov"})
    outcomes = set()
    for turn in range(3000):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 3, 20))):
            at = chance.randrange(len(data))
            length = chance.randrange(1, 9)
            piece = (bytes(length), b"", b"\xff" * 4, chance.randbytes(length), chance.choice(names))
            data[at : at + length] = chance.choice(piece)
        if turn % 3 == 0:
            del data[chance.randrange(len(data)) :]
        try:
            check_mp4_tables(bytes(data))
            outcomes.add("passed")
        except SampleError as error:
            outcomes.add(error.kind)
    assert outcomes == {"passed", "corrupt"}
