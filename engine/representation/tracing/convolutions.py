"""The convolutions of a frozen network on a CPU: oneDNN's, with the activation where the result is stored.

Collecting a tap's moments then only has to read it. And nothing is kept for backward: the gradient with respect to a
frozen convolution's input needs its weights alone, so what a pooling has returned, for one, can go.
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
    """`network` with `FrozenConv2d` for its convolutions, and those of its `sites` whose activation they apply.

    Args:
        network: frozen, from `engine.representation.tracing.tap.tap_network`; stays as it is, and shares its weights.
        sites: of all taps of the extractor.
    """
    fused = fx.GraphModule(network, copy.deepcopy(network.graph), type(network).__name__)
    modules = dict(fused.named_modules())
    calls = Counter(str(node.target) for node in fused.graph.nodes if node.op == "call_module")
    changed: dict[int, TapSite] = {}
    # oneDNN's ReLU turns NaN into 0. Whatever is not finite has been so at the first tap, which therefore is not its.
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
        fused.set_submodule(str(node.target), FrozenConv2d(conv, activation))
    return fused, changed


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """A subclass may do something else than its attributes say (timm's pads its images to what TensorFlow does)."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class FrozenConv2d(nn.Module):
    """A frozen `nn.Conv2d` and an activation; in backward, the gradient with respect to the convolution's result is
    expected (the mask is the tap's business), and the one with respect to its input is returned."""

    def __init__(self, conv: nn.Conv2d, activation: str):
        super().__init__()
        self.conv = conv
        self.epilogue = _EPILOGUES[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return _FrozenConvolution.apply(x, self) if torch.is_grad_enabled() else self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The convolution and the activation."""
        conv = self.conv
        return torch.ops.mkldnn._convolution_pointwise(
            x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, *self.epilogue, ""
        )

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """∂L/∂x of the convolution, for ∂L/∂(its result)."""
        conv = self.conv
        # Of x only the shape is needed, but a tensor without memory of its own would be filled.
        x = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)
        return torch.ops.aten.convolution_backward(
            grad, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
            [True, False, False],
        )[0]  # fmt: skip


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, convolution: FrozenConv2d):
        ctx.convolution, ctx.shape = convolution, x.shape
        return convolution.run(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.convolution.input_gradient(grad, ctx.shape), None
