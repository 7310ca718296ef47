"""Data set audit: duplicates, patients in more than one split, shortcuts, distribution shift.

The audit only reports findings; it never modifies data.
"""
