"""Ahead-of-time compilation of every variant of the Triton kernels, and what the machine code says."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from bench.kernels.launched import launched
from bench.kernels.workloads import AVERAGER_OPTIONS, DTYPE_BYTES, Call, Recorder, short, triton_backend
from bench.rows import Row, print_rows
from kernels.profiles import PROFILES
from kernels.rules import RULES

# From the CUDA C++ Programming Guide's table of compute capabilities: per multiprocessor, warps, blocks, 32-bit
# registers, and bytes of shared memory; a block reserves 1 KiB of the latter.
MULTIPROCESSORS = {80: (64, 32, 65536, 164 << 10), 90: (64, 32, 65536, 228 << 10), 100: (64, 32, 65536, 228 << 10)}
# Of each kernel, the tensors of whose accesses the audit asks 16 bytes, and what a launch can do without.
_STREAMS = {
    "relu_moments_kernel": ("x_ptr", "residual_ptr"),
    "relu_moments_backward_kernel": ("grad_ptr", "y_ptr", "shortcut_ptr"),
    "merge_splits_kernel": ("mean_ptr", "m2_ptr", "partial_ptr"),
    "averager_step_kernel": (
        "mean_ptr", "m2_ptr", "target_mean_ptr", "target_variance_ptr", "weight_ptr", "v_ptr", "m_ptr", "u_ptr",
        "a_ptr", "b_ptr",
    ),
    "pairwise_sums_kernel": ("x_ptr", "y_ptr"),
    "weighted_rows_kernel": ("slopes_ptr", "y_ptr"),
    "nearest_kernel": ("x_ptr", "y_ptr"),
}  # fmt: skip
# Those that see images, and so a layout.
_OF_IMAGES = ("relu_moments_kernel", "relu_moments_backward_kernel", "merge_splits_kernel")
_OF_PAIRS = ("pairwise_sums_kernel", "weighted_rows_kernel", "nearest_kernel")
_OPTIONAL = {"bias_ptr": "bias", "residual_ptr": "shortcut", "shortcut_ptr": "shortcut", "weight_ptr": "weighted"}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32, "ENL2": 32}


@dataclass(frozen=True)
class AuditRow(Row):
    """One compiled variant.

    Attributes:
        spilled: bytes per thread that the code stores to local memory.
        stack, shared: bytes, per thread and per block.
        occupancy: share of a multiprocessor's warps that fit, by registers, shared memory and blocks.
        widest_load, widest_store: bytes of one thread's widest global access.
        violations: empty if the variant is as it should be.
    """

    kernel: str
    dtype: str
    layout: str
    variant: str
    target: str
    registers: int
    spilled: int
    stack: int
    shared: int
    occupancy: float
    widest_load: int
    widest_store: int
    violations: tuple[str, ...]

    def cells(self) -> dict[str, object]:
        """Everything but the violations, which `print_audit` lists below the table."""
        return {
            "kernel": self.kernel.removesuffix("_kernel"),
            "dtype": self.dtype,
            "layout": self.layout,
            "variant": self.variant,
            "target": self.target,
            "registers": self.registers,
            "spilled": self.spilled,
            "stack": self.stack,
            "shared": self.shared,
            "occupancy": f"{self.occupancy:.0%}",
            "widest load": self.widest_load,
            "widest store": self.widest_store,
        }


@dataclass(frozen=True)
class _Job:
    """A kernel's compilation, in values that another process understands."""

    kernel: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    capability: int
    wide_loads: int
    wide_stores: int
    labels: tuple[str, str, str] = field(compare=False)


