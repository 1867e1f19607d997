"""Which blocks of a run are looked at: those of one residual stream, of one shape."""

import pytest
import torch
from torch import Tensor, nn

from residua.capture.blocks.block_run import BlockWatch


class Merging(nn.Module):
    """A stage that makes one position of two, or leaves them."""

    def __init__(self, *, merges: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.merges = merges

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.linear(hidden)
        return hidden[:, ::2] if self.merges else hidden


@pytest.mark.parametrize(
    ("merges", "looked_at"),
    [((False, False, False), [0, 1, 2]), ((True, True, False), []), ((False, True, False), [0])],
)
def test_blocks_of_one_stream_are_looked_at(merges: tuple[bool, ...], looked_at: list[int]) -> None:
    blocks = nn.ModuleList(Merging(merges=each) for each in merges)
    seen: list[tuple[str, int]] = []
    watch = BlockWatch(
        {str(number): block for number, block in enumerate(blocks)},
        [str(number) for number in range(3)],
        lambda run: seen.append((run.path, run.entered.shape[1])),
    )
    hidden = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    with watch, torch.no_grad():
        for block in blocks:
            hidden = block(hidden)
    assert seen == [(str(number), 8) for number in looked_at]
