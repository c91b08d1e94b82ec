"""Helpers: what a training step asks of PyTorch, so that two steps can be compared.

A CUDA graph replays the kernels of one step with the arguments of that step: the same numbers, the same addresses, the
same sizes. So a step can be captured if every step calls the same operators in the same order with the same numbers, on
tensors of the same shapes that either the same operator of the same step made or that lie where they always lie, and
if nothing in it draws random numbers on the host or waits for a value. A trace of CPU operators shows all of that.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).parents[2]
WARMUP = 3
"""Steps before the two that are compared: the optimizer's, the scaler's and the average's state exist after them."""
# What decides on the host what the device does next, or what the host makes up at every step.
FORBIDDEN = {
    torch.Tag.nondeterministic_seeded: "draws random numbers",
    torch.Tag.data_dependent_output: "waits for a value",
    torch.Tag.dynamic_output_shape: "returns a shape that depends on values",
}


@dataclass(frozen=True)
class Origin:
    """A tensor in the arguments of an operator.

    Attributes:
        source: "result 0 of call 7" of this step, or "at 0x…" in memory that is older than the step.
        layout: offset, shape, strides, dtype and device.
    """

    source: str
    layout: str

    def __repr__(self) -> str:
        return f"<{self.layout} {self.source}>"


@dataclass(frozen=True)
class Call:
    """One operator that was called.

    Attributes:
        operator: its name.
        arguments: all of them, tensors by their origin.
        where: the Python line that called it, or that began the backward pass which did.
        forbidden: why no graph could hold it; "" if one could.
    """

    operator: str
    arguments: str
    where: str = field(compare=False)
    forbidden: str = ""

    def __str__(self) -> str:
        return f"{self.operator}{self.arguments}"


class StepTrace(TorchDispatchMode):
    """Keeps the calls of one step in `calls`, and all memory they saw, so that no address is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._made: dict[int, str] = {}
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # marks for people who look at profiles, with a handle of their own every time
            return func(*args, **kwargs)
        arguments = ", ".join([*map(self._shown, args), *(f"{key}={self._shown(kwargs[key])}" for key in kwargs)])
        forbidden = next((why for tag, why in FORBIDDEN.items() if tag in func.tags), "")
        if not forbidden and len(_devices(args, kwargs)) > 1:
            forbidden = "goes between host and device"  # a graph would copy, or hold the number that was there
        self.calls.append(Call(str(func), f"({arguments})", where(), forbidden))
        result = func(*args, **kwargs)
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        for index, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor):
                self._results(tensor, f"result {index} of call {len(self.calls) - 1}")
        return result

    def _results(self, tensor: Tensor, source: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._made[storage._cdata] = source
            self._held[storage._cdata] = storage

    def _shown(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return repr(self._origin(value))
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self._shown, value))}]"
        if isinstance(value, torch.ScriptObject):  # a group of processes or the kind of a sum, wrapped anew every time
            return str(value._type())
        return "generator" if isinstance(value, torch.Generator) else repr(value)

    def _origin(self, tensor: Tensor) -> Origin:
        storage = tensor.untyped_storage()
        self._held.setdefault(storage._cdata, storage)
        address = storage._cdata if isinstance(tensor, FakeTensor) else storage.data_ptr()
        source = self._made.get(storage._cdata, f"at {address:#x}")
        shape, strides = list(tensor.shape), list(tensor.stride())
        layout = f"{tensor.dtype} {shape} strides {strides} offset {tensor.storage_offset()} on {tensor.device}"
        return Origin(source, layout)


def _devices(args: Any, kwargs: Any) -> set[str]:
    """The kinds of devices that an operator's tensors are on, and that of its result if it reads any."""
    found = {value.device.type for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
    if found and kwargs.get("device") is not None:
        found.add(torch.device(kwargs["device"]).type)
    return found


def where() -> str:
    """The innermost line of the project in the stack of a dispatch mode, without the lints themselves."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if ours and path.parent != Path(__file__).parent:
            line = linecache.getline(str(path), frame.f_lineno).strip()
            node = torch._C._current_autograd_node()
            backward = "" if node is None else f" (backward: {node.name()})"
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}{backward}: {line}"
        frame = frame.f_back
    return "outside of the project"


def differences(one: StepTrace, other: StepTrace) -> list[str]:
    """Where two steps differ, a line each with the Python line; the list ends where their operators part."""
    found = []
    for number, (first, second) in enumerate(zip(one.calls, other.calls)):
        if first.operator != second.operator:
            found.append(f"call {number} is {first}, then {second}, by {second.where}")
            return found
        if first != second:
            found.append(f"call {number} changes: {first}, then {second}, by {second.where}")
    if len(one.calls) != len(other.calls):
        more = max(one.calls, other.calls, key=len)[min(len(one.calls), len(other.calls))]
        counts = f"{len(one.calls)} calls, then {len(other.calls)}"
        found.append(f"steps have {counts}; only one has {more}, by {more.where}")
    return found


def capture_faults(step: Callable[[AbstractContextManager[Any]], object], warmup: int = WARMUP) -> list[str]:
    """Why a CUDA graph of a step would not do what the step does; empty if it would.

    Args:
        step: takes a step, with what would be captured inside the context it is given.
        warmup: steps before the two that are compared.
    """
    for _ in range(warmup):
        step(nullcontext())
    traces = StepTrace(), StepTrace()
    for trace in traces:
        step(trace)
    assert any(trace.calls for trace in traces), "nothing was traced"
    forbidden = [f"{call.operator} {call.forbidden}, by {call.where}" for call in traces[1].calls if call.forbidden]
    return [*forbidden, *differences(*traces)]