def _bind(call: Call, capability: int) -> tuple[Any, dict[str, str], dict, dict]:
    """Options, signature, constants and attributes: what Triton makes of the launch's arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    compiler = make_backend(GPUTarget("cuda", capability, 32))
    binder = create_function_from_signature(call.kernel.signature, call.kernel.params, compiler)
    constants = {**call.constants, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = binder(*call.arguments, **constants)
    return call.kernel._pack_args(compiler, constants, bound, specialization, options)


def specialisation(call: Call) -> str:
    """Equal for launches that run the same compiled kernel."""
    options, signature, constants, attributes = _bind(call, 90)
    return repr((call.kernel.__name__, signature, constants, attributes, options.num_warps))


def _is_aligned(call: Call, pointers: Sequence[str]) -> bool:
    """Whether Triton knows that rows of these tensors begin at multiples of 16 bytes."""
    given = [call.argument(name) for name in pointers]
    return call.argument("features") % 16 == 0 and all(x is None or x.data_ptr() % 16 == 0 for x in given)


def _wide_accesses(call: Call) -> tuple[int, int]:
    """How many 16-byte loads and stores one thread's share of a tile, or block, needs at least: one of each tensor."""
    constants, name = call.constants, call.kernel.__name__
    threads = 32 * constants.get("num_warps", 4)
    if name not in _STREAMS or not _is_aligned(call, _STREAMS[name]):
        return 0, 0  # sum_partials, and whatever else moves a few numbers in one program
    if name.startswith("relu_moments"):
        first = call.arguments[0]
        per_tile = max(1, constants["BLOCK_N"] * constants["BLOCK_F"] * first.element_size() // (16 * threads))
        loads = per_tile * sum(call.argument(name) is not None for name in _STREAMS[name])
        if name == "relu_moments_backward_kernel":
            return loads, per_tile
        return 2 * loads, 2 * per_tile * constants["CHANGES"]  # the first tile, and the loop over the others
    if name in _OF_PAIRS:
        size = call.arguments[0].element_size()
        sides = constants["BLOCK_N"] + constants.get("BLOCK_M", constants.get("BLOCK_F", 0))
        return max(2, sides * constants["BLOCK_K"] * size // (16 * threads)), 0
    mean = call.argument("mean_ptr")
    if name == "merge_splits_kernel":
        per_vector = max(1, constants["BLOCK_F"] * mean.element_size() // (16 * threads))
        return 2 * per_vector, 2 * per_vector
    per_vector = max(1, constants["BLOCK"] * mean.element_size() // (16 * threads))
    kept = len(RULES[constants["RULE"]].state)
    state = kept if constants["ADVANCE"] else min(kept, 1)  # without a step only v is read
    loads = 4 + (call.argument("weight_ptr") is not None) + 2 * state
    return loads * per_vector, (2 + (2 * state if constants["ADVANCE"] else 0)) * per_vector


def _designed_calls() -> Iterator[tuple[Call, str]]:
    """Both layouts of aligned taps, every rule and its weights, whoever has them; with the layout."""
    ops = triton_backend()
    wide = 2 * ops.launching.NOMINAL_PROCESSORS * max(ops.launching.BLOCKS_F)
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    for dtype in DTYPE_BYTES:
        for layout, memory_format in layouts.items():
            for features in (2048, 8192, 65536, wide):
                for activation in ("relu", "relu6", "none") if features == 65536 else ("relu",):
                    x = torch.empty(64, features // 16, 4, 4, dtype=dtype).to(memory_format=memory_format)
                    mean, offsets = torch.empty(features), torch.empty(features // 16, dtype=dtype)
                    added = ((None, None), (None, x), (offsets, None), (offsets, x))
                    with Recorder() as recorder:
                        for bias, residual in added if activation == "relu" else added[:1]:
                            ops.relu_moments.__wrapped__(x, mean, mean, 0, bias, residual, activation)
                        for shortcut in (None, x) if activation == "relu" else (None,):
                            ops.relu_moments_backward.__wrapped__(x, x, mean, mean, activation, shortcut)
                    for call in recorder.calls:
                        yield call, layout
    for rule in RULES:
        for advance in (True, False):
            for weight in (None, torch.empty(65536)):
                vector, state = torch.empty(65536), torch.empty(2, 65536)
                options = {**AVERAGER_OPTIONS, "rule": rule, "advance": advance, "weight": weight}
                with Recorder() as recorder:
                    step = torch.zeros((), dtype=torch.int64)
                    ops.averager_step.__wrapped__(
                        vector, vector, 64, vector, vector, state, state, state, step, **options
                    )
                yield from ((call, "any") for call in recorder.calls)


def _calls_of_pairs() -> Iterator[Call]:
    """Every kernel of two sets; what is paired with itself, or has other parameters, runs the same."""
    ops = triton_backend()
    for dtype in (torch.float32, torch.float64):
        with FakeTensorMode(), Recorder(ops.launching.NOMINAL_PROCESSORS) as recorder:
            x, y = torch.empty(512, 512, dtype=dtype), torch.empty(4096, 512, dtype=dtype)
            for kernel, profile in PROFILES.items():
                for gradient in (True, False):
                    ops.pairwise_sums.__wrapped__(x, y, kernel, [2.0] * profile.least, True, gradient)
            ops.nearest.__wrapped__(x, y)
        yield from recorder.calls


def described(call: Call) -> tuple[str, str]:
    """(dtype, variant) of a launch, as the table shows them."""
    constants, name = call.constants, call.kernel.__name__
    dtype = short(call.arguments[0].dtype)
    if name not in _STREAMS:
        return dtype, "counts the step" if constants.get("ADVANCE") else ""
    if name in _OF_PAIRS:
        details = [
            constants.get("KERNEL", ""),
            "×".join(str(v) for k, v in constants.items() if k.startswith("BLOCK_")),
        ]
        if name == "pairwise_sums_kernel":
            details.append("gradient" if call.argument("slopes_ptr") is not None else "")
        return dtype, ", ".join(filter(None, details))
    if name == "averager_step_kernel":
        details = [constants["RULE"], "" if constants["ADVANCE"] else "no step"]
    else:
        details = ["×".join(str(constants[key]) for key in ("BLOCK_N", "BLOCK_F") if key in constants)]
        details.append(constants.get("ACTIVATION", ""))
    given = {key for key in call.kernel.arg_names if key.endswith("_ptr") and call.argument(key) is not None}
    details += [word for key, word in _OPTIONAL.items() if key in given]
    if name == "relu_moments_kernel" and "partial_ptr" in given:
        details.append("split")
    sums = "a_ptr" if name == "relu_moments_backward_kernel" else "mean_ptr"
    if call.argument(sums).dtype == torch.float64 and dtype != "float64":
        details.append("float64 sums")
    if not _is_aligned(call, sorted(given)):
        details.append("1 feature" if call.argument("features") == 1 else "unaligned")
    return dtype, ", ".join(filter(None, details))


@functools.cache
def audited() -> dict[str, tuple[Call, str]]:
    """What is audited: launches and their layouts, by specialisation."""
    found: dict[str, tuple[Call, str]] = {}
    others = ((call, "channels_last") for call in itertools.chain(launched(), _calls_of_pairs()))
    for call, layout in itertools.chain(_designed_calls(), others):
        if call.kernel.__name__ not in _OF_IMAGES:
            layout = "any"
        key = specialisation(call)
        known, its_layout = found.setdefault(key, (call, layout))
        if its_layout != layout:
            found[key] = known, "both"
    return found


def missing(calls: Iterable[Call]) -> list[str]:
    """Those of `calls` that run a kernel which the audit does not compile, a line each."""
    known = audited()
    found = (call for call in calls if specialisation(call) not in known)
    return sorted({" ".join((call.kernel.__name__, *described(call))) for call in found})


def _audit_jobs(capabilities: Sequence[int], only: str = "") -> list[_Job]:
    """One job per variant of the kernels whose names contain `only`, and target."""
    jobs = []
    for call, layout in audited().values():
        if only not in call.kernel.__name__:
            continue
        dtype, variant = described(call)
        for capability in capabilities:
            options, signature, constants, attributes = _bind(call, capability)
            jobs.append(
                _Job(
                    call.kernel.__name__, signature, constants, attributes, dict(options.__dict__), capability,
                    *_wide_accesses(call), labels=(dtype, layout, variant),
                )
            )  # fmt: skip
    return jobs


def _accesses(code: str, instruction: str) -> list[int]:
    """Bytes per thread of every `instruction` (LDG, LDGSTS, STG, LDL, STL) in SASS."""
    widths = []
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        widths.append(next((_WIDTHS[part] for part in modifiers.split(".") if part in _WIDTHS), 4))
    return widths


def _occupancy(registers: int, shared: int, warps: int, capability: int) -> float:
    most_warps, most_blocks, most_registers, most_shared = MULTIPROCESSORS[capability]
    per_warp = 256 * -(-registers * 32 // 256)  # registers are handed out 256 at a time
    blocks = min(most_blocks, most_warps // warps, most_registers // (per_warp * warps), most_shared // (shared + 1024))
    return blocks * warps / most_warps


def _audit_one(job: _Job) -> AuditRow:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(getattr(triton_backend(), job.kernel), job.signature, job.constants, job.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=job.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "--print-code", "--no-dataflow", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: no resource usage of {job.kernel}: {usage.strip()}")
    registers, stack = (int(value) for value in found.groups())
    # LDGSTS loads into shared memory while the products of the tiles before are computed.
    loads, stores = _accesses(code, "LDG") + _accesses(code, "LDGSTS"), _accesses(code, "STG")
    spilled = sum(_accesses(code, "STL"))
    violations = []
    if spilled or _accesses(code, "LDL"):
        violations.append(f"spills {spilled} bytes")
    if stack:
        violations.append(f"uses {stack} bytes of stack")
    for what, widths, needed in (("loads", loads, job.wide_loads), ("stores", stores, job.wide_stores)):
        wide = sum(width // 16 for width in widths)
        if wide < needed:
            violations.append(f"{wide} 16-byte {what}, {needed} needed")
    dtype, layout, variant = job.labels
    return AuditRow(
        kernel=job.kernel,
        dtype=dtype,
        layout=layout,
        variant=variant,
        target=f"sm_{job.capability}",
        registers=registers,
        spilled=spilled,
        stack=stack,
        shared=compiled.metadata.shared,
        occupancy=_occupancy(registers, compiled.metadata.shared, job.options["num_warps"], job.capability),
        widest_load=max(loads, default=0),
        widest_store=max(stores, default=0),
        violations=tuple(violations),
    )


def audit(capabilities: Sequence[int] = tuple(MULTIPROCESSORS), only: str = "") -> list[AuditRow]:
    """Compile and read all variants of the kernels whose names contain `only`."""
    if triton_backend().INTERPRETED:
        raise RuntimeError("--audit compiles the kernels, which TRITON_INTERPRET=1 prevents: unset it")
    jobs = _audit_jobs(capabilities, only)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_audit_one, jobs))


def print_audit(rows: Sequence[AuditRow]) -> None:
    """Print the variants, then every violation, then how many there are."""
    print_rows(rows)
    bad = [row for row in rows if row.violations]
    for row in bad:
        print(f"violation: {row.kernel}, {row.dtype}, {row.variant}, {row.target}: {'; '.join(row.violations)}")
    print(f"\n{len(rows)} variants, {len(bad)} violations")
