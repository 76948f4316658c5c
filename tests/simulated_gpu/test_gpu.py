"""What the simulated GPU rejects, what it records as a wait, and the values that it returns."""

import json

import pytest

from tests.support.simulated_gpu.environment import run_simulated

pytestmark = pytest.mark.slow
REFUSED = {
    "two devices": "at least two devices",
    "a kernel with a weight on the host": "cpu tensor",
    "a collective on the host": "NCCL sends only from GPUs",
    **{f"{name} in float32": "float32" for name in ("flash2", "flash3", "flash4")},
    **{f"{name}, cu_seqlens_q in int64": "torch.int64" for name in ("flash2", "flash3", "flash4")},
    **{f"{name}, max_seqlen_q on the device": "max_seqlen_q" for name in ("flash2", "flash3", "flash4")},
}
ANSWERED = {
    "an addition on the device": "cuda:0",
    "a kernel": "cuda:0",
    "reading a number": 7,
    "reading a list": [3, 4],
    "a number whose value is not known": 1.0,
    "a pinned copy": "cuda:0",
    "a pageable copy": "cuda:0",
    "a copy that waits": "cuda:0",
    "a sum over 8 ranks": [24, 32],
}
WAITS = {
    "a kernel": [],
    "reading a number": ["read elsewhere"],
    "reading a list": ["copy to the host elsewhere"],
    "a pinned copy": [],
    "a pageable copy": ["copy from pageable memory elsewhere"],
    "a copy that waits": ["copy to the device elsewhere"],
}


@pytest.fixture(scope="module")
def answers(environment):
    done = run_simulated("tests.support.simulated_gpu.refusals")
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(answers, name):
    assert REFUSED[name] in answers[name].get("error", f"accepted: {answers[name]}")


@pytest.mark.parametrize("name", ANSWERED)
def test_what_a_gpu_does_is_done_and_small_values_from_the_host_stay_known(answers, name):
    assert answers[name].get("result", answers[name]) == ANSWERED[name]


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_recorded_and_nothing_else_is(answers, name):
    assert answers[name]["waits"] == WAITS[name]


@pytest.mark.parametrize(("loss_of", "kernels"), [("sigmoid_loss", 4), ("softmax_loss", 7)])
def test_a_chunk_of_texts_takes_few_kernels(answers, loss_of, kernels):
    """Two matrix products of the gradients, one of the logits, and the loss; softmax has normalizers too."""
    assert answers[loss_of]["kernels_of_a_chunk"] == kernels
