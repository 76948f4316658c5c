"""Parts have the rows that were added, in files that other libraries read."""

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from univitar_ds.inference.reading import Rows
from univitar_ds.inference.sources import Position, Unit
from univitar_ds.inference.writing import parts

GRIDS = [(1, 2, 3), (2, 2, 2), (1, 1, 1)]


def rows(kind: str, width: int, seed: int) -> Rows:
    count = 15 if kind == "tokens" else 3
    values = np.random.default_rng(seed).standard_normal((count, width), np.float32)
    return Rows(Unit(seed, 0, Position()), [f"k{seed}/{i}" for i in range(3)], GRIDS, values, [])


def write(path, kind: str, units: list[Rows]) -> None:
    part = parts.open_part(path, kind, 4)
    for unit in units:
        part.add(unit)
    assert not path.exists()
    part.finish()


@pytest.mark.parametrize("kind", ["embedding", "mean", "tokens"])
@pytest.mark.parametrize("count", [0, 2])
def test_safetensors(tmp_path, kind, count):
    units = [rows(kind, 4, seed) for seed in range(count)]
    write(tmp_path / "p.safetensors", kind, units)
    found = load_file(tmp_path / "p.safetensors")
    wanted = torch.cat([torch.empty(0, 4), *(torch.from_numpy(unit.values) for unit in units)])
    assert torch.equal(found.pop(kind), wanted)
    if kind == "tokens":
        assert found.pop("offsets").tolist() == [0, 6, 14, 15, 21, 29, 30][: 3 * count + 1]
        assert found.pop("grid_thw").tolist() == [list(grid) for grid in GRIDS] * count
    assert not found
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("kind", ["embedding", "mean", "tokens"])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_parquet(tmp_path, monkeypatch, kind, group_bytes):
    monkeypatch.setattr(parts, "_GROUP_BYTES", group_bytes)
    units = [rows(kind, 4, seed) for seed in range(2)]
    units[1].keys[2] = "no \udcff UTF-8"
    write(tmp_path / "p.parquet", kind, units)
    found = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert found["key"] == ["k0/0", "k0/1", "k0/2", "k1/0", "k1/1", "no \\udcff UTF-8"]
    if kind == "tokens":
        assert found["grid_thw"] == [list(grid) for grid in GRIDS] * 2
        found[kind] = [vector for item in found[kind] for vector in item]
    assert np.array_equal(np.array(found[kind], np.float32), np.concatenate([unit.values for unit in units]))
    assert parquet.ParquetFile(tmp_path / "p.parquet").num_row_groups == (2 if group_bytes == 1 else 1)
    before = (tmp_path / "p.parquet").read_bytes()
    write(tmp_path / "q.parquet", kind, units)
    assert (tmp_path / "q.parquet").read_bytes() == before


@pytest.mark.parametrize("suffix", parts.SUFFIXES)
def test_a_dropped_part_leaves_nothing(tmp_path, suffix):
    part = parts.open_part(tmp_path / f"p{suffix}", "mean", 4)
    part.add(rows("mean", 4, 0))
    part.drop()
    assert list(tmp_path.iterdir()) == []
