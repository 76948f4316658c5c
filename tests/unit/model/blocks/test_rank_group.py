"""Which numbers of ranks can share an encoder."""

import pytest

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.errors import ConfigError
from univitar_ds.model.blocks.rank_group import check_sizes

ENCODER = EncoderConfig(hidden_size=96, num_hidden_layers=1, num_attention_heads=24, intermediate_size=54)
"""24 heads and a feed-forward width of 36."""


@pytest.mark.parametrize(("tensor", "sequence"), [(1, 24), (2, 12), (3, 8), (4, 6), (6, 2), (12, 1)])
def test_ranks_that_divide_the_heads_and_the_width_are_taken(tensor, sequence):
    check_sizes(ENCODER, tensor, sequence)


@pytest.mark.parametrize(
    ("tensor", "sequence", "words"),
    [
        (8, 1, r"tensor_parallel 8 .* 24 heads and .* width of 36; set it to 1, 2, 3, 4, 6 or 12"),
        (5, 1, r"tensor_parallel 5 "),
        (1, 5, r"sequence_parallel 5 .* 24 heads; set it to 1, 2, 3, 4, 6, 8, 12 or 24"),
        (4, 4, r"sequence_parallel 4 .* 6 of 24 heads .*; set it to 1, 2, 3 or 6"),
    ],
)
def test_others_are_refused_with_those_that_do(tensor, sequence, words):
    with pytest.raises(ConfigError, match=words):
        check_sizes(ENCODER, tensor, sequence)


@pytest.mark.parametrize(
    ("tensor", "sequence", "ranks", "words"),
    [(1, 5, 4, "1, 2 or 4"), (4, 4, 8, "1 or 2"), (5, 1, 8, "1, 2 or 4"), (1, 5, 7, "1")],
)
def test_of_those_that_divide_only_those_that_divide_the_ranks_are_named(tensor, sequence, ranks, words):
    with pytest.raises(ConfigError, match=f"set it to {words}$"):
        check_sizes(ENCODER, tensor, sequence, ranks)
