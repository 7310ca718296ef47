"""A packaged model in use: image bytes in, probability and decision out.

No training code, no tracking but in `pyfunc_model`.
"""
