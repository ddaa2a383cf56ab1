"""What memory is used (tracker, saved), what would be used (estimator), and what fits (planner)."""
