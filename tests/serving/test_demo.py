"""The page of `cxr demo`: what it answers in numbers and in words, what it refuses, and that it keeps nothing."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import requests
import uvicorn
from command import run_main
from dicoms import encoded, radiograph
from hypothesis import given
from hypothesis import strategies as st
from narrow import ARCH, build, narrow_resnet
from PIL import Image
from visit import needs_chromium, opened

from cxr.errors import UserError
from cxr.evaluation.selective import certainty
from cxr.network.ensemble import Ensemble
from cxr.serving import answers, demo
from cxr.serving.bulk import write_predictions
from cxr.serving.choice import Choice
from cxr.serving.demo import Models, application
from cxr.serving.predictor import ModelCard, Predictor
from cxr.task import KAGGLE, SUBTYPES, Task
from cxr.tracking import registry

if TYPE_CHECKING:
    from mlflow.entities import Run

    from cxr.config import TrainConfig
    from cxr.runs.result import RunResult

CHAMPION = "models:/cxr-pneumonia@champion"


def card_of(task: Task, **options: Any) -> ModelCard:
    return ModelCard(ARCH, 64, "squash", 0.4, "partial", "0123456789ab", "random", task.class_to_index, **options)


def three_classes() -> Predictor:
    return Predictor(build(num_classes=3), card_of(SUBTYPES))


PREDICTORS = {
    "two": lambda: Predictor(narrow_resnet(), card_of(KAGGLE, certainty_limit=0.05)),
    "three": three_classes,
    "together": lambda: Predictor(Ensemble([narrow_resnet(0), narrow_resnet(1)]), card_of(KAGGLE, members=2)),
}


@pytest.fixture(scope="module")
def predictors() -> dict[str, Predictor]:
    return {uri: make() for uri, make in PREDICTORS.items()}


@pytest.fixture(scope="module")
def films(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same film as JPEG, PNG, DICOM and DICOM without a preamble, and a file that is no film."""
    folder = tmp_path_factory.mktemp("films")
    film = np.asarray(Image.open(sorted(phantoms.glob("test/*/*.jpeg"))[0]).convert("L"))
    wide = np.repeat(film, 2, axis=1)
    Image.fromarray(film).save(folder / "film.png")
    Image.fromarray(wide).save(folder / "wide.png")
    (folder / "film.dcm").write_bytes(encoded(radiograph(film)))
    (folder / "notes.txt").write_text("the patient felt well")
    return {file.name: file for file in sorted(folder.iterdir())}


