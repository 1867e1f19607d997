"""Columns that say what each row is: arrays of one number a row under ``rows/``.

Every archive has token, position and example. An archive of examples with images also says of each row whether it is
text or part of an image, and where in which image.
"""

from collections.abc import Mapping

from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError

ROW_COLUMNS = {"token": "int32", "position": "int32", "example": "int64"}

IMAGE_COLUMNS = {"modality": "int8", "image": "int32", "view": "int32", "patch_row": "int32", "patch_column": "int32"}
"""Columns of archives of examples with images. -1 where a row has no such number: a text token has no patch."""

MODALITIES = ("text", "image", "special")
"""What the numbers of ``modality`` stand for: 0 is a token of text, 1 a patch or what stands for patches, and 2 another
position that the model or the processor adds, such as CLS, a register, BOS or the end of a turn."""

IMAGE_ROW_BYTES = 17
"""Bytes of one row of `IMAGE_COLUMNS`."""

HAS_IMAGES = "images"
"""Key of a plan's ``dataset``: true where examples have images."""


def row_columns_of(dataset: Mapping[str, Json]) -> dict[str, str]:
    """Return the columns of the rows of a plan with this ``dataset``, from name to data type.

    Raises:
        PlanError: The entry about images is not one that Residua writes.
    """
    found = dataset.get(HAS_IMAGES)
    if found is None:
        return ROW_COLUMNS
    if found is not True:
        raise PlanError(f"the plan's dataset has {HAS_IMAGES}: {found!r:.40}, which is true or left out")
    return {**ROW_COLUMNS, **IMAGE_COLUMNS}
