"""Several runs that answer one question: a search, a comparison, a cross-validation.

Each is a parent run with children.
"""
