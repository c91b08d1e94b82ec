"""Products of matrices on a CPU, by whichever library is faster there.

On processors that are not Intel's, MKL leaves the widest instructions alone, and oneDNN takes half of its time in
float32 (AMD EPYC, unrecorded). Its products have no autograd, so what is differentiated goes to PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 1024
"""Columns that are multiplied at a time, where a copy of them makes products faster: 4 MiB for as many rows."""


def row_products(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x_i·y_j (+ bias_j) [n, m] of rows x [n, F] and y [m, F]; bias [m]."""
    if not _by_onednn(x, y):
        return torch.mm(x, y.T) if bias is None else torch.addmm(bias, x, y.T)
    if not (y.is_contiguous() or y.T.is_contiguous()):
        y = y.contiguous()  # oneDNN takes minutes where rows lie apart
    products: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
    return products


def add_product_(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out [n, F] ← out + x·y for x [n, m] and y [m, F]; nothing as large as `out` is allocated."""
    if not _by_onednn(x, y):
        out.addmm_(x, y)
        return
    x = x.contiguous()  # once, and not for every part
    for part, columns in zip(torch.split(out, _COLUMNS, 1), torch.split(y, _COLUMNS, 1), strict=True):
        part += row_products(x, columns.contiguous().T)


def _by_onednn(x: Tensor, y: Tensor) -> bool:
    if x.dtype != torch.float32 or x.device.type != "cpu" or 0 in (*x.shape, *y.shape):
        return False
    differentiated = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    return not differentiated and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
