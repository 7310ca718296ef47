"""The network: its stages, weights, freezing and the proof of it, inference, Grad-CAM.

No training loop, no files of runs.
"""
