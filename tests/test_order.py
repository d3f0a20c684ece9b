"""The data order: every picture once an epoch, the same for any number of processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.trainers.order import Order, read


class Rows:
    """A coupling that tells which rows were asked for."""

    shape = (1,)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: Tensor | list[int]) -> dict[str, Tensor]:
        return {"data": torch.as_tensor(indices).float()[:, None]}


def _positions(order: Order, steps: range) -> Tensor:
    return torch.cat([order.indices(s, m) for s in steps for m in order.micro_batches])


@pytest.mark.parametrize("size, batch", [(10, 4), (7, 3), (5, 12)])
def test_every_epoch_is_a_permutation(size: int, batch: int) -> None:
    seen = _positions(Order(size, batch, seed=3), range(size))  # batch epochs in all
    for epoch in seen.reshape(batch, size):
        assert sorted(epoch.tolist()) == list(range(size))
    first, second = seen.reshape(batch, size)[:2]
    assert not torch.equal(first, second)


def test_processes_share_out_what_one_process_accumulates() -> None:
    alone = Order(100, 24, seed=0, micro_batch_size=4)
    for step in range(9):
        together = {
            micro: order.indices(step, micro)
            for rank in range(3)
            for order in [Order(100, 24, 0, 4, rank, 3)]
            for micro in order.micro_batches
        }
        assert sorted(together) == list(alone.micro_batches)
        for micro, indices in together.items():
            assert torch.equal(indices, alone.indices(step, micro))


def test_the_batch_must_divide() -> None:
    with pytest.raises(FlowkitError, match=r"batch_size 10 must be a multiple of processes \(4\)"):
        Order(100, 10, 0, rank=0, world=4)
    with pytest.raises(FlowkitError, match="micro_batch_size"):
        Order(100, 10, 0, micro_batch_size=3)


def test_worker_processes_read_the_same_rows_in_the_same_order() -> None:
    order = Order(50, 8, seed=1, micro_batch_size=4)
    direct = [rows["data"] for rows in read(Rows(50), order, range(5, 9))]
    workers = [rows["data"] for rows in read(Rows(50), order, range(5, 9), num_workers=2)]
    assert torch.equal(torch.cat(direct), torch.cat(workers))
    assert torch.equal(direct[0][:, 0].long(), order.indices(5, 0))
