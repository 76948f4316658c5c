"""Scanning tar shards: offsets of samples, and damage reported with shard and byte."""

import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univitar_ds.data.shards import tar_index as module
from univitar_ds.data.shards.tar_index import BLOCK, SMALL, TAIL_LIMIT, Damage, group_of_range, groups, split_name
from univitar_ds.errors import DataError

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
MEMBERS = [("a/x.jpg", b"1" * 700), ("a/x.json", b"{}"), ("a/y.mp4", b""), ("a/y.txt", b"t" * 512), ("b/x.jpg", b"3")]


def make(members, form=tarfile.USTAR_FORMAT, **extra):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **extra) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def scan(data, start=0):
    return list(groups(io.BytesIO(data), "s", len(data), start))


def content(data, group):
    return {member.extension: data[member.offset : member.offset + member.length] for member in group.members}


def test_consecutive_members_with_the_same_key_are_one_sample():
    data = make(MEMBERS)
    found = scan(data)
    assert [group.key for group in found] == ["a/x", "a/y", "b/x"]
    assert [content(data, group) for group in found] == [
        {"jpg": b"1" * 700, "json": b"{}"},
        {"mp4": b"", "txt": b"t" * 512},
        {"jpg": b"3"},
    ]


names = st.lists(st.text("abcdé", min_size=1, max_size=80), min_size=1, max_size=5).map("/".join)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(
        st.tuples(names, st.sampled_from(["jpg", "json", "seg.png"]), st.binary(max_size=1500)), max_size=8
    ),
    form=st.sampled_from(FORMATS),
)
def test_long_names_of_all_tar_formats_are_read(members, form):
    if form == tarfile.USTAR_FORMAT:
        members = [(name.replace("é", "e")[-90:].strip("/") or "x", *rest) for name, *rest in members]
    data = make([(f"{name}.{extension}", body) for name, extension, body in members], form)
    flat = [
        (group.key, *pair)
        for group in scan(data)
        for pair in zip(
            [member.extension for member in group.members],
            [data[member.offset : member.offset + member.length] for member in group.members],
            strict=True,
        )
    ]
    assert flat == [tuple(member) for member in members]


@pytest.mark.parametrize("form", FORMATS)
def test_a_scan_can_start_at_the_end_of_any_sample(form):
    data = make([(f"{'long' * 30}/{name}", body) for name, body in MEMBERS], form)
    whole = scan(data)
    for index, group in enumerate(whole):
        assert [g.key for g in scan(data, group.end)] == [g.key for g in whole[index + 1 :]]


@pytest.mark.parametrize("form", FORMATS)
def test_a_sample_can_be_read_from_its_range_alone(form):
    data = make([(f"{'long' * 30}/{name}", body) for name, body in MEMBERS], form)
    for group in scan(data):
        part = data[group.offset : group.end]
        again = group_of_range(io.BytesIO(part), "s", len(part), group.offset)
        assert again.key == group.key
        assert content(part, again) == content(data, group)


def test_group_of_range_returns_none_unless_the_range_is_one_sample():
    data = make(MEMBERS)
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    trailed = data[: scan(data)[0].end] + folder.tobuf()
    assert group_of_range(io.BytesIO(trailed), "s", len(trailed), 0) is None
    first, second, _ = scan(data)
    for low, high in [(first.offset, second.end), (512, first.end), (first.offset, first.end - BLOCK), (0, 100)]:
        part = data[low:high]
        assert group_of_range(io.BytesIO(part), "s", len(part), low) is None


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 10**6), form=st.sampled_from(FORMATS))
def test_a_truncated_tar_is_reported_with_shard_and_byte(cut, form):
    data = make([(f"{'long' * 30}/{name}", body) for name, body in MEMBERS], form)
    marker = scan(data)[-1].end + 2 * BLOCK
    cut %= marker
    with pytest.raises(DataError, match=rf"shard s: cut off at byte {cut}, .*restore the shard"):
        scan(data[:cut])


def test_two_blocks_of_zeros_are_a_complete_end_marker():
    data = make(MEMBERS)
    end = scan(data)[-1].end
    assert len(scan(data[: end + 2 * BLOCK])) == 3


def test_every_damaged_byte_of_a_header_is_detected():
    data = make(MEMBERS)
    second = scan(data)[0].members[1].offset - BLOCK
    for byte in range(0, 345, 7):
        damaged = bytearray(data)
        damaged[second + byte] ^= 0x55
        with pytest.raises(DataError, match=rf"shard s: damaged at byte {second}: no valid tar header"):
            scan(bytes(damaged))


