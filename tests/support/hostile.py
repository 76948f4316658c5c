"""Media files that take excessive memory or time if their headers are trusted: {name: function that makes it}."""

import struct
import zlib
from functools import cache

from PIL import Image

from tests.support import media

MANY = 60_000_000
MIB = 1 << 20


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
    """Replace numbers at an offset in the content of the only box of that name."""
    assert data.count(table) == 1
    begin = data.index(table) + 4 + at
    return data[:begin] + words(*numbers) + data[begin + 4 * len(numbers) :]


def claiming(samples: int) -> bytes:
    """A video of a few hundred bytes whose tables claim many samples of one byte."""
    data = altered(media.video(media.grey_frames(8)), b"stsz", 4, 1, samples)
    return altered(altered(data, b"stts", 8, samples), b"stsc", 12, samples)


def sound(count: int, chunk: int) -> bytes:
    tables = [(b"stts", words(0, 1, count, 1)), (b"stsz", words(0, 1, count)), (b"stco", words(0, 2, 0, 0)),
              (b"stsc", words(0, 1, 1, chunk, 1))]  # fmt: skip
    return track(*[box(name, content) for name, content in tables], handler=b"soun")


def packed_header(header: bytes) -> bytes:
    return box(b"cmov", box(b"dcom", b"zlib") + box(b"cmvd", words(len(header)) + zlib.compress(header)))


CLAIM = box(b"stsz", words(0, 1, MANY))
FILES = {
    "6 million frames.mp4": lambda: claiming(6_000_000),
    "60 million frames.mp4": lambda: claiming(MANY),
    "2 billion frames.mp4": lambda: claiming(2**31 - 1),
    "times.mp4": lambda: movie(track(box(b"stts", words(0, MANY, 1, 1)))),
    "offsets.mp4": lambda: movie(track(box(b"ctts", words(0, MANY, 1, 1))), bulk=100),
    "keyframes.mp4": lambda: movie(track(box(b"stss", words(0, MANY)))),
    "fragment.mp4": lambda: movie() + box(b"moof", box(b"traf", box(b"trun", words(0, MANY)))),
    "packed.mp4": lambda: movie(packed_header(box(b"moov", track(CLAIM)))),
    "flood.mp4": lambda: movie(packed_header(bytes(1 << 26))),
    "inside.mp4": lambda: movie(track(box(b"stsd", words(0, 1) + box(b"avc1", bytes(78) + CLAIM)))),
    "aside.mp4": lambda: movie() + box(b"free", box(b"mvhd", bytes(100)) + track(CLAIM)),
    "boxes.mp4": lambda: movie(box(b"free", b"") * 200_000),
    "amplitudes.mp4": lambda: movie(sound(2**31 - 1, 2**31 - 1), bulk=1000),
    "many tracks.mp4": lambda: movie(*[track(CLAIM)] * 300),
}


ORDINARY = {
    "ordinary.mp4": lambda: media.video(media.grey_frames(8)),
    "ordinary.png": lambda: media.encoded(media.quarters(), "PNG"),
}


def jpeg2000(width: int, height: int, tile: tuple[int, int], mode: str = "L", **options) -> bytes:
    """A small image with another size in its header."""
    data = bytearray(media.encoded(Image.new(mode, (64, 64)), "JPEG2000", no_jp2=True, **options))
    struct.pack_into(">8I", data, 8, width, height, 0, 0, *tile, 0, 0)
    return bytes(data)


def screen(side: int) -> bytes:
    """A GIF with a screen of `side` x `side` pixels, which is cleared after its first frame."""
    frames = [Image.fromarray(frame) for frame in media.grey_frames(3, 40, 64)]
    data = bytearray(media.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2))
    at = data.index(b"\x2c\x00\x00\x00\x00\x40\x00\x28\x00") + 5
    data[6:10] = data[at : at + 4] = struct.pack("<HH", side, side)
    return bytes(data)


@cache
def zeros(mib: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(mib)) + packer.flush()


def with_texts(name: bytes, count: int, mib: int) -> bytes:
    """A PNG with `count` texts or profiles of different names, each `mib` MiB when decompressed."""
    plain, packed = media.encoded(media.quarters(), "PNG"), zeros(mib)
    at = plain.index(b"IDAT") - 4
    chunks = [name + b"k%d\0\0" % number + packed for number in range(count)]
    texts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return plain[:at] + b"".join(texts) + plain[at:]


def tile(width: int, height: int) -> bytes:
    """A TIFF of 100 x 60 pixels in one tile of another size."""
    body = zlib.compress(bytes(1000))
    tags = {256: 100, 257: 60, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 8, 325: len(body)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


FILES |= {
    "screen.gif": lambda: screen(65535),
    "text.png": lambda: with_texts(b"zTXt", 1, 600),
    "texts.png": lambda: with_texts(b"zTXt", 2, 360),
    "profile.png": lambda: with_texts(b"iCCP", 1, 600),
    "tile.tif": lambda: tile(40_000, 30_000),
    "blocks.j2k": lambda: jpeg2000(10_000, 10_000, (10_000, 10_000), codeblock_size=(4, 4)),
    "tiles.j2k": lambda: jpeg2000(9984, 9984, (39, 39), "RGBA"),
    "one tile.j2k": lambda: jpeg2000(10_000, 10_000, (10_000, 10_000), "RGB"),
}
