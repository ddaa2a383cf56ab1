"""Freeze-aware optimizer arithmetic on flat shards: update rules, states and where they live."""
