"""What the audit takes for launched is what steps launch; whether Triton compiles is settled at its import, so in other
processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def _python(code: str) -> list[list[str]]:
    """What `code` prints, a line of JSON each, without the interpreter and with one run alone in the audit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _ONE_RUN + code]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


_ONE_RUN = """
import json
from unittest.mock import patch

import torch

from bench.kernels import audit, launched
from kernels.triton import launching, moments

config = launched.configuration("cifar10", "bf16", extractor="vgg19")
patch.object(launched, "configurations", lambda: [config]).start()


def show(lines):
    print(json.dumps(sorted(lines)))
"""

_WHAT_IS_AUDITED = """
show({" ".join((call.kernel.__name__, *audit.described(call))) for call, _ in audit.audited().values()})
"""


def test_everything_that_a_run_launches_is_audited() -> None:
    (audited,) = _python(_WHAT_IS_AUDITED)
    assert {
        # A training step, and the statistics pass of the same run.
        "relu_moments_kernel bfloat16 64×64, relu, bias, split",
        "relu_moments_kernel bfloat16 32×64, relu, bias, split, float64 sums",
        "merge_splits_kernel bfloat16 512, float64 sums",
        # A run's evaluation steps no averager; a network of one's own has all that aligned taps have not.
        "averager_step_kernel float32 ama, no step",
        "relu_moments_kernel float16 64×64, relu, bias, 1 feature",
        "relu_moments_kernel float32 64×64, relu, bias, shortcut, unaligned",
        "relu_moments_backward_kernel bfloat16 64×64, relu, shortcut, unaligned",
        "relu_moments_kernel float64 32×64, none, unaligned",
        "averager_step_kernel float64 ama, unaligned",
    } <= set(audited)


_ON_REAL_TENSORS = """
from engine.comparison.averagers import AMA
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.representation.build import build_extractor

audit.audited()
extractor, listener = build_extractor("vgg19", image_size=32), launched.Listener()
ones = torch.ones(extractor.num_features, dtype=torch.float64)
# As on CUDA, where convolutions apply no activation.
with patch("engine.representation.extractor.can_fuse", lambda weight: False):
    objective = MomentMatching(
        extractor, Moments(50, ones, ones), AMA(), kernels=listener.backend(), amp_dtype=torch.bfloat16
    )
objective(torch.zeros(64, 3, 32, 32, requires_grad=True)).backward()
show({call.kernel.__name__ for call in listener.calls})
show(audit.missing(listener.calls))
"""


@pytest.mark.slow
def test_fake_tensors_launch_what_real_ones_do() -> None:
    kernels, missing = _python(_ON_REAL_TENSORS)
    assert kernels == [
        "averager_step_kernel", "merge_splits_kernel", "relu_moments_backward_kernel", "relu_moments_kernel",
        "sum_partials_kernel",
    ]  # fmt: skip
    assert missing == []


_WITH_CHANGES = """
audit.audited()
show(audit.missing(launched.of_run(config)))
with patch.object(moments, "NUM_WARPS", 4):
    show(audit.missing(launched.of_run(config)))
with patch.object(moments, "BLOCK_MERGE", 1024):
    show(audit.missing(launched.of_run(config)))
show(audit.missing(launched.of_run(launched.configuration("cifar10", "fp16", extractor="vgg19"))))
"""


@pytest.mark.slow
def test_a_variant_that_the_audit_lacks_is_found() -> None:
    """Another number of warps, another block, or a precision that nobody has told the audit of."""
    same, warps, merge, precision = _python(_WITH_CHANGES)
    assert same == []
    assert {line.split()[0] for line in warps} == {"relu_moments_kernel", "relu_moments_backward_kernel"}
    assert merge == ["merge_splits_kernel bfloat16 1024", "merge_splits_kernel bfloat16 1024, float64 sums"]
    assert "relu_moments_kernel float16 16×128, relu, bias, float64 sums" in precision


_OTHER_KERNELS = """
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from bench.kernels.workloads import taps_of
from engine.comparison.averagers import AMA
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.reference.target import fake_target
from engine.representation.build import build_extractor
from engine.training.planner import FakeMode, fake_copy

counts = Counter()


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 4 and result.shape[1] > 3 and not func.is_view:
            counts[func.overloadpacket.__name__] += 1
        return result


mode, listener = FakeMode(), launched.Listener()
extractor = fake_copy(build_extractor("vgg19+resnet18", image_size=32), mode, torch.bfloat16)
with mode:
    target = fake_target(extractor.num_features)
    objective = MomentMatching(extractor, target, AMA(), kernels=listener.backend())
    loss = objective(torch.empty(64, 3, 32, 32, requires_grad=True))
    with Operators():
        loss.backward()
backward = [call for call in listener.calls if call.kernel.__name__ == "relu_moments_backward_kernel"]
shortcuts = sum(call.argument("shortcut_ptr") is not None for call in backward) // len(launched.PROCESSORS)
readers = Counter(tap.readers for tap in taps_of("vgg19+resnet18", 32))
show([f"{name} {count}" for name, count in counts.items()])
show([f"zeros_like {readers[0]}", f"shortcuts {readers[2]}"])
show([f"zeros_like {counts['zeros_like']}", f"shortcuts {shortcuts}"])
"""


def test_gradients_are_summed_where_the_bytes_table_says() -> None:
    """Two go into the tap's kernel, zeros stand for none, and nothing else is launched for them."""
    operators, expected, found = _python(_OTHER_KERNELS)
    assert found == expected == ["shortcuts 7", "zeros_like 2"]
    assert {line.split()[0] for line in operators} <= {
        "convolution", "convolution_backward", "conv_transpose2d", "max_pool2d_with_indices_backward", "zeros_like",
    }, "no addition, no copy"  # fmt: skip
