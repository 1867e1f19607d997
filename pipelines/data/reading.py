"""Whether a dataset gives the same examples as before, found out without reading it.

Examples follow from the content of the dataset, the settings, the tokenizer and the packages that read. Where each of
these is known without doubt, their digest names the examples, and a capture that goes on takes those of its archive.
Where anything is in doubt there is no digest, and the dataset is read again: an iterable, a stream, a DataFrame, a
transform that runs while rows are read, a tokenizer of a class of its own, a folder whose README names data elsewhere.

Files are known by name, size, number, and the times of their last changes, of content and of status, to the nanosecond.
"""

from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike, fspath, stat_result
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from residua.capture.identity.provenance import identify_tokenizer
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.sources import dataset_commit, is_at_rest, local_path
from residua.pipelines.data.tokenizer import special_ids
from residua.store.base.canonical import Json, digest_of

_PACKAGES = ("residua", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")
SETTLED_SECONDS = 2
"""A file that changed this short before it was read may change again within one tick of its clock."""

_SAMPLE = "A sample: 12 ducks\n\tdon't fly – 鴨は飛ばない. <s></s> "
_ATTRIBUTES = ("chat_template", "split_special_tokens", "add_bos_token", "add_eos_token", "special_tokens_map")


@dataclass(frozen=True)
class Reading:
    """What examples follow from.

    Attributes:
        digest: Names it.
        content: What the content of the dataset is known by.
        changed_ns: When a file that is read changed last; 0 without files.
    """

    digest: str
    content: Json
    changed_ns: int

    def held(self, source: object, settings: DatasetSettings, began_ns: int) -> bool:
        """Return whether this is what was read from `began_ns` until now, and a later change has another digest."""
        return self.changed_ns < began_ns - SETTLED_SECONDS * 10**9 and _content(source, settings) == (
            self.content,
            self.changed_ns,
        )


def reading_of(
    source: object,
    settings: DatasetSettings,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    model_limit: int | None,
    vocab_size: int | None,
) -> Reading | None:
    """Return what the examples of `source` follow from; None if that is not known without reading it.

    Args:
        source: The dataset, as `residua.pipelines.data.sources.open_rows` takes it.
        settings: How it is read.
        tokenizer: What makes tokens of texts and chats.
        model_limit: Most tokens of an example that the model takes.
        vocab_size: Number of token ids of the model.

    Raises:
        DatasetError: There is no such file or folder, and no such dataset on the hub.
    """
    content = _content(source, settings)
    if content is None or not _is_known(tokenizer):
        return None
    identity, changed_ns = content
    digest = digest_of(
        {
            "content": identity,
            "rules": settings.rules(),
            "split": settings.split,
            "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
            "limits": [model_limit, vocab_size],
            "packages": {name: version(name) for name in _PACKAGES},
        }
    )
    return Reading(digest, identity, changed_ns)


def _content(source: object, settings: DatasetSettings) -> tuple[Json, int] | None:
    """Return what the content of a dataset is known by, and when it changed last."""
    if isinstance(source, str | PathLike):
        path = local_path(source)
        if path is not None:
            return _files(path)
        commit = dataset_commit(fspath(source), settings)
        return None if commit is None else ([fspath(source), settings.subset, commit], 0)
    fingerprint = getattr(source, "_fingerprint", None)
    return (fingerprint, 0) if is_at_rest(source) and isinstance(fingerprint, str) else None


def _files(path: Path) -> tuple[Json, int] | None:
    paths = [path] if path.is_file() else sorted(path.rglob("*"))
    if any(file.is_symlink() and file.is_dir() for file in paths):
        return None  # its files may be read, and are not listed
    if any(file.name == "README.md" and "data_" in file.read_text(errors="replace") for file in paths):
        return None  # data_files and data_dir name data anywhere
    found: list[Json] = []
    changed_ns = 0
    for file in paths:
        if file.is_file():
            status = file.stat()
            found.append([file.relative_to(path.parent).as_posix(), *_status(status)])
            changed_ns = max(changed_ns, status.st_mtime_ns, status.st_ctime_ns)
    return [str(path.absolute()), found], changed_ns


def _status(status: stat_result) -> list[Json]:
    return [status.st_size, status.st_ino, str(status.st_mtime_ns), str(status.st_ctime_ns)]


def _is_known(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether all that a tokenizer does follows from what `_tokenizer` returns."""
    if tokenizer is None:
        return True
    is_theirs = type(tokenizer).__module__.startswith("transformers.")
    return is_theirs and getattr(tokenizer, "backend_tokenizer", None) is not None


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Json]:
    special: list[Json] = [*sorted(special_ids(tokenizer))]
    return {
        "sha256": identify_tokenizer(tokenizer)["sha256"],
        "class": type(tokenizer).__name__,
        "special_ids": special,
        "sample": list(tokenizer(_SAMPLE, verbose=False)["input_ids"]),
        **{name: repr(getattr(tokenizer, name, None)) for name in _ATTRIBUTES},
    }
