import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.support import media
from univitar_ds.data.media import image_decode
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.media.video_probe import open_video
from univitar_ds.errors import SampleError


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def kind_of_error(data: bytes, extension: str) -> str:
    with pytest.raises(SampleError) as caught:
        probe(data, extension)
    return caught.value.kind


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "GIF", "JPEG2000", "ICO"])
def test_the_size_of_every_format_is_read_from_its_header(form):
    data = media.encoded(media.quarters(40, 64), form, **({"sizes": [(64, 40)]} if form == "ICO" else {}))
    assert probe(data, form.lower()) == MediaSize("image", 40, 64, 1)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientations_that_rotate_by_90_degrees_swap_the_sides(form, orientation):
    data = media.encoded(media.quarters(40, 64), form, exif=media.exif(orientation))
    size = probe(data, form.lower())
    assert (size.height, size.width) == ((64, 40) if orientation >= 5 else (40, 64))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_an_image_with_damaged_pixels_can_be_probed(form):
    data = media.encoded(media.noise(300, 200), form)
    assert probe(data[: len(data) - 4000] + bytes(4000) if form == "PNG" else data, form).height == 300


def test_the_frame_header_of_a_jpeg_is_found_after_half_a_megabyte_of_other_segments():
    data = media.encoded(media.quarters(40, 64), exif=media.exif(6))
    padded = data[:2] + b"".join(segment(0xE2, bytes(65000)) for _ in range(8)) + data[2:]
    assert len(padded) > 500_000
    assert probe(padded, "jpg") == MediaSize("image", 64, 40, 1)


@pytest.mark.parametrize("fill", range(4))
def test_other_bytes_and_fill_bytes_between_jpeg_markers_are_skipped(fill):
    data = media.encoded(media.quarters(40, 64))
    first, frame = 4 + int.from_bytes(data[4:6], "big"), data.index(b"\xff\xc0")
    padded = data[:first] + b"\x01\x02\x03" + data[first:frame] + b"\xff" * fill + data[frame:]
    assert probe(padded, "jpg").width == 64


def test_the_header_of_a_thumbnail_inside_exif_is_not_used():
    thumbnail = media.encoded(media.quarters(8, 16))
    data = media.encoded(media.quarters(40, 64))
    assert probe(data[:2] + segment(0xE1, b"Exif\0\0" + thumbnail) + data[2:], "jpg").width == 64


@pytest.mark.parametrize("orientation", [0, 9, 6000])
def test_an_invalid_orientation_is_ignored(orientation):
    data = media.encoded(media.quarters(40, 64), exif=media.exif(orientation))
    assert probe(data, "jpg") == MediaSize("image", 40, 64, 1)


def test_an_orientation_that_is_only_in_xmp_is_used():
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')
    data = media.encoded(media.quarters(40, 64))
    assert probe(data[:2] + xmp + data[2:], "jpg") == MediaSize("image", 64, 40, 1)


@pytest.mark.parametrize("keep", [2, 3, 10, 100])
def test_a_jpeg_cut_before_its_frame_header_is_a_bad_sample(keep):
    assert kind_of_error(media.encoded(media.quarters())[:keep], "jpg") in ("corrupt", "unreadable")


