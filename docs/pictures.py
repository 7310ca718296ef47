"""Pictures for README and docs: pages of a tracking store, and the demo, as a browser shows them, in both themes.

    uv run python docs/pictures.py --comparison PARENT_ID --run RUN_ID
    uv run python docs/pictures.py --film phantom.png

The first reads the tracking store of MLFLOW_TRACKING_URI and draws the comparison in MLflow, its report, and the top of
the run's report; the second drops a film on the demo of the registry's champion. Writes NAME_light.png and
NAME_dark.png into experiments/pictures, each below 200 kB. Needs Chromium. Show no films of patients.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import mlflow
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from cxr.tracking.reading import Artifact, LoggedRun, RunKind
from cxr.tracking.views import OPENS, key_of

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support")]

from ui import mlflow_ui, served  # noqa: E402

PICTURES = Path(__file__).parents[1] / "experiments" / "pictures"
THEMES = ("light", "dark")
LARGEST = 200_000  # bytes
COLORS = 256
# MLflow's settings in the browser: its theme, and its assistant closed.
MLFLOW_SETTINGS = {"mlflow.assistant.panelOpen_v1": "false", "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true"}


@contextmanager
def browser_page(theme: str, width: int, height: int) -> Iterator[Page]:
    """A page of Chromium in that theme, MLflow's own included."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)  # type: ignore[arg-type]
        settings = {**MLFLOW_SETTINGS, "_mlflow_dark_mode_toggle_enabled": str(theme == "dark").lower()}
        page.add_init_script(f"""if (location.protocol !== "file:")
            for (const [name, value] of Object.entries({json.dumps(settings)})) localStorage.setItem(name, value);""")
        yield page
        browser.close()


def save(name: str, theme: str, drawn: bytes) -> None:
    """Write a picture with few colours. Raises `click.ClickException` if it is too large."""
    buffer, path = io.BytesIO(), PICTURES / f"{name}_{theme}.png"
    Image.open(io.BytesIO(drawn)).convert("RGB").quantize(COLORS).save(buffer, "PNG", optimize=True)
    if len(buffer.getvalue()) > LARGEST:
        raise click.ClickException(f"{path.name}: {len(buffer.getvalue())} bytes, more than {LARGEST}")
    path.write_bytes(buffer.getvalue())
    click.echo(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def draw_mlflow(parent: LoggedRun) -> None:
    """The comparison as MLflow opens it: its table, and its charts."""
    with mlflow_ui(mlflow.get_tracking_uri()) as address:
        shared = f"viewStateShareKey={key_of(RunKind.COMPARISON, parent.run_id)}&{OPENS}"
        experiment = f"{address}/#/experiments/{parent.experiment_id}/runs?{shared}"
        for theme in THEMES:
            for name, more, size in (("runs", "", (1400, 620)), ("charts", "&compareRunsMode=CHART", (1400, 900))):
                with browser_page(theme, *size) as page:
                    page.goto(experiment + more)
                    page.get_by_text("test_roc_auc").first.wait_for()
                    page.wait_for_timeout(6000)  # it draws piece by piece
                    save(f"mlflow_{name}", theme, page.screenshot())


def draw_report(run: LoggedRun, artifact: str, name: str, height: int) -> None:
    """The top of a report."""
    with tempfile.TemporaryDirectory() as folder:
        local = mlflow.artifacts.download_artifacts(f"{run.artifact_uri}/{artifact}", dst_path=folder)
        for theme in THEMES:
            with browser_page(theme, 1100, height) as page:
                page.goto(Path(local).resolve().as_uri())
                save(name, theme, page.screenshot())


def draw_demo(film: Path) -> None:
    """The demo of the champion with a film."""
    with served("cxr", "demo") as address:
        for theme in THEMES:
            with browser_page(theme, 1100, 780) as page:
                page.goto(address)
                page.set_input_files("#files", [film])
                page.wait_for_selector("#heat[src]")
                page.wait_for_selector("#frame:not(.waiting)")
                save("demo", theme, page.screenshot())


@click.command()
@click.option("--comparison", help="ID of a comparison")
@click.option("--run", help="ID of a training run")
@click.option("--film", type=click.Path(exists=True, path_type=Path), help="an image to drop on the demo")
def main(comparison: str | None, run: str | None, film: Path | None) -> None:
    """Draw what is named."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    if comparison:
        parent = LoggedRun.open(comparison)
        draw_mlflow(parent)
        draw_report(parent, Artifact.COMPARISON_REPORT, "comparison_report", 900)
    if run:
        draw_report(LoggedRun.open(run), Artifact.REPORT, "run_report", 900)
    if film:
        draw_demo(film)


if __name__ == "__main__":
    main()
