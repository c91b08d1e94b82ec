"""Critics with an extractor's architecture, whose weights learn."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from engine.representation.build import load_weights
from engine.representation.critics.activation import Rectified
from engine.representation.critics.critic import CriticSpec, LinearCritic
from engine.representation.extractor import Normalisation
from engine.representation.tracing.folding import drop_identities, fold_batchnorm
from engine.representation.zoo import make_network

ARCHITECTURE_CRITICS = ("vgg-small", "vgg19", "resnet18")


class ArchitectureCritic(LinearCritic):
    """An extractor's network up to its global average, and a linear layer (dos Santos et al. 2019, appendix: WGAN-GP
    with critics of VGG19's and ResNet18's architecture).

    These networks have BatchNorm, which stays with the norm "batch". With every other it is folded into the
    convolutions: at pretrained weights that is the same network by its running statistics.

    Args:
        weights: None for random ones (He initialisation without BatchNorm, as the networks have it otherwise), a file,
            or "imagenet"; see `build_extractor`.

    Raises InputError about `name` if the network cannot take images of this size, about `weights` or the file if they
    don't fit.
    """

    def __init__(self, spec: CriticSpec, weights: str | Path | None = None):
        network = make_network(spec.name, spec.image_size)
        classifier = network.module.classifier
        assert isinstance(classifier, nn.Linear)
        super().__init__(spec, classifier.in_features)
        network.module.classifier = nn.Identity()
        if weights is not None:
            load_weights(network, network.module, weights)
        body: nn.Module = network.module
        if spec.norm != "batch":
            body = _folded(network.module)
            if weights is None:
                body.apply(_initialise_he)
        if network.mean is not None and network.std is not None:
            body = nn.Sequential(Normalisation(network.mean, network.std), body)
        self.body = body.train().requires_grad_()

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to [N, C], the means over positions."""
        return self.body(images)


def _folded(module: nn.Module) -> nn.Module:
    graph_module = fx.symbolic_trace(module)
    drop_identities(graph_module)
    fold_batchnorm(graph_module)
    _rectify(graph_module)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def _rectify(graph_module: fx.GraphModule) -> None:
    """Put a `Rectified` in the place of every ReLU, module or function."""
    names = (f"rectified{number}" for number in itertools.count())
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        function = node.op == "call_function" and node.target in (F.relu, torch.relu)
        if not function and not (node.op == "call_module" and isinstance(modules[node.target], nn.ReLU)):
            continue
        name = next(names)
        graph_module.add_submodule(name, Rectified(0.0))
        node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}


def _initialise_he(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
