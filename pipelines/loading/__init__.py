"""How images reach the device: batches, order and shards, and the two backends."""
