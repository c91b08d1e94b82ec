"""The target: moments of the whole real dataset, computed once and cached by fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging

import torch
from tqdm import tqdm

import kernels as kernel_backends
from engine.extractors import Extractor
from engine.feature_pass import FeaturePass
from engine.matching import FeatureOrder, MomentCollector, target_fingerprint
from engine.moments import Moments
from kernels.layout import accumulation_dtype
from pipelines import ImageDataset, ImageLoader, cache_folder

log = logging.getLogger("gfmn")


def target_loader(
    extractor: Extractor, dataset: ImageDataset, *, batch_size: int, seed: int, loader: str = "auto"
) -> ImageLoader:
    """The images in the order of a target pass: shuffled with `seed` where batch statistics make minibatches matter."""
    return ImageLoader(
        dataset,
        batch_size,
        device=str(extractor.device),
        backend=loader,
        shuffle=extractor.batch_statistics,
        seed=seed,
    )


def fingerprint(extractor: Extractor, images: ImageLoader, amp_dtype: torch.dtype | None) -> dict[str, str]:
    """Everything that decides a target's values: extractor, precision, images, and who decodes them.

    Batch statistics (`--extractor-bn batch`) depend on the minibatches too, so there their size and seed count.
    """
    entries = {f"data_{name}": str(value) for name, value in images.fingerprint().items()}
    if extractor.batch_statistics:
        entries["minibatches"] = f"{images.batch_size} shuffled with seed {images.seed}"
    return {**target_fingerprint(extractor, amp_dtype), **entries}


def compute_target(
    extractor: Extractor,
    images: ImageLoader,
    *,
    amp_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    progress: bool = True,
) -> Moments:
    """Stream every image once through the extractor and merge the batches' moments in float64.

    With running statistics the result depends neither on the batch size nor on the order.
    """
    feature_pass = FeaturePass(extractor, dtype=amp_dtype)
    backend = kernel_backends.select(kernels, extractor.device, feature_pass.dtype)
    order = FeatureOrder(extractor.taps)
    total = torch.zeros(extractor.num_features, dtype=torch.float64, device=extractor.device)
    moments = Moments(0, total, total.clone())
    count = len(images.dataset)
    with tqdm(total=count, desc="target moments", unit="image", disable=None if progress else True) as bar:
        for batch in images:
            collector = MomentCollector(extractor, order, backend, accumulation_dtype(feature_pass.dtype))
            feature_pass.collect(batch.images, collector)
            moments = moments.merge(Moments(collector.count, collector.mean, collector.m2))
            bar.update(len(batch.images))
    return Moments(
        moments.count,
        order.to_public(moments.mean),
        order.to_public(moments.m2),
        fingerprint(extractor, images, amp_dtype),
    )


def cached_target(
    extractor: Extractor,
    dataset: ImageDataset,
    *,
    amp_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
    loader: str = "auto",
) -> Moments:
    """`compute_target`, or its result from the cache folder if it was computed before from exactly the same things."""
    images = target_loader(extractor, dataset, batch_size=batch_size, seed=seed, loader=loader)
    expected = fingerprint(extractor, images, amp_dtype)
    digest = hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "targets" / f"{digest}.safetensors"
    if path.exists():
        log.info("target moments: cached in %s", path)
        return Moments.load(path, expected)
    moments = compute_target(extractor, images, amp_dtype=amp_dtype, kernels=kernels)
    moments.save(path)
    return moments
