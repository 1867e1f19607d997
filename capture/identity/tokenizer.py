"""The tokenizer that goes into an archive, so that rows can be shown as text without the model."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from residua.store.base.canonical import Json, digest_of
from residua.store.storage.files import write_file


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of `tokenizer` to `folder`, durably.

    Raises:
        OSError: A file could not be written; the message says where and why.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library raises plain Exception, for example when the disk is full
        raise OSError(
            f"cannot write the tokenizer to {folder} ({error}): free some space there, or choose another place"
        ) from error
    for path in sorted(folder.iterdir()):
        write_file(path, [path.read_bytes()])


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Json]:
    """Return the name of a tokenizer and the SHA-256 of its vocabulary and rules (of its vocabulary, if it is slow)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        content = {name: part for name, part in content.items() if name not in ("padding", "truncation")}
    return {"id": tokenizer.name_or_path, "sha256": digest_of(content)}
