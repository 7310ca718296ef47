"""The training loop and what feeds it: batches, reuse of the frozen prefix, checkpoints, several processes.

It yields records and knows neither MLflow nor Optuna, nor what is done with its result.
"""
