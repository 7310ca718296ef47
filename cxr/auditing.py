"""The audits of a data set with what a network sees in it, kept in the cache by all that they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models import ResNet

from cxr.activations import Activations
from cxr.checkpoint import write_atomically
from cxr.config import TrainConfig
from cxr.data.audit import Finding, audit, leaks
from cxr.data.dataset import make_split
from cxr.errors import UserError
from cxr.inputs import Data
from cxr.model import checksum
from cxr.runtime import cache_folder
from cxr.strategies import HEAD

VERSION = 2
Features = npt.NDArray[np.float32]


def audited(config: TrainConfig, data: Data, model: ResNet | None, precision: str = "fp32") -> list[Finding]:
    """Every audit of the data; with a model, also the shift between splits in its pooled features.

    Raises `UserError` when `strict` is true and something leaks across splits.
    """
    prefix = checksum(model, HEAD.frozen) if model else "none"
    names = data.manifest[["path", "group"]].to_csv(index=False)  # the fingerprint does not know them
    about = (VERSION, data.fingerprint, names, sorted(data.bad), str(data.root))
    text = repr((*about, prefix, config.image_size, config.resize))
    file = cache_folder(config.cache_dir) / "audits" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    findings = _kept(file)
    if findings is None:
        images = data.store.images[[data.store.rows[digest] for digest in data.manifest["digest"]]]
        features = pooled_features(config, data, model, precision) if model else None
        findings = audit(data.manifest, data.bad, images=images, root=data.root, features=features)
        content = json.dumps([[str(f.check), bool(f.ok), str(f.detail), bool(f.told)] for f in findings]).encode()
        write_atomically(file, lambda stream: stream.write(content))
    if config.strict == "true" and (leaked := leaks(findings)):
        told = "; ".join(f"{finding.check}: {finding.detail}" for finding in leaked)
        raise UserError(f"{data.root}: leaks across splits ({told}); mend the folders, or use --strict false")
    return findings


def _kept(file: Path) -> list[Finding] | None:
    """What was found before; None when it was not looked for, or the file is damaged."""
    try:
        return [Finding(*entry) for entry in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        return None


def pooled_features(config: TrainConfig, data: Data, model: ResNet, precision: str) -> Features:
    """What the network gives its head [n, d], for every image of the manifest in order, without augmentation."""
    shelf = cache_folder(config.cache_dir) / "activations"
    found: Features = np.empty((len(data.manifest), model.fc.in_features), np.float32)
    model.eval()
    for name in data.manifest["split"].unique():
        part = make_split(data.manifest, data.store, name)
        budget = config.reuse_gb * 1e9
        source = Activations(model, part, part, config.batch_size, 0, 0, precision, budget, shelf=shelf)
        with torch.no_grad():
            rows = [features.float().flatten(1).cpu() for features, _ in source.val_batches(HEAD)]
        found[(data.manifest["split"] == name).to_numpy()] = torch.cat(rows).numpy()
    return found
