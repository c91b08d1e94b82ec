"""Frozen convolutions, of whose input backward needs the shape alone.

On a CPU they are oneDNN's, which apply the activation while they store the result: collecting a tap's moments then only
reads it. Maps of a few pixels are left to `small_maps`, which is faster there. Elsewhere convolutions leave their bias
to the tap, whose kernel reads and writes every activation anyway; cuDNN's would add it in a kernel of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode

from engine.representation.tracing import small_maps
from engine.representation.tracing.tap import TapSite, is_visit

# oneDNN's names and numbers for our activations.
_EPILOGUES: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}


def can_fuse(weight: Tensor) -> bool:
    """Whether oneDNN's convolutions with an activation exist for this device and dtype."""
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or detect_fake_mode([weight]) is not None
    ):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def fuse(network: fx.GraphModule, sites: Sequence[TapSite]) -> tuple[fx.GraphModule, dict[int, TapSite]]:
    """The network with `FusedConv2d` for its convolutions, and by index the sites whose activation these apply.

    Args:
        network: frozen, from `engine.representation.tracing.tap.tap_network`; stays as it is, and shares its weights.
        sites: of all taps of the extractor.
    """
    fused = fx.GraphModule(network, copy.deepcopy(network.graph), type(network).__name__)
    modules = dict(fused.named_modules())
    calls = Counter(str(node.target) for node in fused.graph.nodes if node.op == "call_module")
    changed: dict[int, TapSite] = {}
    # oneDNN's ReLU turns NaN into 0. Non-finite values already show at the first tap, so that tap keeps PyTorch's ReLU.
    first = next(node.args[1] for node in fused.graph.nodes if is_visit(node))
    for node in fused.graph.nodes:
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if not _is_plain(conv) or calls[str(node.target)] > 1:
            continue
        activation = "none"
        (reader, *others) = node.users
        if is_visit(reader) and not others:
            _, index, x, residual = reader.args
            site = sites[index]
            if x is node and residual is None and index != first and site.activation in ("relu", "relu6"):
                activation = site.activation
                changed[index] = dataclasses.replace(site, applied=True)
        fused.set_submodule(str(node.target), FusedConv2d(conv, activation))
    return fused, changed


def leave_biases(network: fx.GraphModule, sites: Sequence[TapSite]) -> tuple[fx.GraphModule, dict[int, TapSite]]:
    """The network with `FrozenConv2d` for its convolutions, and by index the sites that add the biases these leave out.

    A tap takes the biases of the convolutions that it alone reads, its shortcut's included. Arguments as for `fuse`.
    """
    frozen = fx.GraphModule(network, copy.deepcopy(network.graph), type(network).__name__)
    modules = dict(frozen.named_modules())
    calls = Counter(str(node.target) for node in frozen.graph.nodes if node.op == "call_module")
    changed: dict[int, TapSite] = {}
    for node in frozen.graph.nodes:
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if not _is_plain(conv):
            continue
        (reader, *others) = node.users
        left = conv.bias is not None and is_visit(reader) and not others and calls[str(node.target)] == 1
        if left:
            index = reader.args[1]
            site = changed.get(index, sites[index])
            bias = conv.bias if site.bias is None else site.bias + conv.bias
            changed[index] = dataclasses.replace(site, bias=bias)
        frozen.set_submodule(str(node.target), FrozenConv2d(conv, bias=not left))
    return frozen, changed


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether its attributes say all. A subclass may do something else: timm's pads its input as TensorFlow does."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class FrozenConv2d(nn.Module):
    """A frozen `nn.Conv2d`.

    Args:
        bias: whether the convolution's own is added; if not, whoever reads the result does that.
    """

    def __init__(self, conv: nn.Conv2d, *, bias: bool = True):
        super().__init__()
        self.conv, self.bias = conv, bias

    def forward(self, x: Tensor) -> Tensor:
        """The same as `run`."""
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The convolution, [N, C, H, W] to [N, C', H', W']."""
        conv = self.conv
        bias = conv.bias if self.bias else None
        return torch.conv2d(x, conv.weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def input_gradient(self, grad: Tensor, of: Tensor | torch.Size) -> Tensor:
        """∂L/∂x from ∂L/∂(the convolution's own result), for an x like `of`, or of that shape."""
        conv, shape = self.conv, of.shape if isinstance(of, Tensor) else of
        assert not isinstance(conv.padding, str)
        reached = [
            (grad.shape[2 + axis] - 1) * conv.stride[axis] - 2 * conv.padding[axis]
            + conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1 for axis in (0, 1)
        ]  # fmt: skip
        beyond = [side - least for side, least in zip(shape[2:], reached, strict=True)]
        # `convolution_backward` would want an x; the transposed convolution is the same call of cuDNN without one.
        return torch.conv_transpose2d(
            grad, conv.weight, None, conv.stride, conv.padding, beyond, conv.groups, conv.dilation
        )


class FusedConv2d(FrozenConv2d):
    """oneDNN's convolution, with an activation in the same call.

    The gradient that its `input_gradient` takes is that of the convolution's own result: the tap has applied the
    activation's mask already.
    """

    def __init__(self, conv: nn.Conv2d, activation: str):
        super().__init__(conv)
        self.epilogue = _EPILOGUES[activation]

    def run(self, x: Tensor) -> Tensor:
        """The activation of the convolution, [N, C, H, W] to [N, C', H', W']."""
        conv = self.conv
        if small_maps.pays(conv, x.shape):
            return small_maps.convolve(conv, x, self.epilogue)
        return torch.ops.mkldnn._convolution_pointwise(
            x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, *self.epilogue, ""
        )

    def input_gradient(self, grad: Tensor, of: Tensor | torch.Size) -> Tensor:
        """∂L/∂x from ∂L/∂(the convolution's own result), for an x like `of`, or of that shape."""
        conv, shape = self.conv, of.shape if isinstance(of, Tensor) else of
        if small_maps.pays(conv, shape):
            return small_maps.input_gradient(conv, grad, shape)
        # Of x only the shape is needed, but a tensor without memory of its own would be filled.
        x = of
        if not isinstance(x, Tensor):
            x = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)
        return torch.ops.aten.convolution_backward(
            grad, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
            [True, False, False],
        )[0]  # fmt: skip
