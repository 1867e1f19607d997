"""The layouts of one model's sites, each proved when it is met first, and held to afterwards."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from residua.capture.layout.layouts import Layout, Shape, detect
from residua.capture.runtime.collectives import on_rank
from residua.store.base.errors import CaptureError


class ProvedLayouts:
    """Remembers how the sites of one model replica lie over the ranks that hold it."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[str, bool], Layout] = {}

    def of(
        self, name: str, local: Tensor, whole: Shape | None, group: ProcessGroup, *, is_gradient: bool = False
    ) -> Layout:
        """Return how a tensor lies; the first time all ranks of the group find out together.

        Args:
            name: The site.
            local: What this rank has.
            whole: Shape in the unsharded model, if it is known.
            group: The ranks that share the model's activations.
            is_gradient: Whether it is the gradient; its layout is proved by itself.

        Raises:
            CaptureError: Nothing can be proved, or the tensor lies otherwise than the first one did.
        """
        key = (name, is_gradient)
        known = self._layouts.get(key)
        if known is None or (known.dim is not None and whole is not None and whole[known.dim] != sum(known.sizes)):
            known = self._layouts[key] = detect(name, local, whole, group)
        if not known.fits(local, whole, dist.get_rank(group)):
            raise CaptureError(
                f"Site {name!r}{on_rank()} has shape {list(local.shape)} and lay otherwise on the first batch; the "
                f"whole would be {list(whole or ())}. Tap batches of different layout in contexts of their own."
            )
        return known
