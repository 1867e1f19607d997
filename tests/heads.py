"""Heads written into folders of their own, without an archive around them."""

from pathlib import Path

from torch import nn

from residua.capture.identity.lm_head import lm_head_files
from residua.store.storage.files import write_file


def save_head(model: nn.Module, folder: Path) -> bool:
    """Write the head of a model; say whether it has one."""
    files = lm_head_files(model)
    for name, content in files.items():
        write_file(folder / name, content)
    return bool(files)
