"""Tiles cover a row once, and waste little of it."""

import pytest

from univitar_ds.kernels.tiling import (
    BACKWARD_WARPS,
    BYTES_IN_FLIGHT,
    FORWARD_WARPS,
    SCRATCH_BYTES,
    head_tiling,
    row_tiling,
    stages,
)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 7, 64, 96, 1024, 1280, 1920, 2816, 3456, 5120, 20000])
def test_tiles_cover_a_row_and_no_tile_is_empty(width, itemsize, backward):
    tiling = row_tiling(width, itemsize, backward=backward)
    assert (tiling.tiles - 1) * tiling.block < width <= tiling.tiles * tiling.block
    assert tiling.block & (tiling.block - 1) == tiling.rows & (tiling.rows - 1) == 0
    assert tiling.warps == (BACKWARD_WARPS if backward else FORWARD_WARPS)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 12, 16, 24])
@pytest.mark.parametrize("width", [4, 12, 16, 24, 64, 80, 96, 120, 128, 256])
def test_pieces_cover_every_pair_of_every_head_once(heads, width, backward):
    tiling = head_tiling(heads, width, 2, backward=backward)
    seen: list[tuple[int, int]] = []
    for index, (first, pairs, block, tiles, before) in enumerate(tiling.pieces):
        end = tiling.pieces[index + 1][0] if index + 1 < len(tiling.pieces) else width // 2
        assert end - first <= pairs
        assert before == sum(piece[3] for piece in tiling.pieces[:index])
        assert (tiles - 1) * block < heads <= tiles * block
        # What a piece holds beyond its end must lie beyond the head's, where the kernels mask.
        assert end == width // 2 or first + pairs == end
        seen += [(head, pair) for head in range(heads) for pair in range(first, end)]
    assert sorted(seen) == [(head, pair) for head in range(heads) for pair in range(width // 2)]


@pytest.mark.parametrize(("heads", "width"), [(16, 64), (16, 80), (16, 120), (16, 96), (16, 128)])
def test_the_models_heads_leave_at_most_an_eighth_of_the_lanes_idle(heads, width):
    pieces = head_tiling(heads, width, 2, backward=False).pieces
    lanes = sum(pairs * block * tiles for _, pairs, block, tiles, _ in pieces)
    assert heads * width // 2 <= lanes <= heads * width // 2 * 8 / 7


@pytest.mark.parametrize("width", [1024, 1280, 1920, 2816, 3456, 5120])
def test_the_models_rows_leave_at_most_an_eighth_of_the_lanes_idle(width):
    tiling = row_tiling(width, 2, backward=False)
    assert tiling.block * tiling.tiles <= width * 8 / 7


ROUNDS = {
    **{f"{h} heads of {width}": (5, head_tiling, (h, width)) for h, width in ((16, 64), (16, 80), (24, 80), (16, 120))},
    **{f"{count} rows of {width}": (count, row_tiling, (width,)) for count in (2, 4) for width in (1024, 1280, 1920)},
    **{f"3 rows of {width}": (3, row_tiling, (width,)) for width in (2816, 3456, 5120)},
}
"""What the models' backwards read a round: tensors, and how they are tiled."""


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("read", ROUNDS)
def test_a_backward_reads_ahead_as_far_as_it_must_and_its_gpu_has_room(read, itemsize):
    count, tiling, shape = ROUNDS[read]
    size = count * itemsize * tiling(*shape, itemsize, backward=True).values
    for kilobytes in (99, 163, 227):  # what a program may have on sm_86, sm_80 and sm_90
        depth = stages(size, kilobytes * 1024)
        room = kilobytes * 1024 - SCRATCH_BYTES
        assert (depth - 1) * size <= room
        enough = (depth - 2) * size >= BYTES_IN_FLIGHT
        assert enough or depth * size > room, "another round has room"
        assert (depth - 3) * size < BYTES_IN_FLIGHT, "one round less is enough"
        if kilobytes == 227 or (itemsize == 2 and kilobytes == 163):
            assert enough


def test_rows_too_long_for_shared_memory_are_read_without_it():
    assert stages(300_000, 227 * 1024) == 1
