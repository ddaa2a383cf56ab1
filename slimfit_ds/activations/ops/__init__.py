"""Autograd functions: the forward values of the original operation, a backward pass from what a codec kept."""