def test_the_content_decides_if_the_extension_is_wrong():
    assert probe(media.encoded(media.quarters(40, 64)), "png") == MediaSize("image", 40, 64, 1)
    assert probe(media.encoded(media.quarters(40, 64), "PNG"), "mp4_") == MediaSize("image", 40, 64, 1)
    assert probe(media.video(media.grey_frames(4)), "jpg").kind == "video"


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mp4", "mpeg4"), ("mov", "mpeg4"), ("avi", "mpeg4"), ("matroska", "mpeg4"), ("webm", "libvpx-vp9"),
     ("mpegts", "mpeg2video"), ("flv", "flv")],
)  # fmt: skip
def test_the_size_and_the_approximate_frame_count_of_every_container_are_read(form, codec):
    rate = 25 if codec == "mpeg2video" else 10
    size = probe(media.video(media.grey_frames(12, 48, 64), form, codec, rate=rate), form)
    assert (size.kind, size.height, size.width) == ("video", 48, 64)
    assert abs(size.frames - 12) <= 1
    assert size.duration_s == pytest.approx(12 / rate, abs=1.1 / rate)


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "libx264"), ("avi", "libx264"), ("mpegts", "libx264"), ("matroska", "libx264")]
)
def test_the_header_is_the_same_whether_frames_are_decoded_or_not(form, codec):
    data = media.video(media.moving_frames(30), form, codec, rate=25)
    headers = []
    for thorough in (False, True):
        container, stream = open_video(data, thorough)
        with container:
            context = stream.codec_context
            headers.append((context.height, context.width, stream.frames, stream.average_rate, container.duration))
            assert (context.pix_fmt is not None) == thorough, "only decoding finds the pixel format"
    assert headers[0] == headers[1]


def test_a_video_without_a_duration_in_its_header_can_be_probed():
    with_rate = media.video(media.grey_frames(12), "flv", "flv")
    at = with_rate.index(b"duration") + len(b"duration") + 1
    assert probe(with_rate, "flv").duration_s == pytest.approx(1.2)
    assert probe(with_rate[:at] + bytes(8) + with_rate[at + 8 :], "flv").duration_s >= 0


def test_a_display_matrix_that_rotates_by_90_degrees_swaps_the_sides_of_a_video():
    data = media.video(media.grey_frames(4, 48, 64))
    for matrix in [(0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0)]:
        assert probe(media.turned_mp4(data, matrix), "mp4") == MediaSize("video", 64, 48, 4, 0.4)
    for matrix in [(1, 0, 0, 1), (-1, 0, 0, -1), (-1, 0, 0, 1)]:
        assert probe(media.turned_mp4(data, matrix), "mp4") == MediaSize("video", 48, 64, 4, 0.4)


def test_a_gif_is_an_image_unless_its_name_makes_it_a_video():
    frames = [Image.fromarray(frame) for frame in media.grey_frames(6, 40, 64)]
    data = media.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert probe(data, "gif") == MediaSize("image", 40, 64, 1)
    assert probe(data, "gifv") == MediaSize("video", 40, 64, 6, 0.6)


def test_a_file_that_is_no_media_is_a_bad_sample_with_a_kind():
    assert kind_of_error(b"", "jpg") == "unreadable"
    assert kind_of_error(b"just text", "png") == "unreadable"
    assert kind_of_error(b"just text", "mp4") == "unreadable"
    assert kind_of_error(media.sound(), "mp4") == "no_video"
    assert kind_of_error(media.video(media.grey_frames(4))[:300], "mp4") in ("corrupt", "no_video")


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:1,\n", "ffconcat version 1.0\nfile "])
def test_a_playlist_cannot_make_the_prober_open_another_file(tmp_path, text):
    other = tmp_path / "other.mp4"
    other.write_bytes(media.video(media.grey_frames(4)))
    assert kind_of_error(f"{text}{other}\n".encode(), "mp4") == "unreadable"
    assert kind_of_error(f"{text}{other}\n".encode(), "jpg") == "unreadable"


