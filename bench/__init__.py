"""Benchmarks: every number that the project states comes from one of these."""
