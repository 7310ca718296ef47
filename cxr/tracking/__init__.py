"""The only way to MLflow: runs, parents, the registry, and the one reader of logged runs.

Nothing here trains or evaluates.
"""
