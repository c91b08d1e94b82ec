"""Helpers: small networks of every shape that could break the in-place rules of the pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# Each has `.activations`, in the order in which they run.


class Network(nn.Module):
    """Three convolutions to play with, and activations as modules, so that hooks can see them."""

    def __init__(self, activations: int = 3, make: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.acts = nn.ModuleList([make() for _ in range(activations)])

    @property
    def activations(self) -> list[nn.Module]:
        return list(self.acts)


class Chain(Network):
    def forward(self, x):
        return self.acts[2](self.third(self.pool(self.acts[1](self.second(self.acts[0](self.first(x)))))))


class SeveralReaders(Network):
    """One tap read by two convolutions and a pool."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.pool(self.acts[1](self.second(y) + self.third(y)))
        return self.acts[2](z + self.pool(y))


class IdentityShortcut(Network):
    """The shortcut's activation is also read by the convolution that it goes around."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[2](self.third(self.acts[1](self.second(y) + y)))


class ShortcutOnly(Network):
    """A tap that nothing but a shortcut reads: its gradient is the very tensor that the other branch gets."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[2](self.third(self.acts[1](self.first(x) + y)))


class ShortcutFromTheImages(Network):
    def __init__(self):
        super().__init__(activations=2)
        self.back = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[1](self.back(y) + x)


class InputReadTwice(Network):
    """The activation's input is read again afterwards, before and past another convolution."""

    def forward(self, x):
        y = self.first(x)
        z = self.acts[0](y)
        w = self.acts[1](self.second(y) + z)
        return self.acts[2](self.third(w) + y)


class InputIsAnImage(Network):
    """The first activation reads the images themselves, which belong to the caller."""

    def forward(self, x):
        y = self.acts[0](x)
        return self.acts[2](self.second(self.acts[1](self.first(y))))


class ActivationOfAnActivation(Network):
    def __init__(self):
        super().__init__(activations=3)
        self.acts[1] = nn.ReLU6()

    def forward(self, x):
        y = self.acts[0](3 * self.first(x))
        return self.acts[2](self.second(self.acts[1](y)) + y)


class SumOfTaps(Network):
    """Two taps added with nothing else reading them: both get the same gradient tensor."""

    def forward(self, x):
        return self.acts[2](self.third(self.acts[0](self.first(x)) + self.acts[1](self.first(-x))))


class TappedSumOfTaps(Network):
    """The sum is itself a tap's input: its gradient, changed in place, is handed to both terms."""

    def forward(self, x):
        s = self.acts[0](self.first(x)) + self.acts[1](self.first(x.flip(3)))
        return self.acts[2](s)


class SumReadTwice(Network):
    def forward(self, x):
        y = self.acts[0](self.first(x))
        s = self.second(y) + y
        return self.acts[2](self.third(self.acts[1](s)) + s)


class SumOfBothShortcuts(Network):
    """Two convolutions' outputs, each read once: either could be the one that is written over."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[2](self.third(self.acts[1](self.second(y) + self.third(y))))


class TapPlusItself(Network):
    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.second(y + y))
        return self.acts[2](self.third(z) + self.third(z))


class Concatenation(Network):
    def __init__(self):
        super().__init__()
        self.join = nn.Conv2d(12, 6, 1)

    def forward(self, x):
        y, z = self.acts[0](self.first(x)), self.acts[1](self.first(x.flip(2)))
        return self.acts[2](self.join(torch.cat((y, z), dim=1)))


class TappedConcatenation(Network):
    """As in a dense net: the activation reads a concatenation, the next one a longer one."""

    def __init__(self):
        super().__init__()
        self.join = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        y = self.first(x)
        z = self.join(self.acts[0](y))
        both = torch.cat((y, z), dim=1)
        return self.acts[2](self.last(self.acts[1](both)))


class Slices(Network):
    """Taps of views of one tensor, and readers of slices of a tap."""

    def __init__(self):
        super().__init__()
        self.back = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        left, right = self.first(x).chunk(2, dim=1)
        y, z = self.acts[0](left), self.acts[1](right)
        return self.acts[2](self.back(y[:, :, ::2, ::2] + z[:, :, 1::2, 1::2]))


class Broadcasting(Network):
    """Gradients that arrive expanded: a mean over positions, and a sum with a vector of channels."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        gate = y.mean(dim=(2, 3), keepdim=True)
        z = self.acts[1](self.second(y) * gate.sigmoid())
        return self.acts[2](self.third(z) + z.mean(dim=(2, 3), keepdim=True))


class OneByOne(Network):
    """Taps of 1×1 positions, dense in both memory orders, whose expanded gradients have the strides of dense ones."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 8)
        self.point = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = self.acts[0](self.wide(x))
        z = self.acts[1](self.point(y) + y)
        return self.acts[2](self.point(z) + z.sum(dim=(2, 3), keepdim=True))


class OneChannel(Network):
    def __init__(self):
        super().__init__(activations=2)
        self.narrow = nn.Conv2d(3, 1, 3, padding=1)
        self.widen = nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, x):
        y = self.acts[0](self.narrow(x))
        return self.acts[1](self.widen(y) + y)


class Pools(Network):
    """Average pooling, and a max pooling whose windows overlap and share their maxima."""

    def __init__(self):
        super().__init__()
        self.average, self.overlapping = nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.second(self.overlapping(y)) + y)
        return self.acts[2](self.third(self.average(z)))


class Contiguous(Network):
    """A convolution's output forced into (C, H, W) order before its activation."""

    def forward(self, x):
        y = self.acts[0](self.first(x).contiguous())
        return self.acts[2](self.third(self.acts[1](self.second(y.contiguous()) + y)))


class GradientInTheOtherOrder(Network):
    """Gradients that are summed, so that nobody else holds them, but in (C, H, W) order."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.second(y))
        return self.acts[2](self.pool((y + z).contiguous()) - self.pool((z + y * 0.3).contiguous()) + self.pool(y + z))


class InPlaceModules(Chain):
    """ReLUs that were written in place, as in torchvision's networks."""

    def __init__(self):
        super().__init__(make=lambda: nn.ReLU(inplace=True))


class Relu6Chain(Chain):
    def __init__(self):
        super().__init__(make=nn.ReLU6)

    def forward(self, x):
        return super().forward(8 * x)


class SmoothActivations(IdentityShortcut):
    """Their derivative is no function of their output, so they stay in the graph and the tap comes after them."""

    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.SiLU(), nn.GELU(), nn.ReLU6()])


class AsksForItsShape(Network):
    """Two readers of each tap, of which one wants its size only and sends no gradient back."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.first(x.flip(3)))
        # The order of the sum decides whose gradient comes first; both have to be right.
        s = self.acts[2](y + z)
        return s.reshape(y.size(0), z.shape[1], -1)


NETWORKS = [
    Chain,
    SeveralReaders,
    IdentityShortcut,
    ShortcutOnly,
    ShortcutFromTheImages,
    InputReadTwice,
    InputIsAnImage,
    ActivationOfAnActivation,
    SumOfTaps,
    TappedSumOfTaps,
    SumReadTwice,
    SumOfBothShortcuts,
    TapPlusItself,
    Concatenation,
    TappedConcatenation,
    Slices,
    Broadcasting,
    OneByOne,
    OneChannel,
    Pools,
    Contiguous,
    GradientInTheOtherOrder,
    InPlaceModules,
    Relu6Chain,
    SmoothActivations,
    AsksForItsShape,
]
