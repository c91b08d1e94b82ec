"""`python -m bench.kernels`: the fused operations, timed, counted and audited.

Without options, times: every operation beside the plain PyTorch formula and torch.compile's version of the same
formula, in turn, on the chosen device. A result is compared with float64 before its time is taken.

`--audit` compiles every kernel that a run launches ahead of time, for sm_80, sm_90 and sm_100 or those of `--targets`,
which needs no GPU, and reads the machine code: registers, spilled bytes, stack, shared memory, occupancy, widths of
global accesses. It fails on any spill or stack, and on aligned activations that move in less than 16 bytes per thread
and instruction.

`--bytes` counts what the kernels of moments, averager and coefficients load and store in Triton's interpreter, lane by
lane, over all taps of an extractor, against what the operations cannot do without, and against plain PyTorch and
torch.compile.

`--step` times whole training steps and the share of moments, averager and coefficients in them.

pytest-benchmark times the same calls one by one: `pytest tests/kernels/test_timings.py -o addopts= --benchmark-only`.
"""
