"""The preflight `slimfit-ds doctor`: is this machine, and are these machines together, ready for a run?"""
