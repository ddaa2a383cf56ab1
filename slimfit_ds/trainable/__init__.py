"""What trains: the units of a model, and the layers that are split into narrow ones."""
