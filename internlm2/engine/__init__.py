"""One training step over many ranks: optimizer, schedule, checkpoints."""
