"""What keeps torch.compile to one kernel per variant, and its overhead per call below that of small taps.

`Kernel` and its helpers lean on details of Dynamo and Inductor, as they are in PyTorch 2.14.1. Each trick, and what
fails without it, is said where it stands; `tests/kernels/test_compiled.py` shows most of the failures.

Nothing of torch.compile is imported before the first call: it takes seconds, and it imports Triton, whose interpreter
has to be chosen before that.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

# Inductor sums more than 4096 terms with a compensating helper, which is another kernel; and float32 sums of fewer
# terms are better merged than continued.
MAX_ROWS = 1024
# Elements from which threads pay: the grain of PyTorch's own parallel loops.
GRAIN = 32768


class Kernel:
    """A function compiled once per `variant`: for one thread (fewer than `GRAIN` elements) and for as many as there
    are when it runs, per dtypes, and per what is given and what isn't.

    torch.compile's own look at every argument of every call costs more than small taps do, the more so as the caches
    then hold a convolution's data and not Python's. It keeps to sizes here; the rest is the key of the variant.

    Nothing of torch.compile is imported before the first call: it takes seconds, and it imports Triton, whose
    interpreter has to be chosen before that.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.variants: dict[Any, Callable[..., Any]] = {}

    def __call__(self, elements: int, key: Any, *args: Any) -> Any:
        """The function of `args`; `key` tells apart what must not share a variant, other than sizes."""
        key = (elements < GRAIN, args[0].shape[-1] == 1, key)  # sizes of 1 are special to torch.compile
        compiled = self.variants.get(key)
        if compiled is None:
            compiled = self.variants[key] = self._compile(serial=key[0])
            args = torch.utils._pytree.tree_map_only(Tensor, _as_example, args)
        return compiled(*args)

    def _compile(self, serial: bool) -> Callable[..., Any]:
        # PyTorch keeps what it compiled by code object, and must not take one variant for another.
        code = self.function.__code__.replace(co_name=f"{self.function.__name__}_{len(self.variants)}")
        threads = {"cpp.threads": 1} if serial else {"cpp.dynamic_threads": True}
        compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # its stub lacks recompile_limit
            types.FunctionType(code, self.function.__globals__),
            dynamic=True,
            fullgraph=True,
            recompile_limit=64,
            options={**threads, "guard_filter_fn": _keep_sizes},
        )
        return compiled


def _keep_sizes(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


@functools.cache
def dynamo() -> types.ModuleType:
    return importlib.import_module("torch._dynamo")


def _as_example(x: Tensor) -> Tensor:
    """The same memory for torch.compile to look at: a tensor of its own, no view into a buffer at some offset."""
    if not x.dim():
        return x
    x = from_dlpack(to_dlpack(x.data))
    if x.dim() == 2:
        # By itself "dynamic" would still tie the number of images to another size that is equal to it by chance.
        dynamo().mark_dynamic(x, 0, min=2, max=MAX_ROWS)
    return x
