"""The download: what is said when it cannot be done, and the folder it gives when it can."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cxr.data.fetch import HANDLE, fetch
from cxr.errors import UserError


def install(monkeypatch: pytest.MonkeyPatch, download: Callable[[str], str]) -> None:
    """A kagglehub that downloads by the given function."""
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))


def test_without_kagglehub_it_says_how_to_get_it_and_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_offline_it_says_why_in_one_line_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(handle: str) -> str:
        raise error

    install(monkeypatch, fail)
    with pytest.raises(UserError, match=f"Kaggle cannot be reached {reason}; download") as caught:
        fetch()
    assert "--data-dir" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_gives_the_folder_that_holds_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / HANDLE / "chest_xray/chest_xray/train").mkdir(parents=True)
    install(monkeypatch, lambda handle: str(tmp_path / handle))
    assert fetch() == tmp_path / HANDLE / "chest_xray/chest_xray"


def test_a_download_that_holds_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda handle: str(tmp_path))
    with pytest.raises(UserError, match="holds no train/"):
        fetch()
