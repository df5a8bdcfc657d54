"""The costs of a training step before it runs, from counted ones."""
