"""Covariances as BᵀB, with B [r, F] upper trapezoidal: half the memory, and half of every product with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_ROWS = 256  # of a block


class Factor:
    """B [r, F] float64 with BᵀB = Σ, upper trapezoidal in some order of its columns, without the zeros.

    Args:
        blocks: rows of B, `_ROWS` each but for the last; the i-th without its first i · `_ROWS` columns.
        size: F.
        order: the features' numbers in the order of the columns; None for 0, 1, ….

    Attributes:
        rank: r.
    """

    def __init__(self, blocks: Sequence[Tensor], size: int, order: Tensor | None = None):
        self.blocks, self.size, self.order = blocks, size, order
        self.rank = sum(len(block) for block in blocks)

    @classmethod
    def of_rows(cls, matrix: Tensor) -> Factor:
        """Of Σ = MᵀM, by Householder's QR of M [m ≤ F, F] float64, which is overwritten if it is column-major."""
        count, size = matrix.shape
        matrix = matrix.T.contiguous().T  # as LAPACK has it
        torch.geqrf(matrix, out=(matrix, matrix.new_empty(count)))
        return cls([matrix[start : start + _ROWS, start:].triu() for start in range(0, count, _ROWS)], size)

    @classmethod
    def of_covariance(cls, rows: Callable[[slice], Tensor], size: int) -> Factor | None:
        """Of Σ [F, F], by Cholesky's decomposition with diagonal pivoting (Higham 1990), in the memory of the result.

        A singular Σ has fewer rows: what is left of the diagonal below F · eps of the largest variance counts as 0.

        Args:
            rows: i → the rows i of Σ, as new float64 memory.
            size: F.

        Returns None if Σ has a negative eigenvalue, beyond rounding in float64.
        """
        parts = [slice(start, min(start + _ROWS, size)) for start in range(0, size, _ROWS)]
        blocks = [rows(part)[:, part.start :].clone() for part in parts]
        elimination = _Elimination(blocks, size)
        if not elimination.run():
            return None
        return cls(elimination.finished, size, elimination.order)

    def project(self, rows: Tensor, out: Tensor) -> Tensor:
        """rows · Bᵀ [n, r] of rows [n, F], into `out`."""
        rows = rows if self.order is None else rows[:, self.order]
        for start, block in _placed(self.blocks):
            torch.mm(rows[:, start:], block.T, out=out[:, start : start + len(block)])
        return out

    def lift(self, rows: Tensor) -> Tensor:
        """rows · B [n, F] of rows [n, r]."""
        found = rows.new_zeros(len(rows), self.size)
        for start, block in _placed(self.blocks):
            found[:, start:].addmm_(rows[:, start : start + len(block)], block)
        return found if self.order is None else torch.empty_like(found).index_copy_(1, self.order, found)


class _Elimination:
    """The decomposition of `Factor.of_covariance`: blocks hold what is left of Σ, and row by row B takes its place.

    Only what is on or above the diagonal counts. A row of a block has the block's earlier rows subtracted when its turn
    comes, and the later blocks all of them at once.

    Args:
        blocks: Σ, as `Factor` has B.
        size: F.

    Attributes:
        left: [F], what is left of the diagonal.
        order: [F], of the columns so far.
        finished: blocks of B, once it has run.
    """

    def __init__(self, blocks: list[Tensor], size: int):
        self.blocks, self.size = blocks, size
        self.left = torch.cat([block.diagonal() for block in blocks])
        self.order = torch.arange(size, device=self.left.device)
        self.negligible = size * torch.finfo(torch.float64).eps * max(float(self.left.max()), 0.0)
        self.finished: list[Tensor] = []

    def run(self) -> bool:
        """Whether Σ has no negative eigenvalue."""
        orders: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            done = self._rows_of(index)
            orders.append(self.order.clone())
            self._subtract(index, done)
            if done < len(block):
                if self._largest_left(index, done) > 10 * self.negligible:
                    return False
                self.blocks[index] = block[:done].clone()
                del self.blocks[index + (done > 0) :]
                break
        places = torch.empty_like(self.order)
        for (start, block), order in zip(_placed(self.blocks), orders, strict=False):
            places[order] = torch.arange(self.size, device=order.device)
            self.blocks[start // _ROWS] = block[:, places[self.order][start:] - start].triu()
        self.finished = self.blocks
        return True

    def _rows_of(self, index: int) -> int:
        """Eliminate the block's rows, and say how many there were before nothing was left."""
        block, start = self.blocks[index], index * _ROWS
        for row in range(len(block)):
            here = start + row
            pivot = here + int(self.left[here:].argmax())
            if float(self.left[pivot]) <= self.negligible:
                return row
            if pivot != here:
                self._swap(index, row, pivot)
            line = block[row, row:]
            line.addmv_(block[:row, row:].T, block[:row, row].clone(), alpha=-1)
            line[0] = self.left[here]
            line /= self.left[here].sqrt()
            self.left[here + 1 :] -= line[1:].square()
        return len(block)

    def _swap(self, index: int, row: int, pivot: int) -> None:
        """Features `row` of the block and `pivot`, in every place where what is left of Σ, or a row here, has them."""
        block, start = self.blocks[index], index * _ROWS
        here, other, far = start + row, pivot // _ROWS, pivot % _ROWS
        _exchange(block[:row, row], block[:row, pivot - start])
        for between in range(index, other + 1):
            first = between * _ROWS
            inside = slice(max(here + 1, first), min(pivot, first + _ROWS))
            column = self.blocks[between][inside.start - first : inside.stop - first, pivot - first]
            _exchange(column, block[row, inside.start - start : inside.stop - start])
        _exchange(self.blocks[other][far, far + 1 :], block[row, pivot + 1 - start :])
        _exchange(self.blocks[other][far, far], block[row, row])
        for numbers in (self.left, self.order):
            _exchange(numbers[here], numbers[pivot])

    def _subtract(self, index: int, done: int) -> None:
        """What the block's first `done` rows explain, from all that is left."""
        block, start = self.blocks[index][:done], index * _ROWS
        rest = self.blocks[index][done:, done:]
        for first, later in ((start + done, rest), *_placed(self.blocks, index + 1)):
            own = block[:, first - start :]
            later.addmm_(own[:, : len(later)].T, own, alpha=-1)

    def _largest_left(self, index: int, done: int) -> float:
        rests = [self.blocks[index][done:, done:], *self.blocks[index + 1 :]]
        return max(float(rest.triu().abs().max()) for rest in rests)


def _exchange(a: Tensor, b: Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def _placed(blocks: Sequence[Tensor], first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Blocks from number `first` on, each with the number of its first row, and column."""
    for index in range(first, len(blocks)):
        yield index * _ROWS, blocks[index]
