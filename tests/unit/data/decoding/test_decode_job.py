"""Decoding of a pack from the addresses of its items."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest

from tests.support import media, shards
from univitar_ds.data.decoding.decode_job import DecodeItem, DecodeJob, decode_pack
from univitar_ds.data.media import image_decode, video_decode
from univitar_ds.data.media.augment import Augmentation, Crop
from univitar_ds.data.media.frame_sampling import Sampling
from univitar_ds.data.media.resize import fit_image
from univitar_ds.data.media.types import DecodeLimits, MediaSize
from univitar_ds.errors import DataError

LIMITS = DecodeLimits(10**6, 30.0, 60.0)


@pytest.fixture
def place(tmp_path):
    """A function that writes contents one after another to a file and returns an item for each."""

    def put(*contents, grid=(1, 2, 3), frames=1, **given):
        path = tmp_path / "shard"
        path.write_bytes(b"".join(contents))
        starts = np.cumsum([0, *map(len, contents)]).tolist()
        return [
            DecodeItem(str(path), start, len(content), grid, frames, **given)
            for start, content in zip(starts, contents, strict=False)
        ]

    return put


def job_of(items, modality="image"):
    return DecodeJob(modality, Sampling(), LIMITS, items)


def test_images_are_decoded_one_after_another_without_a_gap_for_a_failed_one(place):
    images = [media.noise(50, 70, seed) for seed in range(3)]
    first, third = (media.encoded(images[seed], "PNG") for seed in (0, 2))
    items = place(first, b"not an image", third)
    buffer = np.full(3 * 28 * 42 * 3, 9, np.uint8)
    seen = []
    failures = decode_pack(job_of(items), buffer, after_item=lambda: seen.append(1))
    assert [(index, kind) for index, kind, _ in failures] == [(1, "unreadable")]
    drawn = buffer.reshape(3, 28, 42, 3)
    assert (drawn[0] == fit_image(np.asarray(images[0]), (1, 2, 3))).all()
    assert (drawn[1] == fit_image(np.asarray(images[2]), (1, 2, 3))).all()
    assert (drawn[2] == 9).all()
    assert len(seen) == 3


def test_a_whole_file_that_cannot_be_read_is_a_failed_item_and_a_shard_an_error(place, tmp_path):
    (first,) = place(media.encoded(media.noise(50, 70), "PNG"))
    gone = DecodeItem(str(tmp_path / "gone.png"), 0, 9, (1, 2, 3), 1)
    job = job_of([gone, first])
    with pytest.raises(DataError, match=r"gone\.png"):
        decode_pack(job, np.empty(job.bytes, np.uint8))
    sent = DecodeJob.from_json(json.loads(json.dumps(replace(job, whole_files=True).to_json())))
    ((index, kind, message),) = decode_pack(sent, np.empty(job.bytes, np.uint8))
    assert (index, kind) == (0, "unreadable")
    assert "gone.png" in message


def test_an_image_whose_decoder_runs_out_of_memory_is_a_bad_sample(place, monkeypatch):
    def refused(*_, **__):
        raise MemoryError

    monkeypatch.setattr(image_decode.simplejpeg, "decode_jpeg", refused)
    monkeypatch.setattr(image_decode, "rgb_pixels", refused)
    items = place(media.encoded(media.noise(50, 70)), media.encoded(media.noise(50, 70), "PNG"))
    failures = decode_pack(job_of(items), np.empty(2 * 28 * 42 * 3, np.uint8))
    assert [(index, kind) for index, kind, _ in failures] == [(0, "too_large"), (1, "too_large")]
    assert "more memory than data.max_image_px = 1000000 allows" in failures[0][2]


def test_the_checksum_detects_a_flipped_bit_in_an_image_that_can_be_decoded(place):
    content = bytearray(media.encoded(media.noise(50, 70), "BMP"))
    packed = zlib.crc32(content)
    buffer = np.empty(28 * 42 * 3, np.uint8)
    assert decode_pack(job_of(place(bytes(content), crc32=packed)), buffer) == []
    content[-100] ^= 1
    assert decode_pack(job_of(place(bytes(content))), buffer) == []
    ((index, kind, message),) = decode_pack(job_of(place(bytes(content), crc32=packed)), buffer)
    assert (index, kind) == (0, "checksum")
    assert f"{packed:08x} when they were packed" in message


def test_the_frames_of_a_video_are_decoded_in_order_at_the_size_of_its_grid(place):
    (item,) = place(shards.video(48, 64, 8), grid=(2, 2, 3), frames=4)
    buffer = np.empty(item.bytes, np.uint8)
    assert decode_pack(job_of([item], "video"), buffer) == []
    frames = buffer.reshape(4, 28, 42, 3)
    bright = [int(frame.mean(axis=(0, 2)).argmax()) for frame in frames]
    assert bright == sorted(bright)
    assert bright[0] < bright[-1]


def test_a_job_survives_json(place):
    items = place(b"abc", b"de", crc32=7, draw=2**63)
    job = DecodeJob("video", Sampling("fps", 3.0, True), LIMITS, items)
    assert DecodeJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_a_missing_shard_is_a_data_error_and_not_a_bad_sample(place):
    (item,) = place(b"abc")
    with pytest.raises(DataError, match="cannot be read"):
        decode_pack(job_of([DecodeItem(item.path + "x", 0, 3, item.grid, 1)]), np.empty(item.bytes, np.uint8))


def outcome(item, modality="image"):
    """The kind and message with which the item fails; None if it is decoded."""
    failures = decode_pack(job_of([item], modality), np.empty(item.bytes, np.uint8))
    return failures[0][1:] if failures else None


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_whose_size_differs_from_its_metadata_is_a_bad_sample(place, form, orientation):
    content = media.encoded(media.noise(200, 302), form, exif=media.exif(orientation))
    size = (302, 200) if orientation == 6 else (200, 302)
    assert outcome(*place(content, size=(*size, 0.0))) is None
    for wrong in (size[::-1], (200, 303), (25, 38)):
        kind, message = outcome(*place(content, size=(*wrong, 0.0)))
        assert kind == "wrong_size"
        assert f"{wrong[1]} x {wrong[0]}" in message
        assert f"{size[1]} x {size[0]}" in message


def test_the_metadata_of_a_video_may_have_the_size_of_its_header_or_of_its_frames(place, monkeypatch):
    content = shards.video(48, 64, 8)
    given = {"grid": (1, 2, 3), "frames": 2}
    assert outcome(*place(content, size=(48, 64, 1.0), **given), "video") is None
    kind, message = outcome(*place(content, size=(64, 48, 1.0), **given), "video")
    assert (kind, "48 x 64" in message, "64 x 48" in message) == ("wrong_size", True, True)
    kind, message = outcome(*place(content, size=(48, 64, 80.0), **given), "video")
    assert (kind, "80 s" in message) == ("wrong_size", True)
    # A rotation that is stored in the frames but not in the header.
    monkeypatch.setattr(video_decode, "probe_video", lambda data, demuxer: MediaSize("video", 64, 48, 8, 0.3))
    assert outcome(*place(content, size=(64, 48, 1.0), **given), "video") is None
    assert outcome(*place(content, size=(48, 64, 1.0), **given), "video") is None
    assert outcome(*place(content, size=(48, 48, 1.0), **given), "video")[0] == "wrong_size"


CROPPED = Augmentation(Crop(10, 20, 40, 60, 80, 120), True, (("brightness", 0.5),), True)


def test_a_crop_is_resized_to_the_grid_and_then_changed(place):
    image = media.noise(80, 120)
    (item,) = place(media.encoded(image, "PNG"), augmentation=CROPPED)
    job = DecodeJob.from_json(json.loads(json.dumps(job_of([item]).to_json())))
    buffer = np.zeros(job.bytes, np.uint8)
    assert decode_pack(job, buffer) == []
    wanted = fit_image(np.asarray(image)[10:50, 20:80], item.grid)[None].copy()
    CROPPED.finish(wanted)
    assert (buffer.reshape(wanted.shape) == wanted).all()


def test_the_frames_of_a_video_get_one_crop_and_one_change(place):
    change = Augmentation(Crop(8, 16, 24, 32, 48, 64), True, (("contrast", 1.4), ("hue", 0.2)))
    content = shards.video(48, 64, frames=6)
    (item,) = place(content, grid=(3, 1, 2), frames=6, augmentation=change)
    buffer = np.zeros(item.bytes, np.uint8)
    assert decode_pack(job_of([item], "video"), buffer) == []
    whole = video_decode.decode_video(content, frames=6, limits=LIMITS)
    wanted = np.stack([fit_image(frame[8:32, 16:48], item.grid) for frame in whole])
    change.finish(wanted)
    assert (buffer.reshape(wanted.shape) == wanted).all()


def test_a_crop_of_a_large_jpeg_is_decoded_at_a_smaller_scale_that_is_large_enough_for_it(place, monkeypatch):
    image = media.noise(643, 1001)
    change = Augmentation(Crop(104, 200, 320, 500, 643, 1001))
    (item,) = place(media.encoded(image, quality=95), grid=(1, 4, 6), augmentation=change)
    shapes, cut = [], Crop.cut

    def noted(crop, pixels, *rest):
        shapes.append(pixels.shape)
        return cut(crop, pixels, *rest)

    monkeypatch.setattr(Crop, "cut", noted)
    buffer = np.zeros(item.bytes, np.uint8)
    assert decode_pack(job_of([item]), buffer) == []
    assert shapes == [(242, 376, 3)], "3/8: the crop has 120 x 187 px of them, at least twice the target"
    wanted = fit_image(np.asarray(image)[104:424, 200:700], item.grid)
    difference = np.abs(buffer.reshape(wanted.shape).astype(int) - wanted)
    assert difference.mean() < 1
