"""Models: towers, configs, checkpoints, teachers."""
