"""Studies of several runs: a search, a comparison, a cross-validation.

Each is a parent run with child runs.
"""