def test_a_header_that_claims_billions_of_pixels_is_probed_without_delay():
    data = bytearray(media.encoded(media.quarters()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    began = time.process_time()
    assert probe(bytes(data), "jpg") == MediaSize("image", 65535, 65535, 1)
    png = bytearray(media.encoded(media.quarters(), "PNG"))
    png[16:24] = b"\x00\x01\x00\x00\x00\x01\x00\x00"
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    assert probe(bytes(png), "png") == MediaSize("image", 65536, 65536, 1)
    assert time.process_time() - began < 5


def flat_png(height: int, width: int) -> bytes:
    """A black image with one bit per pixel."""
    row = bytes(1 + -(-width // 8))
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def with_sides(data: bytes, form: str) -> bytes:
    """The header of an image that claims 20000 x 20000 pixels."""
    data = bytearray(data)
    if form == "PNG":
        data[16:24] = struct.pack(">II", 20000, 20000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif form == "BMP":
        data[18:26] = struct.pack("<ii", 20000, 20000)
    elif form == "GIF":
        data[6:10] = struct.pack("<HH", 20000, 20000)
    elif form == "TIFF":
        directory = int.from_bytes(data[4:8], "little")
        for entry in range(directory + 2, len(data) - 11, 12):
            if int.from_bytes(data[entry : entry + 2], "little") in (256, 257):
                data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 20000)
    else:
        return b"P4 20000 20000\n"
    return bytes(data)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TIFF", "PPM"])
def test_only_the_configured_limit_applies_and_is_checked_before_decoding(form, monkeypatch):
    data = with_sides(media.encoded(media.quarters(), form), form)
    assert probe(data, form.lower()) == MediaSize("image", 20000, 20000, 1)
    monkeypatch.setattr(image_decode, "rgb_pixels", lambda image, _: pytest.fail("decoded"))
    with pytest.raises(SampleError, match="20000 x 20000 is 400000000 pixels, above") as caught:
        image_decode.decode_image(data, max_px=399_999_999)
    assert caught.value.kind == "too_large"
    monkeypatch.setattr(image_decode, "rgb_pixels", lambda image, _: np.zeros((1, 1, 3), np.uint8))
    assert image_decode.decode_image(data, max_px=400_000_000).shape == (1, 1, 3)


def test_an_image_above_pillows_limit_is_decoded_if_the_configured_limit_allows_it(monkeypatch):
    data = flat_png(200, 900_000)
    assert probe(data, "png") == MediaSize("image", 200, 900_000, 1)
    monkeypatch.setattr(image_decode, "rgb_pixels", lambda image, _: image.load() and np.zeros((1, 1, 3), np.uint8))
    assert image_decode.decode_image(data, max_px=180_000_000).shape == (1, 1, 3)


@pytest.mark.parametrize("inner", ["png", "dib"])
def test_an_icon_with_an_image_larger_than_its_directory_states_is_rejected(inner):
    if inner == "png":
        image = flat_png(300, 500)
    else:
        image = struct.pack("<IiiHHIIiiII", 40, 500, 600, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(300 * 1500 + 300 * 64)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 24, len(image), 22)
    data = struct.pack("<HHH", 0, 1, 1) + entry + image
    assert image_decode.decode_image(data, max_px=150_000).shape == (300, 500, 3)
    with pytest.raises(SampleError, match="500 x 300 is 150000 pixels"):
        image_decode.decode_image(data, max_px=149_999)


def test_the_first_frame_of_a_gif_that_clears_its_screen_for_the_second_is_decoded():
    frames = [Image.fromarray(frame) for frame in media.grey_frames(3, 40, 64)]
    data = media.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2)
    assert np.array_equal(image_decode.decode_image(data, max_px=10**6), media.grey_frames(3, 40, 64)[0])


def test_a_side_above_the_limit_is_rejected_before_decoding(monkeypatch):
    data = flat_png(1, 1_048_577)
    monkeypatch.setattr(image_decode, "rgb_pixels", lambda image, _: pytest.fail("decoded"))
    with pytest.raises(SampleError, match="1048577 x 1 has a side of more than 1048576 pixels") as caught:
        image_decode.decode_image(data, max_px=10**8)
    assert caught.value.kind == "too_large"


def test_planning_and_decoding_agree_on_an_orientation_stored_after_the_pixels():
    chunk = b"eXIf" + media.exif(6).tobytes().removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png = media.encoded(media.quarters(40, 64), "PNG")
    data = png[:-12] + late + png[-12:]
    size = probe(data, "png")
    assert image_decode.decode_image(data, max_px=10**4).shape[:2] == (size.height, size.width) == (40, 64)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_planning_and_decoding_agree_on_the_orientation_of_rgb_and_cmyk_jpegs(orientation):
    """The EXIF header is stored twice, which only some EXIF readers accept."""
    for mode in ("RGB", "CMYK"):
        exif = b"Exif\0\0" + media.exif(orientation).tobytes()
        data = media.encoded(media.quarters(40, 64).convert(mode), exif=exif)
        size = probe(data, "jpg")
        assert image_decode.decode_image(data, max_px=10**4).shape[:2] == (size.height, size.width)


def tiff(order: str, big: bool, table_type: int = 4) -> bytes:
    """8 x 4 grey pixels, uncompressed, in four strips of one row."""
    number, after = ("Q", 16) if big else ("I", 8)
    body = bytes(8 * 4) + struct.pack(order + "4I", *range(after, after + 32, 8))
    tags = {256: 8, 257: 4, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
    entries = [struct.pack(order + "HH" + number + "I", tag, 4, 1, value) for tag, value in tags.items()]
    entries.append(struct.pack(order + "HH" + number + number, 273, table_type, 4, after + 32))
    directory = b"".join(entry.ljust(20 if big else 12, b"\0") for entry in entries) + bytes(8)
    head = struct.pack(order + "HHH", 43, 8, 0) if big else struct.pack(order + "H", 42)
    head = {"<": b"II", ">": b"MM"}[order] + head + struct.pack(order + number, after + len(body))
    return head + body + struct.pack(order + ("Q" if big else "H"), len(entries)) + directory


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_a_tiff_of_a_million_strips_is_rejected_before_pillow_creates_objects(order, big, monkeypatch):
    assert probe(tiff(order, big), "tif") == MediaSize("image", 4, 8, 1)
    monkeypatch.setattr("univitar_ds.data.media.probe._MAX_TIFF_VALUES", 3)
    with pytest.raises(SampleError, match=r"TIFF's tag 273 has 4 values \(limit 3\)") as caught:
        probe(tiff(order, big), "tif")
    assert caught.value.kind == "too_large"
    with pytest.raises(SampleError, match=r"TIFF's tag 273 has 4 values \(limit 3\)"):
        probe(tiff(order, big, table_type=1), "tif")


def test_a_long_text_in_a_tiff_is_not_limited(monkeypatch):
    monkeypatch.setattr("univitar_ds.data.media.probe._MAX_TIFF_VALUES", 20)
    data = media.encoded(media.quarters(40, 64), "TIFF", tiffinfo={270: "x" * 100})
    assert probe(data, "tif").width == 64


def test_many_numbers_in_a_private_tag_of_a_tiff_are_not_limited(monkeypatch):
    numbers = TiffImagePlugin.ImageFileDirectory_v2()
    numbers.tagtype[65000] = 4
    numbers[65000] = tuple(range(100))
    data = media.encoded(media.quarters(40, 64), "TIFF", tiffinfo=numbers)
    monkeypatch.setattr("univitar_ds.data.media.probe._MAX_TIFF_VALUES", 20)
    assert probe(data, "tif").width == 64
    numbers.tagtype[301] = 3
    numbers[301] = tuple(range(100))
    with pytest.raises(SampleError, match="tag 301 has 100 values"):
        probe(media.encoded(media.quarters(40, 64), "TIFF", tiffinfo=numbers), "tif")


@pytest.mark.parametrize("cut", [2, 6, 9, 40])
def test_a_tiff_that_ends_in_its_header_is_a_bad_sample(cut):
    with pytest.raises(SampleError, match=r"are not an image in a supported format|cannot be opened"):
        probe(b"MM" + b"text" * cut, "tif")
    assert kind_of_error(media.encoded(media.quarters(), "TIFF")[:cut], "tif") == "unreadable"
