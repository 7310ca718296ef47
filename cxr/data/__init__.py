"""From a folder of X-rays to batches of views."""
