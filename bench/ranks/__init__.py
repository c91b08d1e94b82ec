"""`python -m bench.ranks`: what several ranks cost, and that they take the step of one.

Four tables. *Equality*: jobs of W processes against one, in float64. *Bytes*: what a step of W ranks hands to
collectives, counted by wrapping them, beside the formula. *Times*: one rank of two threads against two ranks of one
thread, taking turns, and what the calls of ranks cost a run that has no others. *Scaling*: modelled from assumed
bandwidths and latencies (`bench.ranks.model`); nothing of it is measured.
"""
