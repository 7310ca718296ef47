"""Images from a folder to batches: manifest, splits, decoding, the store, views.

No network, no labels but the manifest's.
"""
