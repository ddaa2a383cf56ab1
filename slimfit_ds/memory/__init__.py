"""Measure the memory, traffic and time of training steps. Knows nothing of engines or plans."""
