"""Predict memory before a run, and search for settings that fit."""
