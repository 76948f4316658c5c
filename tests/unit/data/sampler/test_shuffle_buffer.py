"""The shuffle buffer of a stream."""

import random
from types import SimpleNamespace

import pytest

from univitar_ds.data.sampler.shuffle_buffer import ShuffleBuffer
from univitar_ds.data.shards.samples import SampleAddress


def sample(offset, *, draw=0, since=0, epoch=0, tokens=1):
    address = SampleAddress(0, offset, 1, offset, epoch, since)
    return SimpleNamespace(address=address, draw=draw, tokens=tokens)


@pytest.fixture
def numbers():
    return random.Random(3)


def test_the_order_is_that_of_exact_integers(numbers):
    packs = 1000
    samples = [sample(n, draw=numbers.getrandbits(64), since=numbers.randint(0, packs)) for n in range(500)]
    factor = numbers.getrandbits(64) | 1

    def rank(index):
        one = samples[index]
        return (one.draw * factor % 2**64) / (packs + 1 - one.address.since) ** 2

    assert ShuffleBuffer(samples).shuffled(factor, packs) == sorted(range(500), key=rank)


def test_a_sample_that_waited_longer_tends_to_be_earlier(numbers):
    buffer = ShuffleBuffer([sample(n, draw=numbers.getrandbits(64), since=0 if n else 90) for n in range(2)])
    first = [buffer.shuffled(numbers.getrandbits(64) | 1, packs=100)[0] for _ in range(200)]
    assert first.count(1) > 150


def test_taken_samples_leave_every_column(numbers):
    samples = [sample(n, draw=numbers.getrandbits(64), tokens=n + 1) for n in range(50)]
    buffer = ShuffleBuffer(samples)
    taken = buffer.take([7, 3, 40])
    assert [one.address.offset for one in taken] == [7, 3, 40]
    left = ShuffleBuffer([one for one in samples if one not in taken])
    assert list(buffer) == list(left)
    assert (buffer.tokens, buffer.addresses, buffer.total_tokens) == (left.tokens, left.addresses, left.total_tokens)
    assert buffer.shuffled(5, 9) == left.shuffled(5, 9)
    buffer.append(sample(3))
    assert list(buffer.without_repeats()) == list(range(48))


def test_the_newer_of_two_is_left_out():
    buffer = ShuffleBuffer([sample(10), sample(20), sample(10, epoch=1), sample(30, epoch=1), sample(20, epoch=1)])
    assert list(buffer.without_repeats()) == [0, 1, 3]
    buffer.take([0])
    assert list(buffer.without_repeats()) == [0, 1, 2]
