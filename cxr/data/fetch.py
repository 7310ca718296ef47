"""The Kaggle data set, downloaded with kagglehub (the optional extra `kaggle`)."""

from __future__ import annotations

from pathlib import Path

from cxr.data.kaggle import find_root
from cxr.errors import UserError

HANDLE = "paultimothymooney/chest-xray-pneumonia"
_BY_HAND = f"download the data set {HANDLE} from Kaggle in a browser, unpack it, and name the folder with --data-dir"


def fetch() -> Path:
    """Download (1.2 GB, once; kagglehub keeps it) and return the folder to give as `--data-dir`.

    Raises `UserError` saying what to do when kagglehub is not installed or Kaggle cannot be reached.
    """
    try:
        import kagglehub
    except ImportError as error:
        hint = f"`uv run --extra kaggle cxr data fetch` brings it, or {_BY_HAND}"
        raise UserError(f"cxr data fetch: kagglehub is not installed; {hint}") from error
    try:
        folder = kagglehub.dataset_download(HANDLE)
    except Exception as error:  # kagglehub lets through whatever its HTTP stack raises
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"cxr data fetch: Kaggle cannot be reached ({reason}); {_BY_HAND}") from error
    return find_root(folder)
