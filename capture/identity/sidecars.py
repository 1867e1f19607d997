"""What an archive has of the model besides activations, in its `head` folder, so that analyses need no model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from residua.capture.identity.attention_facts import attention_files
from residua.capture.identity.lm_head import head_files
from residua.store.storage.crc import Buffer
from residua.store.storage.files import write_file

Files = dict[str, list[Buffer]]


def files_beside(model: nn.Module, sites: Iterable[str], *, head: bool) -> Files:
    """Return the files by name; of a model that is spread over several processes this is a collective of them all.

    Args:
        model: The model.
        sites: Names of the sites that are stored.
        head: Whether the final norm and the unembedding are wanted too.
    """
    attention: Files = {name: [content] for name, content in attention_files(model, sites).items()}
    return {**(head_files(model) if head else {}), **attention}


def write_beside(archive: Path, files: Mapping[str, Sequence[Buffer]]) -> None:
    """Write the files to an archive that is being made."""
    for name, content in files.items():
        write_file(archive / "head" / name, content)
