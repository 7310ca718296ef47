"""Predictions to figures: metrics, calibration, thresholds, reports, paired statistics, the verdict.

Numbers and tables only: no drawing, no tracking, no networks.
"""
