"""What a method does in a Trainer: checkpoints, resuming, precision, sharding, pre-emption."""
