"""What keeps torch.compile to one kernel per variant, and its overhead per call below the work of small taps.

`Kernel` leans on details of Dynamo and Inductor that are not promised to stay. Seen on PyTorch 2.14.1; this fails when
a trick is removed:

- *A code object of its own for every variant.* Dynamo keeps what it compiled by code object. With one for all, a
  variant is taken for another (the guards that would tell them apart are filtered out), and results are wrong:
  tests/kernels/test_operations.py.
- *Only guards on sizes.* Evaluating the others costs more than small taps do, the more so as the caches then hold a
  convolution's data and not Python's. They also compile anew what differs in nothing but which arguments are the same
  object, such as two cached scalars: "Duplicate tensors found", test_one_compilation_for_all_shapes.
- *Examples through dlpack.* A view into a larger buffer shows Dynamo its storage offset, which becomes a guard
  ("2 <= mean.storage_offset()") and another compilation where the next tap begins at 0:
  test_slices_of_one_buffer_compile_nothing_again. A tensor from dlpack has the same memory and offset 0.
- *`mark_dynamic` for the number of images.* `dynamic=True` alone ties it to another size that it happens to equal:
  test_one_compilation_for_all_shapes.
- *The width of vectors among the options.* Inductor's cache of graphs knows no CPU: code for AVX-512 from a folder that
  several machines share, or from before a virtual machine moved, is compiled for AVX2 then, and passes over every
  second vector. With the width among its options it is a part of the key: tests/kernels/test_cached_code.py.
- *No import of `torch._dynamo` before the first call.* It takes seconds, and it imports Triton, whose interpreter has
  to be chosen before that: tests/kernels/test_public.py.
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
    """Decorator: a function of tensors, compiled once per variant.

    A variant is for one thread (fewer than `GRAIN` elements) or for as many as there are when it runs, and for one
    `key`: the dtypes, what is given and what isn't, and every other constant of the call. Sizes are dynamic.
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
        # A code object of its own; its name only helps who reads PyTorch's logs.
        code = self.function.__code__.replace(co_name=f"{self.function.__name__}_{len(self.variants)}")
        threads = {"cpp.threads": 1} if serial else {"cpp.dynamic_threads": True}
        compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # its stub lacks recompile_limit
            types.FunctionType(code, self.function.__globals__),
            dynamic=True,
            fullgraph=True,
            recompile_limit=64,
            options={**threads, **vector_options(), "guard_filter_fn": _keep_sizes},
        )
        return compiled


def _keep_sizes(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards stay; the rest is the variant's key."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


@functools.cache
def dynamo() -> types.ModuleType:
    """`torch._dynamo`, imported at the first call."""
    return importlib.import_module("torch._dynamo")


@functools.cache
def vector_options() -> dict[str, int]:
    """Inductor's options that say how wide this CPU's vectors are, in bits; 0 if it has none that Inductor knows."""
    return {"cpp.simdlen": importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa().bit_width()}


def _as_example(x: Tensor) -> Tensor:
    """The memory of `x` for torch.compile to look at: a tensor of its own, not a view at some offset into a buffer."""
    if not x.dim():
        return x
    x = from_dlpack(to_dlpack(x.data))
    if x.dim() == 2:
        dynamo().mark_dynamic(x, 0, min=2, max=MAX_ROWS)
    return x
