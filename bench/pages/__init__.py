"""`python -m bench.pages`: the tables of docs/performance.md and docs/kernels.md, from the rows in bench/results/."""
