"""Rows of all ranks, and their gradients."""

from __future__ import annotations

import pytest
import torch
from helpers.thread_ranks import on_ranks
from torch import Tensor

from engine.methods.everywhere import everywhere
from engine.training.ranks import Ranks

N = 7


def rows_and_upstream() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return tuple(torch.randn(N, 3, generator=random, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_is_one_process_when_each_rank_has_a_part_of_the_loss(size: int) -> None:
    """L = f(all rows) + Σ g(own rows, all rows), with both kinds of path through `everywhere`."""
    rows, upstream = rows_and_upstream()

    def loss_of(everybody: Tensor, terms: Tensor) -> Tensor:
        return (everybody.exp() * upstream).sum() * everybody.square().mean() + (terms * upstream[:, 0]).sum()

    def terms_of(own: Tensor, everybody: Tensor) -> Tensor:
        return torch.sin(own @ everybody.T).sum(dim=1)

    def work(ranks: Ranks) -> tuple[Tensor, Tensor]:
        own = rows[ranks.share(N)].clone().requires_grad_()
        everybody = everywhere(own, ranks)
        loss = loss_of(everybody, everywhere(terms_of(own, everybody), ranks))
        (loss / ranks.size).backward()
        assert own.grad is not None
        return loss.detach(), own.grad

    whole = rows.clone().requires_grad_()
    expected = loss_of(whole, terms_of(whole, whole))
    expected.backward()
    found = on_ranks(size, work)
    for loss, _ in found:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]), whole.grad, rtol=1e-12, atol=1e-12)


def test_alone_it_is_its_argument() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert everywhere(rows, Ranks()) is rows


def test_ranks_meet_in_one_order_in_both_directions() -> None:
    def work(ranks: Ranks) -> list[str]:
        own = torch.randn(2 + ranks.rank, 2, dtype=torch.float64, requires_grad=True)
        first = everywhere(own, ranks)
        second = everywhere(own * 2, ranks)
        (first.sum() * second.sum()).backward()
        return ranks.collectives  # type: ignore[attr-defined, no-any-return]

    assert on_ranks(2, work) == [["gather", "gather", "sum", "sum"]] * 2
