"""What trained, apart from the model it started from: files of it, and models with and without it."""
