"""The paper's experiments, one command each: `python -m bench.paper --experiment NAME`."""
