"""Block orders: nested sets of blocks, and what is refused."""

from __future__ import annotations

import pytest

from pacevlm.errors import KnobError
from pacevlm.models.block_order import BlockOrder

ORDERS = [BlockOrder(16, (4, 13, 10, 2)), BlockOrder(6, (5, 1, 3, 2, 4)), BlockOrder.early_exit(6), BlockOrder(3, ())]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_sets_are_nested_and_keep_the_first_block(order: BlockOrder) -> None:
    wider = tuple(range(order.num_blocks))
    for num_blocks in range(order.num_blocks, order.num_blocks - len(order.removal) - 1, -1):
        kept = order.kept(num_blocks)
        assert len(kept) == num_blocks
        assert kept[0] == 0
        assert list(kept) == sorted(kept)
        assert set(kept) <= set(wider)
        wider = kept


def test_blocks_go_in_the_order_of_removal() -> None:
    order = BlockOrder(6, (4, 2, 3))
    assert [order.kept(n) for n in (6, 5, 4, 3)] == [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 5), (0, 1, 3, 5), (0, 1, 5)]


@pytest.mark.parametrize("num_blocks", range(1, 7))
def test_prefix_order_is_early_exit(num_blocks: int) -> None:
    assert BlockOrder.early_exit(6).kept(num_blocks) == tuple(range(num_blocks))


@pytest.mark.parametrize("removal", [(0,), (1, 1), (6,), (-1,), (3, 0)])
def test_bad_orders_are_refused(removal: tuple[int, ...]) -> None:
    with pytest.raises(KnobError, match=r"1\.\.5"):
        BlockOrder(6, removal)


@pytest.mark.parametrize("num_blocks", [0, 3, 7])
def test_a_number_of_blocks_outside_the_order_is_refused(num_blocks: int) -> None:
    with pytest.raises(KnobError, match="4 to 6"):
        BlockOrder(6, (4, 2)).kept(num_blocks)


def test_blocks_that_always_run_cannot_be_dropped() -> None:
    order = BlockOrder(6, (4, 1, 2))
    order.check_space([5, 6], stage2_after=3)
    order.check_space([4, 5, 6], stage2_after=1)
    with pytest.raises(KnobError, match=r"\[1\]"):
        order.check_space([6, 4, 5], stage2_after=2)
    with pytest.raises(KnobError, match=r"\[1, 2\]"):
        order.check_space([3], stage2_after=3)
