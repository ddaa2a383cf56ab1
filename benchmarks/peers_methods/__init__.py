"""The ways to train that `benchmarks/peers.py` compares, and how one of them is measured."""
