"""One training step each of everything that learns."""
