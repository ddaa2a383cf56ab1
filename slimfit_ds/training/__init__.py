"""The room of the training loop: recipes, data, tasks, and the run that `launch/train.py` starts."""

from slimfit_ds.training.recipe import Draft, Recipe, read_recipe

__all__ = ["Draft", "Recipe", "read_recipe"]
