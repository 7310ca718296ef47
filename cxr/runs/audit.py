"""The audits of a data set with what a network sees in it, kept in the cache by all that they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import nn

from cxr.audit.checks import Finding, audit, leaks
from cxr.config import TrainConfig
from cxr.data.load import Data
from cxr.errors import UserError
from cxr.network.freezing import checksum
from cxr.network.stages import stages_of
from cxr.storage import Cache, write_atomically
from cxr.task import KAGGLE
from cxr.training.batch_source import pooled_features

VERSION = 3


def audited(config: TrainConfig, data: Data, model: nn.Module | None, precision: str = "fp32") -> list[Finding]:
    """Every audit of the data; with a model, also the shift between splits in its pooled features.

    Raises `UserError` when `strict` is true and something leaks across splits.
    """
    prefix = checksum(model, stages_of(model)[:-1]) if model else "none"
    names = data.manifest[["path", "group"]].to_csv(index=False)  # the fingerprint does not know them
    classes = () if data.task == KAGGLE else (data.task.classes,)
    about = (VERSION, data.fingerprint, names, sorted(data.bad), str(data.root), *classes)
    text = repr((*about, prefix, config.image_size, config.resize))
    file = Cache.open(config.cache_dir).audit(hashlib.sha256(text.encode()).hexdigest()[:24])
    findings = _kept(file)
    if findings is None:
        images = data.store.of(data.manifest["digest"])
        features = pooled_features(config, data, model, precision) if model else None
        manifest = data.manifest.assign(file=data.manifest["path"].map(data.files))
        findings = audit(manifest, data.bad, images, data.root, features, data.task)
        content = json.dumps([[str(f.check), bool(f.ok), str(f.detail), bool(f.conclusive)] for f in findings]).encode()
        write_atomically(file, lambda stream: stream.write(content))
    if config.strict and (leaked := leaks(findings)):
        pairs = "; ".join(f"{finding.check}: {finding.detail}" for finding in leaked)
        raise UserError(f"{data.root}: leaks across splits ({pairs}); fix the folders, or use --strict false")
    return findings


def _kept(file: Path) -> list[Finding] | None:
    """What was found before; None when it was not looked for, or the file is damaged."""
    try:
        return [Finding(*entry) for entry in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        return None
