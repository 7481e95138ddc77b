"""Methods in a Trainer: checkpoints, resuming, precision, sharding, pre-emption."""
