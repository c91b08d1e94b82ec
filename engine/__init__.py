"""A training engine for generative feature matching (dos Santos et al., ICCV 2019, arXiv 1904.02762)."""
