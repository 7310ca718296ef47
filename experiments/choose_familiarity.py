"""Which measure of familiarity flags images that do not belong? Judged on validation images; test is never read.

    uv run python experiments/choose_familiarity.py --data-dir FOLDER --weights auto --out familiarity.csv

Result in LOG.md: "2026-11-25: familiarity, chosen on validation".

Features of the training images are the bank, from three networks' layers: the pooled output of the start weights, of
the trained network, and both layer3 and layer4 of the trained network. Measures: the mean cosine distance to the k
nearest of the bank, and the Mahalanobis distance to the nearest class (Lee et al. 2018). The threshold flags 5% of one
half of the validation images (by patient); the table holds what is flagged of the other half, and of strangers:
validation images inverted, turned by 90 degrees and halved, phantoms, and crops of the two photographs in scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_sample_images
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torchvision.models import ResNet

from common import trained
from cxr.config import TrainConfig
from cxr.data.batches import make_split
from cxr.data.load import Data, read_data
from cxr.data.phantoms import phantom
from cxr.data.views import to_input
from cxr.machine import ready_machine
from cxr.network.resnet import build_model
from cxr.network.stages import run_stages

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
STRANGERS = 200


def features(model: ResNet, images: UInt8, layers: tuple[str, ...]) -> Floats:
    """Pooled outputs [n, d] of the layers, each scaled to length 1."""
    rows = []
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for part in torch.split(torch.from_numpy(images), 64):
            x, pooled = to_input(part), []
            for stage in ("stem", "layer1", "layer2", "layer3", "layer4"):
                x = run_stages(model, x, [stage])
                if stage in layers:
                    pooled.append(torch.nn.functional.normalize(x.float().mean((2, 3))))
            rows.append(torch.cat(pooled, 1))
    return np.asarray(torch.cat(rows).numpy(), np.float64)


def nearest(bank: Floats, labels: npt.NDArray[np.int64], k: int) -> Callable[[Floats], Floats]:
    """The mean cosine distance to the k nearest of the bank."""
    index = NearestNeighbors(n_neighbors=k, metric="cosine").fit(bank)
    return lambda found: np.asarray(index.kneighbors(found)[0].mean(1))


def mahalanobis(bank: Floats, labels: npt.NDArray[np.int64], k: int) -> Callable[[Floats], Floats]:
    """The distance to the nearer class mean, by one covariance of both classes."""
    means = [bank[labels == label].mean(0) for label in (0, 1)]
    centred = np.concatenate([bank[labels == label] - mean for label, mean in enumerate(means)])
    precision = LedoitWolf().fit(centred).precision_
    return lambda found: np.min([np.einsum("ij,jk,ik->i", found - m, precision, found - m) for m in means], axis=0)


def strangers(images: UInt8, size: int) -> dict[str, UInt8]:
    """Kind -> images [n, size, size] that do not belong."""
    chosen = images[np.linspace(0, len(images) - 1, min(STRANGERS, len(images))).astype(int)]
    half = size // 2

    def enlarged(part: UInt8) -> UInt8:
        whole: Tensor = torch.nn.functional.interpolate(torch.from_numpy(part).float()[:, None], (size, size))[:, 0]
        return np.asarray(whole.byte().numpy())

    rng, photos = np.random.default_rng(0), [photo.mean(2) for photo in load_sample_images()["images"]]
    crops = []
    for number in range(STRANGERS):
        photo = photos[number % len(photos)]
        y, x = (int(rng.integers(0, side - size)) for side in photo.shape)
        crops.append(photo[y : y + size, x : x + size].astype(np.uint8))
    return {
        "inverted": 255 - chosen,
        "turned by 90 degrees": np.ascontiguousarray(np.rot90(chosen, axes=(1, 2))),
        "left half": enlarged(chosen[:, :, :half]),
        "upper half": enlarged(chosen[:, :half]),
        "phantoms": np.stack([phantom(np.random.default_rng(n), "normal", size) for n in range(60)]),
        "photographs": np.stack(crops),
    }


def of_split(data: Data, name: str) -> UInt8:
    """The images of a split."""
    split = make_split(data.manifest, data.store, name)
    return np.asarray(split.dataset.images[split.dataset.rows])


@click.command()
@click.option("--data-dir", required=True)
@click.option("--weights", default="auto", show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--views", default=6, show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--out", type=Path, required=True)
def main(out: Path, **parameters: str) -> None:
    """Train a network, measure everything with every method, and print the table."""
    config = TrainConfig(**parameters, reuse_gb=12.0)  # type: ignore[arg-type]
    data, machine = read_data(config), ready_machine(config)
    own, _ = trained(config, data, machine)
    start, _ = build_model(config.arch, config.weights, config.seed)
    networks = {
        "start weights": (start, ("layer4",)),
        "trained": (own, ("layer4",)),
        "trained, layer3 and layer4": (own, ("layer3", "layer4")),
    }
    val, labels = data.part("val"), data.part("train")["label"].to_numpy(np.int64)
    first = np.isin(val["group"], val["group"].unique()[::2])
    images = {"train": of_split(data, "train"), "val": of_split(data, "val")}
    kinds, rows = strangers(images["val"], config.image_size), []
    for name, (network, layers) in networks.items():
        found = {kind: features(network, each, layers) for kind, each in {**images, **kinds}.items()}
        methods = [(nearest, k) for k in (1, 5, 20, 100)] + [(mahalanobis, 0)]
        for method, k in methods:
            measure = method(found["train"], labels, k)
            own_val = measure(found["val"])
            limit = np.quantile(own_val[first], 0.95)
            flagged = {kind: float((measure(found[kind]) > limit).mean()) for kind in kinds}
            row = {"features": name, "method": f"{method.__name__} {k or ''}", "val": (own_val[~first] > limit).mean()}
            rows.append({**row, **flagged, "least": min(flagged.values())})
    table = pd.DataFrame(rows)
    table.to_csv(out, index=False)
    click.echo(table.round(3).to_string())


if __name__ == "__main__":
    main()
