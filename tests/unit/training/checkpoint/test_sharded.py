"""The files of a checkpoint: one with tensors for each node and one index, with few bytes between ranks."""

import json
import math
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import nn

from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir, elastic
from univitar_ds.formats.elastic import ElasticReader
from univitar_ds.training.checkpoint import atomic_dir, sharded
from univitar_ds.training.distributed import process_group
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import ParamShard

RANKS, RANKS_OF_NODE = 256, 8
NODES = RANKS // RANKS_OF_NODE
SHAPES = {f"blocks.{number}.weight": (64, 8) for number in range(5)} | {"bias": (3,)}


def full(name: str) -> torch.Tensor:
    return torch.arange(math.prod(SHAPES[name]), dtype=torch.float32) + 1000 * list(SHAPES).index(name)


def pieces_of(rank: int, ranks: int) -> list[ParamShard]:
    """As ZeRO-3 shards parameters, and a frozen one that every rank has in full."""
    found = []
    for name, shape in SHAPES.items():
        each = -(-math.prod(shape) // ranks)
        start = min(rank * each, math.prod(shape))
        values = full(name)[start : start + each]
        found.append(ParamShard(name, shape, start, {"fp32": values, "exp_avg": -values}))
    return [*found, ParamShard("fixed", (5,), 0, {"frozen": torch.arange(5.0)})]


def save(rank: int, ranks: int, root: Path) -> Path:
    module = nn.Module()
    module.register_buffer("mean", torch.ones(3))
    engine = SimpleNamespace(
        world=World(rank, ranks, 0, torch.device("cpu")),
        module=module,
        disk=None,
        pieces=lambda: pieces_of(rank, ranks),
        optimizer_state=lambda: {"updates": 4.0, "groups": [], "global_steps": 4},
    )
    return sharded.save_checkpoint(engine, root, 4, {"a": 1}, {rank: {"packs": rank}}, keep=1)


class Sent(Exception):
    """Ends a rank that has sent its share to rank 0."""


class Messages:
    """Stands in for torch.distributed. First each rank sends the size of its tensors and ends. Then the ranks run one
    after the other: as soon as rank 0 has made the folder, each of the others writes and ends when it has sent its
    share; then rank 0 goes through its save. Counts bytes."""

    def __init__(self, root: Path) -> None:
        self.root, self.rank, self.sizes, self.shares, self.scattered = root, 0, {}, {}, []
        self.received_by_main = 0

    def save(self) -> Path:
        for self.rank in range(RANKS):
            with pytest.raises(Sent):
                save(self.rank, RANKS, self.root)
        self.rank = 0
        return save(0, RANKS, self.root)

    def all_reduce(self, flags, group=None):
        if self.rank or self.shares:
            return
        for self.rank in range(1, RANKS):
            with pytest.raises(Sent):
                save(self.rank, RANKS, self.root)
        self.rank = 0

    def all_gather_single(self, into, mine, group=None):
        if mine.dtype == torch.float64 and len(self.sizes) < RANKS:
            self.sizes[self.rank] = mine.clone()
            raise Sent
        if mine.dtype == torch.float64:
            into.copy_(torch.cat([self.sizes[rank] for rank in range(RANKS)]))
        elif self.rank:
            into.fill_(int(mine))
        else:
            into.copy_(torch.tensor([int(mine), *(len(self.shares[rank]) for rank in range(1, RANKS))]))
        self.received_by_main += into.nbytes * (self.rank == 0)

    def gather(self, mine, rows, dst, group=None):
        assert dst == 0
        if self.rank:
            self.shares[self.rank] = mine.clone()
            raise Sent
        for row, share in zip(rows, [mine, *(self.shares[rank] for rank in range(1, RANKS))], strict=True):
            row[: len(share)] = share
            self.received_by_main += row.nbytes

    def broadcast(self, tensor, src, group=None):
        assert (src, self.rank) == (0, 0)

    def scatter(self, mine, rows, src, group=None):
        self.scattered.append(sum(row.nbytes for row in rows))
        mine.copy_(rows[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    root.mkdir()
    messages = Messages(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "dist", messages)
        patch.setattr(atomic_dir.os, "fsync", lambda _: None)
        patch.setattr(sharded, "_node", lambda: 7000 - messages.rank // RANKS_OF_NODE)
        folder = messages.save()
    return SimpleNamespace(folder=folder, messages=messages)


def test_rank_zero_of_256_receives_each_share_once(saved):
    largest = max(map(len, saved.messages.shares.values()))
    assert saved.messages.received_by_main <= 2 * RANKS * (largest + 8 + 3 * 8), "padded to that of rank 0"
    (sent,) = saved.messages.scattered
    entry = json.dumps(["node00000.safetensors", 10**9, 10**9, "0" * 64])
    assert sent <= RANKS * 4 * len(entry), "the manifest goes to no rank whole"


def test_the_ranks_of_a_node_share_one_file(saved):
    nodes = {f"node{number:05d}.safetensors" for number in range(NODES)}
    alone = {"index.json", "state.json", "buffers.safetensors"}
    assert {path.name for path in saved.folder.iterdir()} == nodes | alone | {checkpoint_dir.MANIFEST}
    manifest = checkpoint_dir.read_manifest(saved.folder)
    assert manifest.keys() == nodes | alone
    for name, entry in manifest.items():
        assert entry["bytes"] == (saved.folder / name).stat().st_size
        end = 0
        for _, offset, size, _ in checkpoint_dir.parts_of(name, entry):
            assert offset == end, "the parts cover the file"
            end += size
        assert end == entry["bytes"]
    with safe_open(saved.folder / "node00003.safetensors", "pt") as file:
        assert sorted(file.keys()) == [f"rank{rank:05d}" for rank in range(24, 32)]
        tensors = load(file.get_tensor("rank00025").numpy().tobytes())
    assert torch.equal(tensors["blocks.2.weight/exp_avg"], -full("blocks.2.weight")[50:52])
    assert elastic.read_full(saved.folder).keys() == SHAPES.keys() | {"fixed", "mean"}


def test_each_of_256_readers_opens_three_files(saved, monkeypatch):
    opened = []
    read, safe = elastic.read_utf8, elastic.safe_open
    monkeypatch.setattr(elastic, "read_utf8", lambda path: opened.append(path.name) or read(path))
    monkeypatch.setattr(elastic, "safe_open", lambda path, kind: opened.append(path.name) or safe(path, kind))
    for rank in range(RANKS):
        opened.clear()
        with ExitStack() as files:
            reader = ElasticReader(saved.folder, files)
            for piece in pieces_of(rank, RANKS)[:5]:
                for kind, values in piece.tensors.items():
                    target = torch.empty_like(values)
                    reader.fill(piece.name, kind, piece.start, target)
                    assert torch.equal(target, values)
        assert opened == ["state.json", "index.json", f"node{rank // RANKS_OF_NODE:05d}.safetensors"]
    assert reader.cursors == {rank: {"packs": rank} for rank in range(RANKS)}
    assert reader.shapes == SHAPES | {"fixed": (5,)}
    assert reader.kinds["bias"] == {"fp32": "float32", "exp_avg": "float32"}


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ""])
def test_an_index_that_names_a_file_elsewhere_is_refused(saved, tmp_path, name):
    index = json.loads((saved.folder / "index.json").read_text()) | {"files": {name: [0]}}
    atomic_dir.write_json(tmp_path / "index.json", index)
    shutil.copy(saved.folder / "state.json", tmp_path)
    with ExitStack() as files, pytest.raises(CheckpointError, match="is not in the folder of the checkpoint"):
        ElasticReader(tmp_path, files)


@pytest.mark.parametrize("slices", [[0, 2], [1, 0], [7, 1000], [1], "ab", None])
def test_an_index_whose_slices_do_not_cover_the_parameter_is_refused(saved, tmp_path, slices):
    index = json.loads((saved.folder / "index.json").read_text())
    next(iter(index["pieces"].values()))["slices"] = slices
    atomic_dir.write_json(tmp_path / "index.json", index)
    shutil.copy(saved.folder / "state.json", tmp_path)
    with ExitStack() as files, pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        ElasticReader(tmp_path, files)


@pytest.mark.parametrize("form", [2, 3])
def test_earlier_checkpoints_with_a_file_per_rank_are_read(saved, tmp_path, form):
    index = json.loads((saved.folder / "index.json").read_text())
    del index["files"]
    state = json.loads((saved.folder / "state.json").read_text()) | {"format": form}
    shutil.copy(saved.folder / "buffers.safetensors", tmp_path)
    for path in saved.folder.glob("node*"):
        for rank, content in load_file(path).items():
            (tmp_path / f"{rank}.safetensors").write_bytes(content.numpy().tobytes())
    for rank in range(RANKS) if form == 2 else ():
        pieces = {}
        for name, entry in index["pieces"].items():
            start, length = next((part[1:] for part in entry["parts"] if part[0] == rank), (0, 0))
            pieces[name] = {"shape": entry["shape"], "kinds": entry["kinds"], "start": start, "length": length}
        cursors = {str(rank): index["cursors"][str(rank)]}
        atomic_dir.write_json(tmp_path / f"rank{rank:05d}.json", {"pieces": pieces, "cursors": cursors})
    if form == 3:
        atomic_dir.write_json(tmp_path / "index.json", index)
    atomic_dir.write_json(tmp_path / "state.json", state)
    with ExitStack() as files:
        reader = ElasticReader(tmp_path, files)
        assert reader.cursors == {rank: {"packs": rank} for rank in range(RANKS)}
        for name in SHAPES:
            assert torch.equal(reader.read(name, "exp_avg").flatten(), -full(name))
        assert reader.read("fixed", "frozen").tolist() == [0, 1, 2, 3, 4]
