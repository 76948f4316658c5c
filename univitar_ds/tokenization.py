"""Encodes captions as token ids, with a byte-level BPE trained on the captions or a given tokenizer.json."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from univitar_ds.errors import ConfigError, DataError

_SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
_SMALLEST_VOCAB = 256 + len(_SPECIAL)
_BEGINS = ("[BOS]", "<|startoftext|>", "<s>", "<bos>", "[CLS]")
_ENDS = ("[EOS]", "<|endoftext|>", "</s>", "<eos>", "[SEP]")
_CHARACTERS_PER_ID = 256
"""Maximum characters of a caption per id of `context_length`, since `tokenizers` takes 350 bytes of memory for each."""
_PADS = ("[PAD]", "<pad>", "<|pad|>")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens, and the size of the vocabulary.

    `bos_id` is None if the tokenizer has no begin token. `pad_id` is `eos_id` if it has no pad token, as in CLIP.
    """

    pad_id: int
    bos_id: int | None
    eos_id: int
    vocab_size: int

    @property
    def of_text_model(self) -> dict[str, int]:
        """The vocabulary as keyword arguments, with which a text tower is built."""
        return {"vocab_size": self.vocab_size, "eos_id": self.eos_id, "pad_id": self.pad_id}


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with at most `vocab_size` ids, which encodes any text and ignores case.

    The tokenizer does not depend on the order of the captions. [PAD] is 0, [BOS] 1, [EOS] 2, [UNK] 3.

    Raises: ConfigError if `vocab_size` is too small for all bytes and special tokens; DataError if `captions` is empty.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise ConfigError(
            f"model.text.vocab_size {vocab_size} cannot hold the 256 bytes and {len(_SPECIAL)} special tokens; "
            f"set at least {_SMALLEST_VOCAB}"
        )
    texts = [_encodable(caption) for caption in captions]
    if not texts:
        raise DataError("no captions to train a tokenizer on; check the sources, or set model.text.tokenizer")
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
    """Reads a tokenizer.json for `encode`.

    Raises: ConfigError if the file is missing, cannot be read or has no end-of-text token.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no tokenizer at {path}; name a tokenizer.json, or leave it out to have one trained")
    return _usable(Tokenizer.from_file, str(path), str(path))


def tokenizer_of(text: str, name: str = "the model's tokenizer.json") -> Tokenizer:
    """Returns the tokenizer with this content of tokenizer.json, for `encode`.

    Args: name: name of the file in the message.
    Raises: ConfigError as `load_tokenizer`.
    """
    return _usable(Tokenizer.from_str, text, name)


def _usable(parse: Callable[[str], Tokenizer], source: str, name: str) -> Tokenizer:
    try:
        tokenizer = parse(source)
    except Exception as error:  # the library raises a plain Exception for what it cannot parse
        raise ConfigError(
            f"{name} is not a tokenizer.json that the tokenizers library can read: {error}; fetch it again, or name "
            "another"
        ) from error
    special_ids(tokenizer, name)
    return _plain(tokenizer)


def special_ids(tokenizer: Tokenizer, name: str = "the tokenizer") -> SpecialIds:
    """Returns the ids that padding, pooling and the text tower need.

    Args: name: name of the tokenizer in the message.
    Raises: ConfigError if the tokenizer has no end-of-text token.
    """

    pad, begin, end = _special_token_ids(tokenizer)
    if end is None:
        raise ConfigError(f"{name} has none of the end-of-text tokens {', '.join(_ENDS)}; add one of them to it")
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return SpecialIds(end if pad is None else pad, begin, end, vocab_size)


def _special_token_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None, int | None]:
    """Returns the ids of pad, begin and end; None for a missing token."""

    def first(candidates: tuple[str, ...]) -> int | None:
        return next((i for i in map(tokenizer.token_to_id, candidates) if i is not None), None)

    begin, end = first(_BEGINS), first(_ENDS)
    if tokenizer.post_processor is not None:
        added = tokenizer.encode("", add_special_tokens=True).ids
        if end in added and begin not in added:  # SigLIP 2 has a begin token and does not use it
            begin = None
    return first(_PADS), begin, end


def encode(tokenizer: Tokenizer, captions: Sequence[str], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes captions, each with begin and end token. Long captions are truncated but keep the end token.

    Args: captions: N texts; context_length: maximum number of ids of a row.
    Returns: ids (N, S) int64, padded to the longest row (S is 1 if N is 0); lengths (N,) int64.
    """
    return padded(tokenizer, token_rows(tokenizer, captions, context_length))


def token_rows(tokenizer: Tokenizer, captions: Sequence[str], context_length: int) -> list[list[int]]:
    """Returns the ids of each caption, without padding. This is the expensive part of `encode`, safe in any thread."""
    _, bos_id, eos_id = _special_token_ids(tokenizer)  # `special_ids` would copy the vocabulary
    assert eos_id is not None, "load_tokenizer refuses a tokenizer without one"
    begin = [] if bos_id is None else [bos_id]
    room = context_length - len(begin) - 1
    assert room >= 0
    limit = _CHARACTERS_PER_ID * context_length
    encoded = tokenizer.encode_batch([_encodable(caption[:limit]) for caption in captions], add_special_tokens=False)
    return [[*begin, *one.ids[:room], eos_id] for one in encoded]


def padded(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows of ids. Returns ids (N, S) and lengths (N,) as `encode` does."""
    pad_id, _, eos_id = _special_token_ids(tokenizer)
    longest = max(map(len, rows), default=1)
    padding = [eos_id if pad_id is None else pad_id] * longest
    token_ids = torch.tensor([[*row, *padding[len(row) :]] for row in rows], dtype=torch.int64)
    return token_ids.view(len(rows), longest), torch.tensor([len(row) for row in rows], dtype=torch.int64)


def caption_id(caption: str) -> int:
    """Returns a 63-bit hash of a caption, equal on every machine. Ignores case and repeated whitespace."""
    text = caption if caption.isascii() else unicodedata.normalize("NFC", _encodable(caption))
    words = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def _encodable(caption: str) -> str:
    """Replaces halves of surrogate pairs, which JSON may contain but UTF-8 cannot encode."""
    return caption.encode("utf-8", "replace").decode()


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Turns off truncation, padding and the parsing of special tokens in captions. Returns the tokenizer."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
