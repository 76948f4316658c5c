"""Docstrings, comments, messages, help texts and README use plain words: some unclear words are banned."""

import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BANNED = re.compile(
    r"\b(told|tells?|whoever|lets? go|let go|goes? without|bursts?|pictures?|clips?"
    r"|dear(er|est)?|hand-?overs?|for want of"
    r"|stands? for|(as|where) (it|they) stands?|on behind|nobody|somebody|anew|for ever|goes on|says? so)\b(?!\.mp4)",
    re.IGNORECASE,
)
"""`clip` is a cut of a video in the field; ours are whole videos."""
MEANT = re.compile(r"CLIP\b|--clips|\"clips?\"|\bIDR pictures?|groups? of pictures")
"""The model CLIP and its `model_type`, earlier names of options, and pictures as video codecs define them."""
CODEC = {"univitar_ds/data/media/keyframes.py"}
SOURCES = sorted(
    path
    for pattern in ("univitar_ds/**/*.py", "kernels/*.py", "examples/*.py", "slurm/*.py")
    for path in ROOT.glob(pattern)
    if str(path.relative_to(ROOT)) not in CODEC
)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "slurm/README.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))


def texts_of(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every string and comment of a module, or of every line of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return list(enumerate(text.splitlines(), 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT)]


def found_in(text: str) -> list[str]:
    return [found[0] for found in BANNED.finditer(MEANT.sub("", text))]


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_plain_words(path):
    assert [(line, found_in(text)) for line, text in texts_of(path) if found_in(text)] == []


@pytest.mark.parametrize(
    "text", ["Damage is told", "whoever asks", "a picture of 3 px", "the run goes on", "where it stands"]
)
def test_a_banned_word_is_found(text):
    assert found_in(text)


@pytest.mark.parametrize("text", ["CLIP's text tower", "a foretold result", "an IDR picture", "clipping at 1.0"])
def test_other_words_stay(text):
    assert not found_in(text)
