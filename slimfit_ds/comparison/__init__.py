"""The same recipe under several strategies, side by side."""
