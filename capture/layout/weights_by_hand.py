"""Whole weights of a model that was split by hand: which of them are parts, and of what, is proved and not guessed.

A plain tensor does not say that it is a part. The unsharded twin says what shape the whole has; the ranks say what
shape and values each has of it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from residua.capture.layout.gather import gathered
from residua.capture.layout.layouts import Layout, Part, Shape
from residua.capture.runtime.collectives import everyones
from residua.capture.runtime.devices import with_values
from residua.capture.runtime.process_groups import group_by_hand
from residua.capture.runtime.sharded import whole
from residua.capture.sites.reference_model import whole_weights
from residua.store.storage.crc import crc32c


class Weights:
    """Gives weights of one model as wholes; each question is a collective of those that hold it.

    Args:
        model: Any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._group = group_by_hand(model)
        self._shapes = {} if self._group is None else whole_weights(model)

    def whole(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a weight as a whole, detached; None if the ranks have parts of it and it is not known how.

        Args:
            name: Its name in the bare model.
            tensor: What this process has of it.
        """
        if self._group is None or isinstance(tensor, DTensor):
            return whole(with_values(self._model, name, tensor))
        local = tensor.detach()
        layout = understood(self._told(local, self._group), self._shapes.get(name))
        return None if layout is None else gathered(local, layout, self._group)

    def parts(self, tensor: Tensor) -> list[tuple[Shape, int]]:
        """Return shape and crc32c of what each rank has, in their order."""
        return [(part.shape, part.checksum) for part in self._told(tensor.detach(), self._group)]

    def _told(self, local: Tensor, group: ProcessGroup | None) -> list[Part]:
        checksum = crc32c(local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return everyones(group, Part(dist.get_rank(), tuple(local.shape), str(local.dtype), checksum))


def understood(parts: list[Part], shape: Shape | None) -> Layout | None:
    """Return how a weight lies from what the ranks say of it and the shape of the whole; None if that does not tell."""
    shapes = [part.shape for part in parts]
    if len({(part.shape, part.dtype, part.checksum) for part in parts}) == 1 and shape in (None, shapes[0]):
        return Layout()
    if shape is None or {len(part) for part in shapes} != {len(shape)}:
        return None
    split = [axis for axis, size in enumerate(shape) if any(part[axis] != size for part in shapes)]
    if len(split) != 1:
        return None
    sizes = tuple(part[split[0]] for part in shapes)
    return Layout(split[0], sizes) if sum(sizes) == shape[split[0]] else None
