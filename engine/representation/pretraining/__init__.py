"""Make extractors: train a network on a data set to classify, to tell rotations, or to encode (paper, section 5.1).

result = pretrain("vgg-small", open_dataset("digits"))
result.save("extractor.safetensors")
build_extractor("vgg-small", image_size=32, weights="extractor.safetensors")
"""

from engine.representation.pretraining.recipe import Recipe
from engine.representation.pretraining.result import PretrainResult
from engine.representation.pretraining.tasks import TASKS
from engine.representation.pretraining.training import UnfitCheckpoint, pretrain

__all__ = ["TASKS", "PretrainResult", "Recipe", "UnfitCheckpoint", "pretrain"]
