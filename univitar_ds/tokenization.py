"""Captions to token ids: a byte-level BPE trained on the captions, or a given tokenizer.json."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from univitar_ds.errors import ConfigError, DataError

_SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
_SMALLEST_VOCAB = 256 + len(_SPECIAL)
_BEGINS = ("[BOS]", "<|startoftext|>", "<s>", "<bos>", "[CLS]")
_ENDS = ("[EOS]", "<|endoftext|>", "</s>", "<eos>", "[SEP]")
_MOST_CHARACTERS = 256
"""Characters of a caption per id of a row; the rest is ignored. The library takes 350 bytes for every character."""
_PADS = ("[PAD]", "<pad>", "<|pad|>")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens. `bos_id` is None for a tokenizer without one; a missing pad is the end id, as in CLIP."""

    pad_id: int
    bos_id: int | None
    eos_id: int
    vocab_size: int


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids: any text can be encoded, case does not matter.

    The same captions, in any order, give the same tokenizer. [PAD] is 0, [BOS] 1, [EOS] 2, [UNK] 3.

    Raises: ConfigError if the vocabulary cannot hold all bytes; DataError without captions.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise ConfigError(
            f"model.text.vocab_size {vocab_size} cannot hold the 256 bytes and {len(_SPECIAL)} special tokens; "
            f"set at least {_SMALLEST_VOCAB}"
        )
    texts = [_encodable(caption) for caption in captions]
    if not texts:
        raise DataError("no captions to train a tokenizer on; check the sources, or name one in model.text.tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, ready for `encode`.

    Raises: ConfigError if the file is missing, broken or has no end-of-text token.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no tokenizer at {path}; name a tokenizer.json, or leave it out to have one trained")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ConfigError(f"{path} is no tokenizer.json that the tokenizers library can read: {error}") from error
    special_ids(tokenizer, str(path))
    return _plain(tokenizer)


def special_ids(tokenizer: Tokenizer, name: str = "the tokenizer") -> SpecialIds:
    """The ids that padding, pooling and the text tower need.

    Raises: ConfigError without an end-of-text token.
    """

    pad, begin, end = _marks(tokenizer)
    if end is None:
        raise ConfigError(f"{name} has none of the end-of-text tokens {', '.join(_ENDS)}; add one of them to it")
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return SpecialIds(end if pad is None else pad, begin, end, vocab_size)


def _marks(tokenizer: Tokenizer) -> tuple[int | None, int | None, int | None]:
    """Ids of pad, begin and end."""

    def first(candidates: tuple[str, ...]) -> int | None:
        return next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None)

    return first(_PADS), first(_BEGINS), first(_ENDS)


def encode(tokenizer: Tokenizer, captions: Sequence[str], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of captions, each from begin to end token; a caption that is too long is truncated but keeps its end
    token.

    Args: captions N; context_length, most ids of a row.
    Returns: ids (N, S) int64, padded to the longest row (S is 1 for N = 0); lengths (N,) int64.
    """
    return padded(tokenizer, token_rows(tokenizer, captions, context_length))


def token_rows(tokenizer: Tokenizer, captions: Sequence[str], context_length: int) -> list[list[int]]:
    """The first half of `encode`: the expensive part, which other threads may run."""
    _, bos_id, eos_id = _marks(tokenizer)  # `special_ids` also makes a dictionary of the whole vocabulary
    assert eos_id is not None, "load_tokenizer refuses a tokenizer without one"
    begin = [] if bos_id is None else [bos_id]
    room = context_length - len(begin) - 1
    assert room >= 0
    most = _MOST_CHARACTERS * context_length
    encoded = tokenizer.encode_batch([_encodable(caption[:most]) for caption in captions], add_special_tokens=False)
    return [[*begin, *one.ids[:room], eos_id] for one in encoded]


def padded(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of `encode`."""
    pad_id, _, eos_id = _marks(tokenizer)
    longest = max(map(len, rows), default=1)
    padding = [eos_id if pad_id is None else pad_id] * longest
    token_ids = torch.tensor([[*row, *padding[len(row) :]] for row in rows], dtype=torch.int64)
    return token_ids.view(len(rows), longest), torch.tensor([len(row) for row in rows], dtype=torch.int64)


def caption_id(caption: str) -> int:
    """A 63-bit number for a caption, the same on every machine; case and runs of blanks do not count."""
    words = " ".join(unicodedata.normalize("NFC", _encodable(caption)).lower().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def _encodable(caption: str) -> str:
    """Replaces halves of surrogate pairs, which JSON may contain but UTF-8 cannot encode."""
    return caption.encode("utf-8", "replace").decode()


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Truncation and padding are done here, and "[EOS]" in a caption is plain text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
