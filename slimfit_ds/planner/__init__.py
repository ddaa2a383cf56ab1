"""Predict the memory of training steps, and find settings that fit a budget."""
