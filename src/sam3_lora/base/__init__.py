"""Base models: Meta's SAM3, the tiny SAM3, or the full size with random weights."""
