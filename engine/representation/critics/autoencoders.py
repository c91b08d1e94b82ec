"""Critics that reproduce images: BEGAN's, and the encoder and decoder of Li's MMD-GAN."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from engine.representation.critics.convolutional import DCGANCritic, dcgan_widths
from engine.representation.critics.critic import Critic, CriticSpec
from engine.support.initialise import initialise_normal

_WIDTH, _CODE, _BOTTOM_SIDE = 64, 64, 8


class AutoencoderCritic(Critic):
    """BEGAN's critic (Berthelot et al. 2017, section 3.5): how badly an autoencoder reproduces an image,

        ℓ(x) = mean over channels and positions of |x − dec(enc(x))|        [N, 1]

    3×3 convolutions in pairs, ELU after each. The encoder's have n, 2n, 3n, … channels, one pair for every side down to
    8×8 and a convolution of stride 2 between two; a linear layer goes to the code. The decoder has a linear layer to
    8×8, and pairs of n channels with nearest upsampling between two. n and the code are 64. Xavier initialisation, zero
    biases.
    """

    def __init__(self, spec: CriticSpec):
        super().__init__(spec)
        sides = (spec.image_size // _BOTTOM_SIDE).bit_length()
        widths = [_WIDTH * (stage + 1) for stage in range(sides)]
        encoder = _convolution(3, _WIDTH)
        decoder: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage > 0:
                encoder += _convolution(widths[stage - 1], width, stride=2)
                decoder.append(nn.Upsample(scale_factor=2, mode="nearest"))
            encoder += _convolution(width, width) + _convolution(width, width)
            decoder += _convolution(_WIDTH, _WIDTH) + _convolution(_WIDTH, _WIDTH)
        positions = _BOTTOM_SIDE**2
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(positions * widths[-1], _CODE))
        bottom = nn.Unflatten(1, (_WIDTH, _BOTTOM_SIDE, _BOTTOM_SIDE))
        last = nn.Conv2d(_WIDTH, 3, 3, padding=1)
        self.decoder = nn.Sequential(nn.Linear(_CODE, positions * _WIDTH), bottom, *decoder, last)
        self.apply(_initialise)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to codes [N, 64]."""
        return self.encoder(images)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, 64] to images [N, 3, H, W], not confined to [-1, 1]."""
        return self.decoder(codes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to ℓ [N, 1]."""
        return (images - self.decode(self.features(images))).abs().mean(dim=(1, 2, 3)).unsqueeze(1)


class EncoderDecoderCritic(DCGANCritic):
    """The critic of Li et al. 2017 (MMD-GAN): DCGAN's, whose outputs φ(x) [N, F] a decoder turns into images again.

    The decoder mirrors it: transposed 4×4 convolutions from 1×1, each but the last followed by ReLU, and by BatchNorm
    before that if the critic has it; tanh. Spectral normalisation leaves it alone, since φ does not depend on it.
    """

    def __init__(self, spec: CriticSpec):
        super().__init__(spec)
        widths = dcgan_widths(spec.image_size)[::-1]
        layers: list[nn.Module] = [nn.Unflatten(1, (spec.outputs, 1, 1))]
        for channels, width in itertools.pairwise((spec.outputs, *widths)):
            stride, padding = (1, 0) if channels == spec.outputs and len(layers) == 1 else (2, 1)
            layers.append(nn.ConvTranspose2d(channels, width, 4, stride, padding))
            if spec.norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
        self.decoder = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 4, 2, padding=1), nn.Tanh())
        self.decoder.apply(initialise_normal)

    @property
    def beside(self) -> list[nn.Module]:
        """What φ does not depend on."""
        return [self.decoder]

    def decode(self, codes: Tensor) -> Tensor:
        """φ [N, F] to images [N, 3, H, W] in [-1, 1]."""
        return self.decoder(codes)


def _convolution(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, padding=1), nn.ELU()]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
