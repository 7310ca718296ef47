"""Numbers to matplotlib figures, and the HTML report.

Nothing here computes a statistic or knows where a figure is logged.
"""
