"""Write LM heads to a folder, without an archive around them."""

from pathlib import Path

from torch import nn

from residua.capture.identity.lm_head import lm_head_files
from residua.store.storage.files import write_file


def save_lm_head(model: nn.Module, folder: Path) -> bool:
    """Write the LM head of a model, and return whether the model has one."""
    files = lm_head_files(model)
    for name, content in files.items():
        write_file(folder / name, content)
    return bool(files)
