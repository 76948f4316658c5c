"""Errors of names on the Hugging Face hub: each has the remedy of its cause."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from univitar_ds.errors import CheckpointError
from univitar_ds.formats.fetched import from_hub


def answered(kind: type[Exception]) -> Exception:
    """An error of an answer of the hub, without the answer, whose library differs between versions."""
    return kind.__new__(kind, "the hub refuses")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ConnectionError("Name or service not known"),
            r"without a connection .* \(hf download\), and name its folder",
        ),
        (errors.LocalEntryNotFoundError("no cached files"), r"without a connection"),
        (
            answered(errors.GatedRepoError),
            r"accept its terms on https://huggingface\.co/a/b, and log in",
        ),
        (answered(errors.RepositoryNotFoundError), r"check the name; for a private model"),
        (errors.HFValidationError("not owner/name"), r"check the name"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_model_that_cannot_be_fetched_has_the_remedy_of_the_cause(monkeypatch, error, said):
    def fetched(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    with pytest.raises(CheckpointError, match=said):
        from_hub("a/b")
