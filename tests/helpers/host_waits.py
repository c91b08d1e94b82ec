"""Helpers: training steps on CUDA tensors without a CUDA device, and a lint for what would make the host wait.

PyTorch's fake tensors have a device, a shape and no data, and what a step does with them on the host is what it does
with real ones: every copy between devices, every value that Python asks for. Only three things need a driver all the
same, and are done in Python here: autograd's engine, which asks CUDA for its streams; page-locked memory; events.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_steps import few_pictures
from helpers.step_trace import FORBIDDEN, where
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.comparison.reference.bank import FeatureBank
from engine.configuration.build import bare_extractor, make_generator, make_method, make_networks
from engine.configuration.config import Config
from engine.configuration.inputs import amp_dtype
from engine.configuration.objectives import blank_reference
from engine.configuration.running import make_schedule
from engine.generation.drawn_ahead import CudaLane, DrawnAhead
from engine.training.delivery import CudaImageLane, Delivery
from engine.training.planner import FakeMode, fake_copy
from engine.training.ranks import ALONE, Ranks
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer
from pipelines import ImageLoader

_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
_FUSED = (torch.ops.aten._fused_adam_.tensor_lr, torch.ops.aten._fused_adamw_.tensor_lr)
_SYNCHRONOUS = ("aten::equal", "aten::is_nonzero", "aten::item", "aten::masked_select", "aten::nonzero")


class HostWaits(TorchDispatchMode):
    """Lists what would make the host wait for a CUDA device, or be refused by it, in `faults`.

    These are values and shapes that Python asks for, copies between host and device other than from page-locked memory
    with `non_blocking`, and operators on tensors of both (CPU scalars are fine).
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.operators = 0
        self._page_locked: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.operators += 1
        page_locked = func is torch.ops.aten._pin_memory.default or bool(kwargs.pop("pin_memory", False))
        if why := self._fault(func, args, kwargs):
            self.faults.append(f"{func} {why}, by {where()}")
        if func is torch.ops.aten._pin_memory.default:
            result = args[0].clone()
        elif func in _FUSED:
            return None  # it works in place; PyTorch has no fake version of it
        else:
            result = func(*args, **kwargs)
        if page_locked:
            storage = result.untyped_storage()
            self._page_locked[storage._cdata] = storage
        return result

    def _fault(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str:
        name = func._schema.name
        if name in _SYNCHRONOUS:
            return "waits for a value"
        waits = (tag for tag in func.tags if tag in FORBIDDEN and tag != torch.Tag.nondeterministic_seeded)
        if (tag := next(waits, None)) is not None:
            return FORBIDDEN[tag]
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        if name in _COPIES:
            found = (self._copy_fault(*pair, bool(given.get("non_blocking"))) for pair in _copied(given))
            return next(filter(None, found), "")
        tensors = [value for value in tree_iter(given) if isinstance(value, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.device.type != "cpu" or tensor.dim() > 0}
        return "has tensors of host and device" if len(devices) > 1 else ""

    def _copy_fault(self, device: torch.device, source: Tensor, non_blocking: bool) -> str:
        if device.type == source.device.type:
            return ""
        if source.device.type == "cuda":
            return "copies from the device to the host"
        if source.untyped_storage()._cdata not in self._page_locked:
            return "copies to the device from memory that is not page-locked"
        return "" if non_blocking else "copies to the device and waits"


def _copied(given: dict[str, Any]) -> list[tuple[torch.device, Tensor]]:
    """(device that is copied to, what is copied) of a copying operator's arguments."""
    own = given["self"]
    if "src" not in given:
        return [(torch.device(given.get("device") or own.device), own)]
    if isinstance(own, Tensor):
        return [(own.device, given["src"])]
    return [(into.device, source) for into, source in zip(own, given["src"])]


def run_backward(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any],
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """autograd's engine in Python, with the arguments of `torch.autograd.graph._engine_run_backward`.

    It calls every node of the graph once, the latest first, with the sum of the gradients that reached it. Hooks are
    not called.
    """
    wanted = {_edge(tensor): index for index, tensor in enumerate(inputs)}
    found: list[Tensor | None] = [None] * len(inputs)
    reached: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    order, ties = [], itertools.count()

    def send(edge: tuple[Any, int], gradient: Tensor | None) -> None:
        node, output = edge
        if node is None or gradient is None:
            return
        expected = node._input_metadata[output]
        if gradient.shape != expected.shape:  # of a tensor that was expanded
            gradient = gradient.sum_to_size(expected.shape)
        gradient = gradient.to(expected.dtype)
        if node not in reached:
            # Nodes are numbered as they are made, so a node's users have larger numbers. Leaves come last.
            heapq.heappush(order, (hasattr(node, "variable"), -node._sequence_nr(), next(ties), node))
        before = reached[node].get(output)
        reached[node][output] = gradient if before is None else before + gradient

    with torch.set_grad_enabled(create_graph):
        for tensor, gradient in zip(tensors, gradients):
            send(_edge(tensor), gradient)
        while order:
            node = heapq.heappop(order)[-1]
            arrived = reached.pop(node)
            for output, gradient in arrived.items():
                if (node, output) in wanted:
                    found[wanted[node, output]] = gradient
            if hasattr(node, "variable"):
                if accumulate_grad and not inputs:
                    leaf = node.variable
                    leaf.grad = arrived[0] if leaf.grad is None else leaf.grad + arrived[0]
                continue
            edges = node.next_functions
            for edge, gradient in zip(edges, _call(node, arrived)):
                send(edge, gradient)
    return tuple(found)


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _call(node: Any, arrived: dict[int, Tensor]) -> list[Tensor | None]:
    """The gradients that a node sends along its edges."""
    count = len(node._input_metadata)
    gradients = [arrived.get(output) for output in range(count)]
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        result = node(*gradients)
        return list(result) if isinstance(result, tuple) else [result]
    result = node.apply(*gradients)
    result = result if isinstance(result, tuple) else (result,)
    # One entry for every argument of forward; edges there are for tensors alone, without a node if none is wanted.
    sent = iter(entry for entry, needed in zip(result, node.needs_input_grad) if needed)
    return [None if function is None else next(sent) for function, _ in node.next_functions]


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _wait(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the host waits for the device")


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """What needs a driver besides tensors answers as if there were one."""
    tasks = itertools.count()

    def backward(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            task = next(tasks)
            patch.setattr(torch._C, "_current_graph_task_id", lambda: task)  # what is recomputed, is so once a backward
            return run_backward(*args, **kwargs)

    # What is waited for on the host are copies of two steps before.
    event = SimpleNamespace(record=_nothing, synchronize=_nothing)
    stream = SimpleNamespace(
        synchronize=_wait, wait_stream=_nothing, wait_event=_nothing, record_event=lambda *args: event
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        patch.setattr(torch.autograd.graph, "_engine_run_backward", backward)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "Event", lambda *args, **kwargs: event)
        patch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: stream)
        patch.setattr(torch.cuda, "current_stream", lambda *args: stream)
        patch.setattr(torch.cuda, "stream", lambda given: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", _wait)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(Tensor, "record_stream", _nothing)
        yield


def host_waits(call: Callable[[], Callable[[], object]], warmup: int = 0) -> list[str]:
    """What `HostWaits` finds in the function that `call()` returns, on fake tensors, after `warmup` calls of it."""
    with fake_cuda(), FakeMode(), HostWaits() as waits:
        step = call()
        for _ in range(warmup):
            step()
        waits.faults.clear()
        waits.operators = 0
        with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):  # found, and no way on
            step()
    assert waits.operators > 0, "nothing was looked at"
    return waits.faults


def fake_cuda_trainer(config: Config, ranks: Ranks = ALONE) -> Trainer:
    """A new trainer on fake CUDA tensors, with the Triton operators and z drawn ahead; for `host_waits`."""
    mode = detect_fake_mode()
    assert mode is not None
    device = torch.device("cuda", 0)
    with unset_fake_temporarily():
        generator, networks = make_generator(config), make_networks(config)
    with device:
        generator = fake_copy(generator, mode)
        networks = {name: fake_copy(network, mode) for name, network in networks.items()}
    triton = importlib.import_module("kernels.triton")
    if config.needs.features:
        with unset_fake_temporarily():
            extractor = bare_extractor(config)
        with device:
            extractor = fake_copy(extractor, mode, amp_dtype(config))
        options: dict[str, Any] = {"kernels": triton}
        reference = blank_reference(config, extractor, torch.rand)
        # Fake tensors have no numbers to make weights or scales of.
        if isinstance(reference, FeatureBank):
            options["scales"] = torch.ones(reference.features.shape[1])
        elif config.gfmn.feature_scale != "none":
            options["weights"] = torch.ones(extractor.num_features)
        method = make_method(config, generator, extractor, reference, ranks, **options)
    else:
        method = make_method(config, generator, ranks=ranks, networks=networks)
    noise = DrawnAhead(config.training.seed, CudaLane(device))
    images = None
    if method.reads == "images":
        batch, part = config.training.batch_size, {"part": ranks.rank, "num_parts": ranks.size}
        loader = _OnFakeDevice(few_pictures(config), batch, backend="torch", drop_last=True, **part)
        images = Delivery(loader, CudaImageLane(device), slots=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copying a generator
        schedule, run = make_schedule(config), RunFolder("nowhere")
        return Trainer(method, schedule, run, {}, images=images, noise=noise, kernels=triton, ranks=ranks)


class _OnFakeDevice(ImageLoader):
    """Images without contents on the device."""

    def _read(self, batches: list[np.ndarray]) -> Generator[tuple[Tensor, np.ndarray], None, None]:
        size = self.dataset.image_size
        for indices in batches:
            yield torch.empty(len(indices), 3, size, size, device="cuda"), indices
