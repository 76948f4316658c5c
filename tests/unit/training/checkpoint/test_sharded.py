"""A checkpoint's index: one file that rank 0 writes and every reader opens, with few bytes between the ranks."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from univitar_ds.formats import checkpoint_dir, elastic
from univitar_ds.formats.elastic import ElasticReader, read_full
from univitar_ds.training.checkpoint import atomic_dir, sharded
from univitar_ds.training.distributed import process_group
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import ParamShard

RANKS = 256
SHAPES = {f"blocks.{number}.weight": (40, 7) for number in range(5)} | {"bias": (3,)}


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
        pieces=lambda: pieces_of(rank, ranks),
        optimizer_state=lambda: {"updates": 4.0, "groups": [], "global_steps": 4},
    )
    return sharded.save_checkpoint(engine, root, 4, {"a": 1}, {rank: {"packs": rank}}, keep=1)


class Sent(Exception):
    """Ends a rank that has sent its share to rank 0."""


class Messages:
    """Stands in for torch.distributed. The ranks run one after the other: as soon as rank 0 has made the folder, each
    of the others writes and ends when it has sent its share; then rank 0 goes through its save. Counts bytes."""

    def __init__(self, root: Path) -> None:
        self.root, self.rank, self.shares, self.scattered = root, 0, {}, []
        self.received_by_main = 0

    def all_reduce(self, flags):
        if self.rank or self.shares:
            return
        for self.rank in range(1, RANKS):
            with pytest.raises(Sent):
                save(self.rank, RANKS, self.root)
        self.rank = 0

    def all_gather_single(self, into, mine):
        lengths = [len(self.shares[rank]) for rank in range(1, RANKS)] if self.rank == 0 else [int(mine)] * (RANKS - 1)
        into.copy_(torch.tensor([int(mine), *lengths]))
        self.received_by_main += into.nbytes * (self.rank == 0)

    def gather(self, mine, rows, dst):
        assert dst == 0
        if self.rank:
            self.shares[self.rank] = mine.clone()
            raise Sent
        for row, share in zip(rows, [mine, *(self.shares[rank] for rank in range(1, RANKS))], strict=True):
            row[: len(share)] = share
            self.received_by_main += row.nbytes

    def broadcast(self, tensor, src):
        assert (src, self.rank) == (0, 0)

    def scatter(self, mine, rows, src):
        self.scattered.append(sum(row.nbytes for row in rows))
        mine.copy_(rows[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    root.mkdir()
    messages = Messages(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "dist", messages)
        patch.setattr(atomic_dir, "sync", lambda _: None)
        folder = save(0, RANKS, root)
    return SimpleNamespace(folder=folder, messages=messages)


def test_rank_zero_of_256_receives_each_share_once(saved):
    largest = max(map(len, saved.messages.shares.values()))
    assert saved.messages.received_by_main <= 2 * RANKS * (largest + 8), "padded to that of rank 0, with more files"
    (sent,) = saved.messages.scattered
    entry = json.dumps({"rank00000.safetensors": {"bytes": 10**9, "sha256": "0" * 64}})
    assert sent <= RANKS * 4 * len(entry), "the manifest goes to no rank whole"


def test_a_reader_of_256_ranks_opens_one_index(saved, monkeypatch):
    opened, read = [], elastic.read_utf8
    monkeypatch.setattr(elastic, "read_utf8", lambda path: opened.append(path.name) or read(path))
    with ExitStack() as files:
        reader = ElasticReader(saved.folder, files)
        assert opened == ["state.json", "index.json"]
        assert reader.cursors == {rank: {"packs": rank} for rank in range(RANKS)}
        assert reader.shapes == SHAPES | {"fixed": (5,)}
        assert reader.kinds["bias"] == {"fp32": "float32", "exp_avg": "float32"}
    manifest = checkpoint_dir.read_manifest(saved.folder)
    assert len(manifest) == RANKS + 3, "a file of tensors per rank, index.json, state.json and the buffers"
    whole = read_full(saved.folder)
    assert all(torch.equal(whole[name].flatten(), full(name)) for name in SHAPES)
    assert whole["fixed"].tolist() == [0, 1, 2, 3, 4]


def test_an_earlier_checkpoint_with_an_index_per_rank_is_read(saved, tmp_path):
    index = json.loads((saved.folder / "index.json").read_text())
    state = json.loads((saved.folder / "state.json").read_text()) | {"format": 2}
    for path in saved.folder.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    for rank in range(RANKS):
        pieces = {}
        for name, entry in index["pieces"].items():
            start, length = next((part[1:] for part in entry["parts"] if part[0] == rank), (0, 0))
            pieces[name] = {"shape": entry["shape"], "kinds": entry["kinds"], "start": start, "length": length}
        cursors = {str(rank): index["cursors"][str(rank)]}
        atomic_dir.write_json(tmp_path / f"rank{rank:05d}.json", {"pieces": pieces, "cursors": cursors})
    atomic_dir.write_json(tmp_path / "state.json", state)
    with ExitStack() as files:
        reader = ElasticReader(tmp_path, files)
        assert reader.cursors == {rank: {"packs": rank} for rank in range(RANKS)}
        for name in SHAPES:
            assert torch.equal(reader.read(name, "exp_avg").flatten(), -full(name))
        assert reader.read("fixed", "frozen").tolist() == [0, 1, 2, 3, 4]
