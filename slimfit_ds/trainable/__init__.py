"""What trains: the layers of a model, and the columns of a layer that train."""
