"""Honest, fast, tracked fine-tuning of networks that look for pneumonia in chest X-rays."""

__version__ = "0.1.0"
