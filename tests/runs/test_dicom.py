"""A run on DICOM from training to serving; nothing that identifies a person leaves the files."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from command import run_main
from dicoms import SECRETS, as_dicoms
from narrow import ARCH

OPTIONS = ("--arch", ARCH, "--weights", "random", "--image-size", "64", "--epochs", "1", "--bootstrap", "20")


def holders(folder: Path) -> list[str]:
    """The files below a folder that hold or bear the planted name, id or date."""
    found = []
    for file in folder.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        found += [f"{secret} in {file}" for secret in SECRETS if secret.encode() in data or secret in file.name]
    return found


@pytest.mark.slow
def test_nothing_from_a_header_or_a_path_reaches_the_store_the_cache_or_the_console(
    phantoms: Path,
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, tracking = as_dicoms(phantoms, tmp_path / "data"), tmp_path / "tracking"
    tracking.mkdir()
    uri = f"sqlite:///{tracking / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("cxr", artifact_location=str(tracking / "artifacts"))
    broken = folder / "train" / "NORMAL" / f"{SECRETS[0]}-broken.dcm"
    broken.write_bytes(next(folder.glob("*/*/*.dcm")).read_bytes()[:-500])
    try:
        assert run_main(monkeypatch, "train", *OPTIONS, "--data-dir", str(folder)) == 2
        assert run_main(monkeypatch, "train", *OPTIONS, "--data-dir", str(folder), "--on-bad-image", "skip") == 0
        broken.unlink()
        assert run_main(monkeypatch, "evaluate", "--data-dir", str(folder), "--bootstrap", "0") == 0
        assert run_main(monkeypatch, "evaluate", "--data-dir", str(folder / "test"), "--bootstrap", "0") == 0
        assert run_main(monkeypatch, "data", "audit", str(folder)) == 0
        shown = capsys.readouterr()
        assert [secret for secret in SECRETS if secret in shown.out + shown.err + caplog.text] == []
        assert list(own_cache.rglob("*.u8"))
        assert len(list(tracking.rglob("*.csv"))) > 3
        assert holders(tracking) == holders(own_cache) == []
        _serves_the_same(tracking, folder)
    finally:
        mlflow.set_tracking_uri(None)


def _serves_the_same(tracking: Path, folder: Path) -> None:
    """The served model gives a file's bytes the probability that the run logged."""
    logged = pd.read_csv(next(tracking.rglob("test_predictions.csv"))).set_index("digest")
    model = mlflow.pyfunc.load_model("models:/cxr-pneumonia@champion")
    from cxr.data.kaggle import digest_files

    files = sorted((folder / "test").rglob("*.dcm"))[:4]
    served = model.predict([file.read_bytes() for file in files])["probability"]
    expected = logged.loc[digest_files(files), "probability"]
    assert abs(served.to_numpy() - expected.to_numpy()).max() < 1e-4
