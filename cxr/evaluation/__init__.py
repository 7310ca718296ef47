"""Predictions to metrics: calibration, thresholds, reports, paired statistics, the verdict.

Numbers and tables only: no plotting, no tracking, no networks.
"""
