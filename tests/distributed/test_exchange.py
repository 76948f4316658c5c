"""The contrastive losses over several ranks: values, gradients, kernels and messages."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from tests.support.closeness import assert_sums_close
from tests.support.distributed import run_distributed
from tests.support.messages import counted, fake_process_group
from tests.unit.objectives.test_losses import BIAS, DENSE, SCALE, dense_gradients, embeddings, terms
from univitar_ds.objectives.exchange import GATHERED_BYTES, Exchange
from univitar_ds.objectives.sigmoid import sigmoid_loss
from univitar_ds.objectives.softmax import softmax_loss
from univitar_ds.training.distributed.process_group import start_world

pytestmark = [pytest.mark.distributed, pytest.mark.numeric]
CASES = [
    ((3, 5), False),
    ((0, 4), False),
    ((4, 0), True),
    ((0, 0), False),
    ((6, 1), True),
    ((3, 0, 5, 2), False),
    ((0, 0, 4, 1), True),
    ((2, 7, 1, 3), True),
    ((0, 0, 0, 0), True),
]


def on_this_rank(loss_of, cases, limit):
    world = start_world()
    results = []
    for counts, same in cases:
        vision, text, ids = embeddings(sum(counts), captions=3)
        own = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
        exchange = Exchange(counts[world.rank], world.device, limit=limit)
        inputs = vision[own], text[own], SCALE, BIAS, ids[own]
        result = loss_of(*inputs, chunk=2, same_caption_positive=same, exchange=exchange)
        shared = torch.cat([result.scale_grad, result.bias_grad])
        dist.all_reduce(shared)
        results.append((result.loss, result.items, result.vision_grad.tolist(), result.text_grad.tolist(), shared))
    return [(loss, n, v, t, shared.tolist()) for loss, n, v, t, shared in results]


@pytest.mark.parametrize("loss_of", DENSE)
@pytest.mark.parametrize(("size", "limit"), [(2, GATHERED_BYTES), (4, GATHERED_BYTES), (2, 1), (4, 900), (4, 1)])
def test_ranks_with_different_numbers_of_items_have_the_dense_loss_and_gradients(loss_of, size, limit):
    """With 900 bytes, texts of one rank of both groups or of two ranks of one fit; with 1 byte no rank has a group."""
    cases = [case for case in CASES if len(case[0]) == size]
    by_rank = run_distributed(on_this_rank, size, loss_of, cases, limit)
    for number, (counts, same) in enumerate(cases):
        vision, text, ids = embeddings(sum(counts), captions=3)
        loss, grads = dense_gradients(loss_of, vision, text, SCALE, BIAS, ids if same else None)
        answers = [results[number] for results in by_rank]
        assert {answer[1] for answer in answers} == {sum(counts)}
        assert len({answer[0] for answer in answers}) == 1, "ranks disagree on the loss"
        assert_sums_close(answers[0][0], loss, terms(sum(counts)), "loss")
        ours = [[row for answer in answers for row in answer[place]] for place in (2, 3)] + [[x] for x in answers[0][4]]
        for got, wanted in zip(ours, grads, strict=True):
            got = torch.tensor(got, dtype=torch.float32).reshape(wanted.shape)
            assert_sums_close(got, wanted, terms(sum(counts)), "gradient")


MESSAGES = {loss_of: 6 if loss_of is softmax_loss else 4 for loss_of in DENSE}
"""Messages: counts, texts, their gradients, the loss; for softmax also two of the normalizers of columns."""
KINDS = [(loss_of, same) for loss_of in DENSE for same in (False, True)]


def spent(loss_of, same, vision, text, ids, chunk):
    """Kernels and messages of a step, as dictionaries."""
    found = counted(loss_of, vision, text, SCALE, BIAS, ids, chunk=chunk, same_caption_positive=same)
    return dict(found.kernels), dict(found.messages)


def spent_on_this_rank(counts):
    world = start_world()
    vision, text, ids = embeddings(sum(counts), captions=3)
    own = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
    return [spent(*kind, vision[own], text[own], ids[own], 5) for kind in KINDS]


def test_kernels_depend_on_the_number_of_texts_and_the_chunk_and_not_on_the_ranks():
    (alone,) = run_distributed(spent_on_this_rank, 1, (21,))
    for counts in ((4, 17), (9, 1, 3, 8)):
        for rank in run_distributed(spent_on_this_rank, len(counts), counts):
            for (loss_of, _), (ours, messages), (theirs, none) in zip(KINDS, rank, alone, strict=True):
                assert none == {}
                assert sum(messages.values()) == MESSAGES[loss_of]
                assert ours == theirs | {"copy_": theirs.get("copy_", 0) + 1}  # in gloo's reduce-scatter


PER_CHUNK = {
    (sigmoid_loss, False): {"mm": 2, "neg_": 2, "softplus": 1, "sum": 1, "sigmoid_": 1, "addmm_": 1},
    (sigmoid_loss, True): {"mm": 2, "eq": 1, "addcmul_": 2, "softplus": 1, "sum": 1, "sigmoid_": 1, "addmm_": 1},
    (softmax_loss, False): {"mm": 1, "logsumexp": 2, "logaddexp": 1, "addmm_": 3, "exp_": 1},
    (softmax_loss, True): {"mm": 1, "logsumexp": 2, "logaddexp": 1, "addmm_": 3, "exp_": 1},
}
"""Kernels of a chunk in plain torch on a CPU, of the loss and of its gradients."""


@pytest.mark.parametrize("kind", PER_CHUNK, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}")
def test_a_chunk_has_at_most_eight_kernels(kind):
    """Counts operations of torch that compute, also those that write into given memory; nine with the comparison of
    captions of the sigmoid loss."""
    vision, text, ids = embeddings(24, captions=3)
    kernels = [Counter(spent(*kind, vision, text, ids, 24 // chunks)[0]) for chunks in (2, 6)]
    found = {name: count / 4 for name, count in (kernels[1] - kernels[0]).items()}
    assert found == PER_CHUNK[kind]
    assert sum(found.values()) - found.get("eq", 0) <= 8


def costs_in_fake_process_groups():
    found = []
    for size in (8, 64, 1024):
        vision, text, ids = embeddings(1024 // size)
        with fake_process_group(size, rank=size - 1):
            found.append([spent(*kind, vision, text, ids, 128) for kind in KINDS])
    return found


def test_a_thousand_ranks_have_as_many_kernels_and_messages_as_eight():
    eight, *others = run_distributed(costs_in_fake_process_groups, 1)[0]
    assert all(other == eight for other in others)
    for (loss_of, _), (kernels, messages) in zip(KINDS, eight, strict=True):
        assert sum(messages.values()) == MESSAGES[loss_of]
        assert sum(kernels.values()) > 8 * 4  # eight chunks


def run_twice(counts):
    world = start_world()
    vision, text, ids = embeddings(sum(counts), captions=3)
    own = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
    inputs = (vision[own], text[own], SCALE, BIAS, ids[own])
    twice = [[loss_of(*inputs, chunk=2, same_caption_positive=same) for loss_of, same in KINDS] for _ in range(2)]
    return [
        [(r.loss, r.vision_grad.tolist(), r.text_grad.tolist(), r.scale_grad.item()) for r in once] for once in twice
    ]


def test_the_same_step_on_the_same_ranks_has_the_same_bits():
    for one, two in run_distributed(run_twice, 4, (6, 0, 3, 9)):
        assert one == two


def groups_on_this_rank(limits):
    world = start_world()
    exchange = [Exchange((3, 0, 5, 2)[world.rank], world.device, limit=limit) for limit in limits]
    return [one.blocks(torch.zeros(one.counts[world.rank], 16)).groups for one in exchange]


def test_texts_that_are_too_many_for_one_rank_are_gathered_in_as_few_groups_as_fit():
    """A row has 64 bytes, and a message has as many rows as the rank with the most: four times 5, or twice."""
    for rank in run_distributed(groups_on_this_rank, 4, [4 * 5 * 64, 4 * 5 * 64 - 1, 2 * 5 * 64, 2 * 5 * 64 - 1, 1]):
        assert rank == [1, 2, 2, 4, 4]
