"""Finds the packets of a video stream at which decoding may begin, without decoding.

A container's key frame flag is not enough: frames after a flagged packet may still refer to frames before it. Here, a
packet counts only if the coded data proves that no frame after it, in both decoding and display order, refers to a
frame before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import av

_INTRA_ONLY = frozenset({"mjpeg", "png", "prores", "dnxhd"})
_DROPS_EXACTLY = frozenset({"h264", "mpeg1video", "mpeg2video"})
# NAL unit types of slices, of IDR slices, and of parameter sets (SPS and PPS, in HEVC also VPS).
_SLICES = {"h264": range(1, 6), "hevc": range(0, 22)}
_IDR = {"h264": (5,), "hevc": (19, 20)}
_SETS = {"h264": frozenset({7, 8}), "hevc": frozenset({32, 33, 34})}
_START_CODE = b"\0\0\1"


def drops_exactly(codec: str) -> bool:
    """Whether `skip_frame = "NONREF"` of FFmpeg's decoder skips only frames to which no other frame refers.

    False for HEVC: a frame that is not a reference in its temporal layer may be one for a higher layer.
    """
    return codec in _DROPS_EXACTLY


def is_shown(codec: str, packet: av.Packet) -> bool:
    """Whether the frame of a packet is displayed. VP8 has packets with alternate reference frames, which never are."""
    return not packet.is_discard and (codec != "vp8" or bool(memoryview(packet)[0] & 0x10))


def restarts(codec: str, extradata: bytes | None, packets: Sequence[av.Packet]) -> list[int]:
    """Returns ascending indices of the packets at which decoding may begin, except the first packet.

    Decoding from such a packet gives the same frames as decoding from the first packet, for all frames that follow the
    packet in both decoding order and display order.
    """
    if codec in _INTRA_ONLY:
        return list(range(1, len(packets)))
    keys = [i for i, packet in enumerate(packets) if i and packet.is_keyframe]
    if not keys:
        return []
    if codec in _IDR:
        return _parameterised(codec, extradata or b"", packets, set(keys))
    proof = _PROOFS.get(codec)
    return [i for i in keys if proof(bytes(packets[i]))] if proof else []


def _parameterised(codec: str, extradata: bytes, packets: Sequence[av.Packet], keys: set[int]) -> list[int]:
    """Returns `restarts` of H.264 and HEVC: IDR pictures with parameter sets in the same packet or in the extradata."""
    found = []
    sets_in_band = False
    for index, packet in enumerate(packets):
        types = list(_unit_types(codec, bytes(packet), _length_bytes(codec, extradata)))
        first_slice = next((kind for kind in types if kind in _SLICES[codec]), None)
        complete = not sets_in_band or _SETS[codec].issubset(types)
        if index in keys and first_slice in _IDR[codec] and complete:
            found.append(index)
        sets_in_band = sets_in_band or not _SETS[codec].isdisjoint(types)
    return found


def _length_bytes(codec: str, extradata: bytes) -> int:
    """Returns the size in bytes of the length field before each NAL unit; 0 if start codes separate the units."""
    at = 4 if codec == "h264" else 21
    return (extradata[at] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > at else 0


def _unit_types(codec: str, data: bytes, length_bytes: int) -> Iterator[int]:
    for at in _units(data, length_bytes):
        yield data[at] & 31 if codec == "h264" else data[at] >> 1 & 63


def _units(data: bytes, length_bytes: int) -> Iterator[int]:
    """Yields the offset of each NAL unit of a packet."""
    at = 0
    if not length_bytes:
        while 0 <= (at := data.find(_START_CODE, at)) < len(data) - 3:
            at += 3
            yield at
        return
    while at + length_bytes < len(data):
        length = int.from_bytes(data[at : at + length_bytes], "big")
        at += length_bytes
        yield at
        at += length


def _vp8_key(data: bytes) -> bool:
    return not data[0] & 1


def _vp9_key(data: bytes) -> bool:
    marker, profile, repeats, inter = data[0] >> 6, data[0] >> 4 & 3, data[0] >> 3 & 1, data[0] >> 2 & 1
    return marker == 2 and profile != 3 and not repeats and not inter


def _mpeg_intra(data: bytes) -> bool:
    """Whether an MPEG-1 or MPEG-2 packet has an I picture after a sequence header.

    The header resets the quantization matrices.
    """
    picture = data.find(b"\0\0\1\0")
    return b"\0\0\1\xb3" in data[: max(picture, 0)] and len(data) > picture + 5 and data[picture + 5] >> 3 & 7 == 1


_PROOFS = {"vp8": _vp8_key, "vp9": _vp9_key, "mpeg1video": _mpeg_intra, "mpeg2video": _mpeg_intra}
