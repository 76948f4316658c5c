import pytest
import torch
import torch.distributed as dist

from tests.support.closeness import assert_sums_close
from tests.support.distributed import run_distributed
from tests.unit.objectives.test_losses import BIAS, DENSE, SCALE, dense_gradients, embeddings, terms
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


def on_this_rank(loss_of, cases):
    world = start_world()
    results = []
    for counts, same in cases:
        vision, text, ids = embeddings(sum(counts), captions=3)
        own = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
        result = loss_of(vision[own], text[own], SCALE, BIAS, ids[own], chunk=2, same_caption_positive=same)
        shared = torch.cat([result.scale_grad, result.bias_grad])
        dist.all_reduce(shared)
        results.append((result.loss, result.items, result.vision_grad.tolist(), result.text_grad.tolist(), shared))
    return [(loss, n, v, t, shared.tolist()) for loss, n, v, t, shared in results]


@pytest.mark.parametrize("loss_of", DENSE)
@pytest.mark.parametrize("size", [2, 4])
def test_ragged_ranks_together_have_the_dense_loss_and_gradients(loss_of, size):
    cases = [case for case in CASES if len(case[0]) == size]
    by_rank = run_distributed(on_this_rank, size, loss_of, cases)
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
