"""The convolutions of a frozen network as oneDNN runs them fastest on a CPU.

Weights that never change are put into oneDNN's own layout once instead of at every call, for the convolution and for
its input gradient, which at stride 1 is a convolution with flipped weights. A tap's activation happens where the
convolution stores its result, so that collecting moments only has to read it.
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

from engine.tapping import TapSite, is_visit

# oneDNN's names and numbers for our activations.
_EPILOGUES: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed convolutions exist for this device and dtype."""
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or detect_fake_mode([weight]) is not None
    ):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def pack(network: fx.GraphModule, sites: Sequence[TapSite]) -> tuple[fx.GraphModule, dict[int, TapSite]]:
    """`network` with packed convolutions, and those of its `sites` whose activation they apply.

    Args:
        network: frozen, from `engine.tapping.tap_network`; stays as it is, and shares its weights.
        sites: of all taps of the extractor.
    """
    packed = fx.GraphModule(network, copy.deepcopy(network.graph), type(network).__name__)
    modules = dict(packed.named_modules())
    calls = Counter(str(node.target) for node in packed.graph.nodes if node.op == "call_module")
    changed: dict[int, TapSite] = {}
    # oneDNN's ReLU turns NaN into 0. Whatever is not finite has been so at the first tap, which therefore is not its.
    first = next(node.args[1] for node in packed.graph.nodes if is_visit(node))
    for node in packed.graph.nodes:
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
        packed.set_submodule(str(node.target), PackedConv2d(conv, activation))
    return packed, changed


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """A subclass may do something else than its attributes say (timm's pads its images to what TensorFlow does)."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class PackedConv2d(nn.Module):
    """A frozen `nn.Conv2d` and an activation; in backward, the gradient with respect to the convolution's result is
    expected (the mask is the tap's business), and the one with respect to its input is returned."""

    def __init__(self, conv: nn.Conv2d, activation: str):
        super().__init__()
        self.conv = conv
        self.epilogue = _EPILOGUES[activation]
        assert not isinstance(conv.padding, str)
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        height, width = conv.kernel_size
        # Padding that a convolution with flipped weights needs to give the input's gradient its size.
        padding, stride, dilation, groups = self.geometry
        self.back_padding = [height - 1 - padding[0], width - 1 - padding[1]]
        self.flips = stride == [1, 1] and dilation == [1, 1] and groups == 1 and min(self.back_padding) >= 0
        self.weight: Tensor | None = None
        self.flipped: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return _PackedConvolution.apply(x, self) if torch.is_grad_enabled() else self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The convolution and the activation."""
        padding, stride, dilation, groups = self.geometry
        if self.weight is None:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.conv.weight, padding, stride, dilation, groups, list(x.shape)
            )
        attribute, scalars = self.epilogue
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.conv.bias, padding, stride, dilation, groups, attribute, scalars, ""
        )

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """∂L/∂x of the convolution, for ∂L/∂(its result)."""
        weight = self.conv.weight
        padding, stride, dilation, groups = self.geometry
        if not self.flips:
            # Of x only the shape is needed.
            x = torch.empty(1, dtype=grad.dtype).expand(shape)
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
            )[0]
        if self.flipped is None:
            flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            self.flipped = torch.ops.mkldnn._reorder_convolution_weight(
                flipped, self.back_padding, stride, dilation, groups, list(grad.shape)
            )
        return torch.ops.mkldnn._convolution_pointwise(
            grad, self.flipped, None, self.back_padding, stride, dilation, groups, "none", [], ""
        )


class _PackedConvolution(torch.autograd.Function):
    """Keeps nothing for backward: the input's gradient needs weights alone."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: PackedConv2d):
        ctx.packed, ctx.shape = packed, x.shape
        return packed.run(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.packed.input_gradient(grad, ctx.shape), None
