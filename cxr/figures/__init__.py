"""Metrics and tables to matplotlib figures, and the HTML report.

Nothing here computes statistics or knows where a figure is logged.
"""
