"""From a pair of checkpoints to a verified adapter."""
