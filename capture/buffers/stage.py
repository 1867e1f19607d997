"""One stage: host memory for one shard of every site that a process stores, in the dtype that is stored."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from residua.capture.buffers.offload import Landing
from residua.capture.runtime.streams import page_locked
from residua.store.encoding.shard import ShardMemory
from residua.store.format.plan import ROW_COLUMNS, Plan, SitePlan


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a stored data type name."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not a torch dtype")
    return dtype


class Stage:
    """Memory for one shard of every site that this process stores.

    Attributes:
        blocks: Per site its rows, in blocks of equal height one after the other, each (rows, *row shape).
        columns: What each row is.
        n_filled: Rows that were announced.
        landing: The copies from devices that are under way.
    """

    def __init__(
        self,
        plan: Plan,
        n_rows: int,
        *,
        pinned: bool,
        sites: Sequence[SitePlan] | None = None,
        has_columns: bool = True,
    ) -> None:
        self._memory: dict[str, ShardMemory] = {}
        with torch.inference_mode(mode=False):  # or rows that come outside of it could not be copied in
            stored = plan.sites if sites is None else sites
            self.blocks = {site.name: self._allocate(plan, site, n_rows, pinned) for site in stored}
        columns = ROW_COLUMNS if has_columns else {}
        self.columns = {name: np.zeros(n_rows, dtype) for name, dtype in columns.items()}
        self.n_filled = 0
        self.landing = Landing()

    def _allocate(self, plan: Plan, site: SitePlan, n_rows: int, pinned: bool) -> list[torch.Tensor]:
        dtype = torch_dtype(site.dtype)
        if pinned:
            return [_as_tensor(page_locked(n_rows * site.row_bytes), dtype, site.row_shape)]
        spec = site.arrays(plan.rows_per_shard)[0]
        if not ShardMemory.suits(spec):
            # unlike torch, numpy asks the system for large pages, and so for far fewer of them
            return [_as_tensor(np.empty(n_rows * site.row_bytes, np.uint8), dtype, site.row_shape)]
        memory = self._memory[site.name] = ShardMemory(spec, n_rows)
        return [_as_tensor(chunk, dtype, site.row_shape) for chunk in memory.chunks]

    def filled(self, site: str, block: int, n_rows: int) -> None:
        """Take note that `n_rows` rows were just copied to block number `block` of `site`."""
        if site in self._memory:
            self._memory[site].filled(block, n_rows)

    def rows(self, site: str, n_rows: int) -> npt.NDArray[np.generic] | ShardMemory:
        """Return the first `n_rows` rows of `site` in storage dtype, without a copy."""
        if site in self._memory:
            return self._memory[site].first(n_rows)
        buffer = self.blocks[site][0][:n_rows]
        if buffer.dtype == torch.bfloat16:
            return buffer.view(torch.int16).numpy().view("<u2")
        return buffer.numpy()


def _as_tensor(memory: npt.NDArray[np.generic], dtype: torch.dtype, row_shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(memory.reshape(-1).view(np.uint8)).view(dtype).view(-1, *row_shape)