@contextmanager
def served(models: Models) -> Iterator[str]:
    """The address of the page, served by a thread."""
    server = uvicorn.Server(uvicorn.Config(application(models), port=0, log_level="error", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def page(predictors: dict[str, Predictor]) -> Iterator[str]:
    models = Models(lambda: [Choice(uri, f"model {uri}") for uri in predictors], predictors.__getitem__)
    with served(models) as address:
        assert [each["uri"] for each in requests.get(f"{address}choices").json()] == list(predictors)
        yield address


def ask(page: str, path: str, model: str, data: bytes, ending: str = "") -> requests.Response:
    return requests.post(f"{page}{path}", data, params={"model": model, "ending": ending}, timeout=60)


@pytest.mark.parametrize("name", ["film.png", "film.dcm"])
@pytest.mark.parametrize("model", PREDICTORS)
def test_a_film_is_answered_as_the_model_answers(
    page: str, predictors: dict[str, Predictor], films: dict[str, Path], model: str, name: str
) -> None:
    predictor = predictors[model]
    found = ask(page, "predict", model, films[name].read_bytes()).json()
    (expected,) = predictor.predict_files([films[name]]).drop(columns="image").to_dict("records")
    assert found["row"] == pytest.approx(expected)
    task = predictor.card.task
    assert len(found["probabilities"]) == len(task.classes)
    assert sum(found["probabilities"]) == pytest.approx(1)
    assert found["row"]["probability"] == found["probabilities"][1 if task.binary else expected["decision"]]
    told = requests.get(f"{page}model", params={"model": model}).json()
    assert told["columns"] == list(expected)
    assert told["classes"] == list(task.classes)


def test_a_dicom_file_without_a_preamble_is_known_by_the_ending_of_its_name(page: str, films: dict[str, Path]) -> None:
    data = films["film.dcm"].read_bytes()[132:]
    assert ask(page, "predict", "two", data, ".DCM").status_code == 200
    assert ask(page, "predict", "two", data).status_code == 422


@pytest.mark.parametrize("model", PREDICTORS)
def test_the_heat_map_lies_over_the_film_in_its_own_shape(page: str, films: dict[str, Path], model: str) -> None:
    found = ask(page, "explain", model, films["wide.png"].read_bytes()).json()
    film, heat = (
        Image.open(io.BytesIO(base64.b64decode(found[name].removeprefix("data:image/png;base64,"))))
        for name in ("film", "heat")
    )
    assert (film.mode, film.size) == ("L", (answers.SHOWN, answers.SHOWN))
    assert (heat.mode, heat.size) == ("RGBA", (64, 64))
    assert found["aspect"] == 2.0
    assert found["class"] in (SUBTYPES.classes if model == "three" else ("PNEUMONIA",))


@pytest.mark.parametrize(
    ("model", "data", "status", "says"),
    [
        ("two", b"the patient felt well", 422, "not a JPEG, PNG or DICOM file"),
        ("two", b"", 422, "zero bytes"),
        ("two", b"x" * 2000, 413, "more than 0 MB"),
        ("models:/other/1", b"", 404, "not a model that this page offers"),
        ("/etc", b"", 404, "not a model that this page offers"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    page: str, monkeypatch: pytest.MonkeyPatch, model: str, data: bytes, status: int, says: str
) -> None:
    monkeypatch.setattr(demo, "LARGEST", 1000)
    for path in ("predict", "explain"):
        answer = ask(page, path, model, data)
        assert answer.status_code == status
        assert says in answer.json()["error"]


def test_nothing_may_be_stored_or_fetched_from_elsewhere(page: str, films: dict[str, Path]) -> None:
    for answer in (
        *(requests.get(f"{page}{path}") for path in ("", "demo.js", "demo.css", "choices", "model?model=two")),
        ask(page, "explain", "two", films["film.png"].read_bytes()),
        ask(page, "predict", "two", b"no film"),
    ):
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    for path in ("", "demo.js", "demo.css"):
        assert "://" not in requests.get(f"{page}{path}").text


def test_another_host_name_is_not_answered(page: str) -> None:
    assert requests.get(page, headers={"Host": "elsewhere.example"}).status_code == 400


@given(st.floats(0.01, 0.99), st.floats(0.01, 3), st.floats(0.001, 0.999))
def test_the_shown_zone_is_where_the_model_abstains(threshold: float, limit: float, probability: float) -> None:
    zone = answers._undecided(replace(card_of(KAGGLE), threshold=threshold, certainty_limit=limit))
    assert zone
    sure = certainty(np.array([probability]), threshold)[0]
    if abs(sure - limit) > 1e-6:
        assert (zone[0] < probability < zone[1]) == (sure < limit)


def test_without_a_limit_and_with_more_classes_no_zone_is_shown() -> None:
    assert answers._undecided(card_of(KAGGLE)) is None
    assert answers._undecided(card_of(SUBTYPES, certainty_limit=1.0)) is None


def test_the_versions_of_a_model_can_be_chosen_the_named_one_first(
    finished: tuple[TrainConfig, RunResult, Run], in_store: str
) -> None:
    first = registry.choices(CHAMPION)[0]
    assert (first.uri, first.phantoms) == ("models:/cxr-pneumonia/1", False)
    assert first.name == "cxr-pneumonia version 1 (candidate, champion)"
    assert first.notes["run"] == finished[1].run_id
    assert registry.choices("models:/m-0123") == [Choice("models:/m-0123", "models:/m-0123")]
    with pytest.raises(UserError, match="no such version"):
        registry.choices("models:/cxr-pneumonia/99")


def test_a_busy_port_a_missing_model_and_a_missing_package_end_with_one_line(
    finished: tuple[TrainConfig, RunResult, Run],
    in_store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run_main(monkeypatch, "demo", "--port", port) == 2
        assert f"--port {port}: Address already in use; use another port" in capsys.readouterr().err
    assert run_main(monkeypatch, "demo", "--model", "models:/nothing@champion") == 2
    assert "cxr models list" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "cxr.serving.demo")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run_main(monkeypatch, "demo") == 2
    assert "uv run --extra demo cxr demo" in capsys.readouterr().err


@pytest.fixture(scope="module")
def visited(
    finished: tuple[TrainConfig, RunResult, Run], store: str, predictors: dict[str, Predictor]
) -> Iterator[str]:
    """The page with the champion, and with the models of this file."""
    champion = registry.load(CHAMPION)
    models = {"champion": champion, **predictors}
    with served(Models(lambda: [Choice(uri, f"model {uri}") for uri in models], models.__getitem__)) as address:
        yield address


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_probability_and_heat_map_and_refuses_a_text_file(
    visited: str, films: dict[str, Path], tmp_path: Path
) -> None:
    names = ["film.png", "film.dcm", "notes.txt"]
    with opened(visited) as (page, asked):
        assert page.get_by_text("Not for clinical use").is_visible()
        page.set_input_files("#files", [films[name] for name in names])
        page.wait_for_selector("#save:enabled")
        page.wait_for_selector("#heat[src]")
        champion = registry.load(CHAMPION)
        table = champion.predict_files([films["film.png"]])
        assert f"is {table['probability'][0]:.1%}, " in page.inner_text("#reason")
        assert page.inner_text("#decision") == ("No decision" if table["abstain"][0] else table["label"][0])
        assert page.locator(".tick").inner_text() == f"threshold {champion.card.threshold:.1%}"
        assert page.locator("#unfamiliar").is_visible() == (table["familiarity"][0] < 5)
        page.fill("#opacity", "25")
        assert page.locator("#heat").get_attribute("style") == "opacity: 0.25;"
        page.get_by_role("button", name="notes.txt").click()
        assert page.inner_text("#status") == "notes.txt: not a JPEG, PNG or DICOM file"
        assert not page.locator("#verdict").is_visible()
        with page.expect_download() as started:
            page.click("#save")
        started.value.save_as(tmp_path / "page.csv")
        addresses = {url.split("?")[0].rsplit("/", 1)[0] for url in asked if not url.startswith(("data:", "blob:"))}
    write_predictions(champion, [films[name] for name in names], tmp_path / "command.csv")
    own, expected = (pd.read_csv(tmp_path / name) for name in ("page.csv", "command.csv"))
    pd.testing.assert_frame_equal(own, expected.assign(image=names))
    assert addresses == {visited.rstrip("/")}
    assert not any(name.removesuffix(".png") in url for url in asked for name in films)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_each_kind_of_model_fits_into_the_window(visited: str, films: dict[str, Path], width: int, scheme: str) -> None:
    with opened(visited, width, color_scheme=scheme) as (page, _):
        page.set_input_files("#files", [films["wide.png"], films["film.dcm"], films["notes.txt"]])
        for model in ("champion", *PREDICTORS):
            page.select_option("#models", model)
            page.get_by_text("About this model").click()
            page.wait_for_selector("#save:enabled")
            page.wait_for_selector("#verdict:visible")
            page.wait_for_selector("#frame:not(.waiting)")
            bars = page.locator("#scale .class").count()
            assert bars == (3 if model == "three" else 0)
            assert page.evaluate("document.documentElement.scrollWidth") == width
        page.click("#clear")
        assert not page.locator("#results").is_visible()


@pytest.mark.slow
def test_nothing_of_a_film_is_left_when_the_server_has_ended(
    finished: tuple[TrainConfig, RunResult, Run], store: str, films: dict[str, Path], tmp_path: Path
) -> None:
    places = {name: str(tmp_path / name.lower()) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "CXR_CACHE")}
    for place in places.values():
        Path(place).mkdir()
    command = [sys.executable, "-m", "cxr", "demo", "--port", "0"]
    environment = os.environ | places | {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(Path(__file__).parents[2])}
    film = films["film.png"].read_bytes()
    began = time.time()
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout
        address = server.stdout.readline().split()[2] + "/"
        for path in ("predict", "explain"):
            assert ask(address, path, requests.get(f"{address}choices").json()[0]["uri"], film).ok
        server.send_signal(signal.SIGINT)
        rest = server.stdout.read()
    assert rest.strip() == "stopped"
    written = [file for place in (tmp_path, Path(store.removeprefix("sqlite:///")).parent) for file in place.rglob("*")]
    new = [file for file in written if file.is_file() and file.stat().st_mtime >= began]
    assert not [file for file in new if film[-200:] in file.read_bytes() or file.suffix in (".png", ".dcm", ".tmp")]
    assert list(Path(places["TMPDIR"]).iterdir()) == []
