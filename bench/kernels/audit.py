"""Ahead-of-time compilation of every variant of the Triton kernels, and what the machine code says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.kernels.workloads import AVERAGER_OPTIONS, DTYPE_BYTES, Call, Recorder, short, triton_backend
from bench.rows import Row, print_rows
from kernels.rules import RULES

# From the CUDA C++ Programming Guide's table of compute capabilities: per multiprocessor, warps, blocks, 32-bit
# registers, and bytes of shared memory; a block reserves 1 KiB of the latter.
MULTIPROCESSORS = {80: (64, 32, 65536, 164 << 10), 90: (64, 32, 65536, 228 << 10), 100: (64, 32, 65536, 228 << 10)}
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


def _wide_accesses(call: Call) -> tuple[int, int]:
    """How many 16-byte loads and stores one thread's share of a tile, or block, needs at least: one of each tensor."""
    constants, name = call.constants, call.kernel.__name__
    threads = 32 * constants.get("num_warps", 4)
    if name.startswith("relu_moments"):
        first = call.arguments[0]
        per_tile = max(1, constants["BLOCK_N"] * constants["BLOCK_F"] * first.element_size() // (16 * threads))
        if name == "relu_moments_backward_kernel":
            return 2 * per_tile, per_tile
        streams = 1 if call.argument("residual_ptr") is None else 2
        return 2 * per_tile * streams, 2 * per_tile  # the first tile, and the loop over the others
    if name == "merge_splits_kernel":
        per_vector = max(1, constants["BLOCK_F"] * 4 // (16 * threads))
        return 2 * per_vector, 2 * per_vector
    if name == "averager_step_kernel":
        per_vector = max(1, constants["BLOCK"] * 4 // (16 * threads))
        kept = len(RULES[constants["RULE"]].state)
        state = kept if constants["ADVANCE"] else min(kept, 1)  # without a step only v is read
        loads = 4 + (call.argument("weight_ptr") is not None) + 2 * state
        return loads * per_vector, (2 + (2 * state if constants["ADVANCE"] else 0)) * per_vector
    return 0, 0


def _audit_calls() -> Iterator[tuple[Call, tuple[str, str, str]]]:
    """Every launch that the engine can make with aligned taps, with (dtype, layout, variant)."""
    ops = triton_backend()
    wide = 2 * ops.launching.NOMINAL_PROCESSORS * max(ops.launching.BLOCKS_F)
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    extras = {"": (False, False), "shortcut": (False, True), "bias, shortcut": (True, True)}
    for dtype in DTYPE_BYTES:
        for layout, memory_format in layouts.items():
            for features in (2048, 8192, 65536, wide):
                for activation in ("relu", "relu6", "none") if features == 65536 else ("relu",):
                    for extra, (bias, residual) in extras.items():
                        x = torch.empty(64, features // 16, 4, 4, dtype=dtype).to(memory_format=memory_format)
                        mean, offsets = torch.empty(features), torch.empty(features // 16, dtype=dtype)
                        with Recorder() as recorder:
                            ops.relu_moments.__wrapped__(
                                x, mean, mean, 0, offsets if bias else None, x if residual else None, activation
                            )
                            if not extra:
                                ops.relu_moments_backward.__wrapped__(x, x, mean, mean, activation)
                        for call in recorder.calls:
                            tile = [str(call.constants[key]) for key in ("BLOCK_N", "BLOCK_F") if key in call.constants]
                            details = ["×".join(tile), activation if len(tile) == 2 else "", extra]
                            if call.kernel is ops.relu_moments_kernel and call.argument("partial_ptr") is not None:
                                details.append("split")
                            if call.kernel is not ops.merge_splits_kernel or not extra:
                                yield call, (short(dtype), layout, ", ".join(filter(None, details)))
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
                details = [rule, "" if advance else "no step", "" if weight is None else "weighted"]
                first, second = recorder.calls
                yield first, ("float32", "any", ", ".join(filter(None, details)))
                yield second, ("float64", "any", "counts the step" if second.constants["ADVANCE"] else "")


def _audit_jobs(capabilities: Sequence[int]) -> list[_Job]:
    """One job per variant and target; a variant that both layouts share is compiled once."""
    seen: dict[str, tuple[Call, list[tuple[str, str, str]]]] = {}
    for call, labels in _audit_calls():
        seen.setdefault(specialisation(call), (call, []))[1].append(labels)
    jobs = []
    for call, sources in seen.values():
        dtype, layout, variant = sources[0]
        if len({source[1] for source in sources}) > 1:
            layout = "both"
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
    """Bytes per thread of every `instruction` (LDG, STG, LDL, STL) in SASS."""
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
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: no resource usage of {job.kernel}: {usage.strip()}")
    registers, stack = (int(value) for value in found.groups())
    loads, stores = _accesses(code, "LDG"), _accesses(code, "STG")
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
    jobs = [job for job in _audit_jobs(capabilities) if only in job.kernel]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_audit_one, jobs))


def print_audit(rows: Sequence[AuditRow]) -> None:
    """Print the variants, then every violation, then how many there are."""
    print_rows(rows)
    bad = [row for row in rows if row.violations]
    for row in bad:
        print(f"violation: {row.kernel}, {row.dtype}, {row.variant}, {row.target}: {'; '.join(row.violations)}")
    print(f"\n{len(rows)} variants, {len(bad)} violations")