def test_a_block_of_zeros_in_the_middle_is_damage():
    data = bytearray(make(MEMBERS))
    second = scan(bytes(data))[1].offset
    data[second : second + BLOCK] = bytes(BLOCK)
    with pytest.raises(DataError, match=rf"damaged at byte {second}: a block of zeros"):
        scan(bytes(data))


def test_concatenated_tars_are_an_error():
    data = make(MEMBERS)
    end = scan(data)[-1].end + 2 * BLOCK
    with pytest.raises(DataError, match="more data after the end marker"):
        scan(data[:end] + data)


def test_a_file_that_is_not_a_tar_is_damaged_at_byte_0():
    with pytest.raises(DataError, match="damaged at byte 0: no valid tar header"):
        scan(b"z" * 2000)


def test_the_error_for_a_compressed_tar_names_the_compression():
    with pytest.raises(DataError, match=r"damaged at byte 0: it is compressed with gzip, .* decompress it"):
        scan(gzip.compress(make(MEMBERS)) + bytes(BLOCK))


def test_the_content_of_small_files_comes_with_them():
    sizes = {"txt": SMALL, "json": 0, "jpg": SMALL + 1}
    data = make([(f"x.{extension}", bytes([7]) * size) for extension, size in sizes.items()])
    (group,) = scan(data)
    assert [(one.extension, one.content) for one in group.members] == [
        ("txt", bytes([7]) * SMALL), ("json", b""), ("jpg", None),
    ]  # fmt: skip


