"""Pictures of a page of the tracking store, in both themes, as a browser shows it: for README and docs.

    uv run python docs/report_pictures.py RUN_ID run_page
    uv run python docs/report_pictures.py PARENT_ID comparison_page --page comparison/report.html

Writes NAME_light.png and NAME_dark.png into experiments/pictures, each below 200 kB. Needs Chromium. Show no films of
patients: --height ends the picture above them.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from pathlib import Path

import click
import mlflow
from PIL import Image

from cxr.tracking.reading import Artifact, LoggedRun

PICTURES = Path(__file__).parents[1] / "experiments" / "pictures"
THEMES = {"dark": 0, "light": 1}  # Chromium's numbers
LARGEST = 200_000  # bytes
COLORS = 128  # enough for text and charts


def picture(page: Path, scheme: int, size: tuple[int, int]) -> bytes:
    """The page in a window of that size, as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.png"
        options = [f"--user-data-dir={folder}", f"--blink-settings=preferredColorScheme={scheme}", "--hide-scrollbars"]
        window = [f"--window-size={size[0]},{size[1]}", f"--screenshot={file}", page.as_uri()]
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *options, *window]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        drawn, buffer = Image.open(file).convert("RGB"), io.BytesIO()
    drawn.quantize(COLORS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@click.command()
@click.argument("run_id")
@click.argument("name")
@click.option("--page", default=str(Artifact.REPORT), help="path of the page among the artifacts")
@click.option("--width", default=1240)
@click.option("--height", default=1500)
def main(run_id: str, name: str, page: str, width: int, height: int) -> None:
    """Write the pictures of a run's page."""
    address = f"{LoggedRun.open(run_id).artifact_uri}/{page}"
    with tempfile.TemporaryDirectory() as folder:
        local = Path(mlflow.artifacts.download_artifacts(address, dst_path=folder))
        for theme, scheme in THEMES.items():
            content = picture(local.resolve(), scheme, (width, height))
            if len(content) > LARGEST:
                raise click.ClickException(f"{theme}: {len(content)} bytes, more than {LARGEST}; lower --height")
            (PICTURES / f"{name}_{theme}.png").write_bytes(content)
            click.echo(f"{PICTURES / f'{name}_{theme}.png'}: {len(content) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
