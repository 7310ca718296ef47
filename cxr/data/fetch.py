"""Downloads the Kaggle data set with kagglehub (the optional extra `kaggle`)."""

from __future__ import annotations

from pathlib import Path

from cxr.data.kaggle import find_root
from cxr.errors import UserError

HANDLE = "paultimothymooney/chest-xray-pneumonia"
_MANUALLY = f"download the data set {HANDLE} from Kaggle in a browser, unpack it, and pass the folder as --data-dir"


def fetch() -> Path:
    """Download the data set (1.2 GB, cached by kagglehub) and return the folder to pass as `--data-dir`.

    Raises `UserError` with instructions if kagglehub is not installed or Kaggle cannot be reached.
    """
    try:
        import kagglehub
    except ImportError as error:
        hint = f"use `uv run --extra kaggle cxr data fetch`, or {_MANUALLY}"
        raise UserError(f"cxr data fetch: kagglehub is not installed; {hint}") from error
    try:
        folder = kagglehub.dataset_download(HANDLE)
    except Exception as error:  # kagglehub does not wrap the errors of its HTTP stack
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"cxr data fetch: Kaggle cannot be reached ({reason}); {_MANUALLY}") from error
    return find_root(folder)