def test_links_are_members_without_content():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in [("l.jpg", tarfile.SYMTYPE), ("l.txt", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.jpg"
            tar.addfile(info)
    (group,) = scan(buffer.getvalue())
    assert group.key == "l"
    assert [(member.extension, member.length, member.link, member.content) for member in group.members] == [
        ("jpg", 0, True, None), ("txt", 0, True, None),
    ]  # fmt: skip


def test_folders_and_hidden_files_are_skipped_but_not_files_without_an_extension():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("d.x")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        for name in ("._x.jpg", ".jpg", "x.JPG", "x"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    data = buffer.getvalue()
    (group,) = scan(data)
    assert (group.key, content(data, group)) == ("x", {"jpg": b"abc", "": b"abc"})


def test_a_sparse_member_is_damage():
    info = tarfile.TarInfo("x.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(DataError, match=r"damaged at byte 0: a sparse member 'x\.jpg'"):
        scan(info.tobuf() + bytes(2 * BLOCK))


@pytest.mark.parametrize("record", [b"99 path=x\n", b"abc", b"10 nothing\n", b"13 size=-5\n\n\n", b"14 size=9999\n"])
def test_an_invalid_pax_header_is_damage(record):
    header = tarfile.TarInfo("p")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    member = tarfile.TarInfo("x.jpg")
    data = header.tobuf(tarfile.GNU_FORMAT) + record.ljust(BLOCK, b"\0") + member.tobuf() + bytes(2 * BLOCK)
    with pytest.raises(DataError, match=r"shard s: (damaged|cut off)"):
        scan(data)


def outline(data, start=0):
    """Keys of the samples and (kind, first byte, end) of the damage, in order."""
    found = list(module.scan(io.BytesIO(data), "s", len(data), start))
    return [(one.kind, one.offset, one.end) if isinstance(one, Damage) else one.key for one in found]


def ruined(data, *starts):
    """The shard with an unreadable block at each of these bytes."""
    body = bytearray(data)
    for start in starts:
        body[start : start + BLOCK] = b"x" * BLOCK
    return bytes(body)


def test_samples_after_a_damaged_header_are_found():
    data = make(MEMBERS)
    first, second, third = scan(data)
    text = second.members[1].offset
    assert outline(ruined(data, second.offset)) == ["a/x", ("damaged", second.offset, text - BLOCK), "a/y", "b/x"]
    assert outline(ruined(data, third.offset)) == ["a/x", "a/y", ("damaged", third.offset, len(data))]
    assert outline(ruined(data, first.offset))[0] == ("damaged", 0, first.members[1].offset - BLOCK)


def test_a_sample_with_damage_between_its_members_is_part_of_the_damage():
    data = make([("x.jpg", b"1"), ("x.txt", b"2"), ("x.cls", b"3"), ("x.json", b"4"), ("y.jpg", b"5")])
    sample, after = scan(data)
    middle = sample.members[1].offset - BLOCK
    assert outline(ruined(data, middle)) == [("damaged", 0, after.offset), "y"]
    assert outline(ruined(data, middle, middle + 2 * BLOCK)) == [("damaged", 0, after.offset), "y"]


def test_the_sample_after_a_member_that_lost_blocks_is_found():
    data = make([("x.jpg", b"1" * 3000), ("x.json", b"{}"), ("y.jpg", b"2" * 3000), ("y.json", b"{}")])
    second = scan(data)[1]
    image = scan(data)[0].members[0]
    shorter = data[: image.offset + BLOCK] + data[image.offset + 2 * BLOCK :]
    message = f"byte 0: that member is incomplete, another begins inside it at byte {image.offset + 5 * BLOCK}"
    found = list(module.scan(io.BytesIO(shorter), "s", len(shorter)))
    assert isinstance(found[0], Damage)
    assert message in found[0].message
    assert outline(shorter) == [("damaged", 0, second.offset - BLOCK), "y"]


def test_a_sample_with_a_truncated_last_member_is_damage():
    data = make(MEMBERS)
    second = scan(data)[1]
    end = second.members[1].offset + 100
    assert outline(data[:end]) == ["a/x", ("cut", second.offset, end)]


def test_a_length_beyond_the_end_is_damage_and_not_a_cut_if_a_sample_follows():
    header = tarfile.TarInfo("x.jpg")
    header.size = 1 << 40
    data = header.tobuf(tarfile.GNU_FORMAT) + make([("y.jpg", b"2")])
    assert outline(data) == [("damaged", 0, BLOCK), "y"]
    assert outline(header.tobuf(tarfile.GNU_FORMAT) + b"z" * 600) == [("cut", 0, BLOCK + 600)]


def test_samples_of_all_concatenated_tars_are_found():
    data = make(MEMBERS)
    end = scan(data)[-1].end
    assert len(data) > end + 3 * BLOCK
    assert outline(data + data) == ["a/x", "a/y", "b/x", ("damaged", end, len(data)), "a/x", "a/y", "b/x"]


def test_a_hole_of_zeros_at_the_end_is_damage():
    data = make(MEMBERS)
    end = scan(data)[-1].end
    assert outline(data[:end] + bytes(TAIL_LIMIT)) == ["a/x", "a/y", "b/x"]
    longer = data[:end] + bytes(TAIL_LIMIT + BLOCK)
    assert outline(longer) == ["a/x", "a/y", "b/x", ("damaged", end, len(longer))]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damage_in_a_long_name_affects_only_its_sample(form):
    data = make([(f"{'long' * 30}/{name}", body) for name, body in MEMBERS], form)
    first, second, third = scan(data)
    found = outline(ruined(data, second.offset))
    assert [found[0], found[-1]] == [first.key, third.key]
    assert found[1][:2] == ("damaged", second.offset)


def test_a_scan_reads_headers_but_no_content():
    class Counting(io.BytesIO):
        total = 0

        def read(self, size=-1):
            data = super().read(size)
            self.total += len(data)
            return data

    data = make([(f"{number}.jpg", b"1" * 100_000) for number in range(20)])
    stream = Counting(data)
    assert len(list(module.scan(stream, "s", len(data)))) == 20
    assert stream.total <= 21 * BLOCK + 10240


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.1/a.b.JPG", ("d.1/a", "b.jpg")),
        ("./a.txt", ("./a", "txt")),
        ("a", ("a", "")),
        (".a", None),
        ("d.x/._a.jpg", None),
        ("d.x/a", ("d.x/a", "")),
        ("a.", ("a", "")),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_file_name(path, named):
    assert split_name(path) == named


def test_the_checksum_of_a_header_full_of_high_bytes_is_exact():
    data = bytearray(make([("x.jpg", b"1")]))
    data[157:257] = b"\xff" * 100  # the target of a link, which a regular file does not have
    data[346:500] = b"\xff" * 154  # the prefix of the name, which is empty, after its first byte
    total = sum(data[:148]) + 8 * 0x20 + sum(data[156:512])
    assert total > 65521
    data[148:156] = b"%06o\0 " % total
    assert [group.key for group in scan(bytes(data))] == ["x"]
    data[148:156] = b"%06o\0 " % (total - 65521)
    with pytest.raises(DataError, match="byte 0"):
        scan(bytes(data))
