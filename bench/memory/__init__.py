"""`python -m bench.memory`: the memory of a training step against the minibatch, beside the naive implementation.

*Measured* is the most that PyTorch's allocator holds at the same time beyond the weights, from before objective and
optimizer are made to the end of the second step, each variant in a process of its own, where at most
`--measure-up-to` is predicted. *Modelled* is the same number from `engine.training.planner`, which allocates nothing:
it is given for every size. *Resident* is the largest size of that whole process, Python and libraries included; its
baseline is the size before, with networks, libraries and compiled kernels.

`--methods` measures methods on pooled features instead, a minibatch of 4,096 in chunks of 64 in bf16. Weights of the
extractor and features of the real images are random, and three chunks of the 64 are computed, as further ones need the
same memory again (`--whole` computes all): it depends on shapes alone.
"""
