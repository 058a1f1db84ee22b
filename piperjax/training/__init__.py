"""Keep going: data, optimizer, checkpoints, metrics and the training loop around the executor."""
