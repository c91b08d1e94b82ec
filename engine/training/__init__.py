"""Time, memory and machines: the loop, its run folder, checkpoints, validation, ranks, planner."""
