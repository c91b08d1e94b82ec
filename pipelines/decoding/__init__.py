"""From the bytes of a file to a square picture: one geometry, and PIL as the reference decoder."""
