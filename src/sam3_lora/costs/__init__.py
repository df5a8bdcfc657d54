"""What a training step of the full-size model costs, counted."""
