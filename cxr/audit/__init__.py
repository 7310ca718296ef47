"""Checks of a data set: duplicates, patients across splits, shortcuts, shifts.

It reports findings and changes nothing.
"""
