"""CUDA's part in a graphed step, played on a CPU: a graph of recorded operators, and a lane that keeps a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.training.delivery import ImageLane
from pipelines import Batch

Step = Callable[[], Mapping[str, Tensor]]
# Changed by aten::native_batch_norm, whose schema does not say so.
STATISTICS = ("running_mean", "running_var")
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Tape(TorchDispatchMode):
    """Records operators with the tensors and numbers that they got. Their memory is a graph's: it stays.

    `undo` gives everything that was there before its old contents, as captures don't execute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.kept: list[Any] = []
        self.own: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        given = {storage(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        changed = list(self._changed(func, args, kwargs))
        for tensor in changed:
            if storage(tensor) not in self.own | self.before.keys():
                contents = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[storage(tensor)] = (contents, contents.clone())
        result = func(*args, **kwargs)
        made = [value for value in tree_iter(result) if isinstance(value, Tensor) and storage(value) not in given]
        self.own |= {storage(value) for value in made}
        self.kept.append((args, kwargs, result))
        if changed or made or func.namespace == "c10d":  # whose schemas don't say what they write to
            self.calls.append((func, args, kwargs, made))
        return result

    @staticmethod
    def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
        for index, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or (argument.name in STATISTICS and func is torch.ops.aten.native_batch_norm.default):
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                yield from (part for part in tree_iter(value) if isinstance(part, Tensor))

    def undo(self) -> None:
        for contents, old in self.before.values():
            contents.copy_(old)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            result = func(*args, **kwargs)
            new = [value for value in tree_iter(result) if isinstance(value, Tensor)]
            for old, value in zip(made, new if len(made) == len(new) else [], strict=bool(made)):
                old.copy_(value)


class RecordedGraphs:
    """`engine.training.graphs.Graphs` on a CPU: addresses, numbers and shapes are those of the capture.

    Attributes:
        log: "aside", "capture", "replay" and "drain", as they came.
    """

    def __init__(self) -> None:
        self.log: list[str] = []

    def aside(self, step: Step) -> Mapping[str, Tensor]:
        self.log.append("aside")
        return step()

    def capture(self, step: Step) -> tuple[Callable[[], None], Mapping[str, Tensor]]:
        self.log.append("capture")
        tape = _Tape()
        RecordedLane.capturing = True
        try:
            with tape:
                scalars = step()
        finally:
            RecordedLane.capturing = False
            tape.undo()

        def replay() -> None:
            self.log.append("replay")
            tape.replay()

        return replay, scalars

    def drain(self) -> None:
        self.log.append("drain")


class RecordedLane:
    """`engine.generation.drawn_ahead.Lane` on a CPU. Copies are made when the device is said to `work`, in order.

    Attributes:
        log: what was asked for: ("copy", slot), ("wait", number of the copy).
        late: whether copies wait for `work` or for somebody who waits for them.
    """

    capturing = False
    device = torch.device("cpu")

    def __init__(self, late: bool = False) -> None:
        self.late = late
        self.log: list[tuple[str, Any]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def buffer(self, z: Tensor) -> Tensor:
        return torch.full_like(z, float("nan"))

    slot = buffer

    def copy(self, slot: Tensor, buffer: Tensor) -> int:
        assert not self.capturing, "copies come before a captured step"
        self.log.append(("copy", slot))
        self.copies.append((slot, buffer))
        if not self.late:
            self.work(len(self.copies))
        return len(self.copies)

    def wait(self, copied: int) -> None:
        self.log.append(("wait", copied))
        self.work(copied)

    def work(self, until: int) -> None:
        """Make the first `until` copies, as far as they have not been made, from what the buffers hold now."""
        for slot, buffer in self.copies[self.done : until]:
            slot.copy_(buffer)
        self.done = max(self.done, until)

    def is_capturing(self) -> bool:
        return self.capturing


class RecordedImageLane(ImageLane):
    """Real images on a CPU, beside `RecordedGraphs`."""

    def read(self, share: Callable[[], Batch]) -> Batch:
        assert not RecordedLane.capturing, "images are read before a captured step"
        return super().read(share)

    def is_capturing(self) -> bool:
        return RecordedLane.capturing
