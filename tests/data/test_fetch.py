"""The download: error messages, and the returned folder."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cxr.data.fetch import HANDLE, fetch
from cxr.errors import UserError


def install(monkeypatch: pytest.MonkeyPatch, download: Callable[[str], str]) -> None:
    """Replace kagglehub by a stub that downloads with the given function."""
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))


def test_without_kagglehub_the_error_names_the_extra_and_the_manual_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UserError, match="kagglehub is not installed") as caught:
        fetch()
    assert "uv run --extra kaggle" in str(caught.value)
    assert f"{HANDLE} from Kaggle in a browser" in str(caught.value)
    assert "--data-dir" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no route to host\nand a long story"), r"\(no route to host\)"),
        (RuntimeError(), r"\(RuntimeError\)"),
        (ValueError("x" * 500), r"\(x{160}\)"),
    ],
)
def test_offline_the_error_gives_reason_and_instructions_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(handle: str) -> str:
        raise error

    install(monkeypatch, fail)
    with pytest.raises(UserError, match=f"Kaggle cannot be reached {reason}; download") as caught:
        fetch()
    assert "--data-dir" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_with_the_splits_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / HANDLE / "chest_xray/chest_xray/train").mkdir(parents=True)
    install(monkeypatch, lambda handle: str(tmp_path / handle))
    assert fetch() == tmp_path / HANDLE / "chest_xray/chest_xray"


def test_a_download_without_the_data_set_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda handle: str(tmp_path))
    with pytest.raises(UserError, match="contains no train/"):
        fetch()
