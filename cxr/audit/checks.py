"""The checks of a data set and their findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr.audit.duplicates import Groups, exact_duplicates, mixed, near_duplicates, pairs_of, pixel_duplicates
from cxr.audit.shortcuts import cue_table, separabilities, shift
from cxr.data.load import list_bad
from cxr.data.splits import patients_across
from cxr.data.store import Images
from cxr.task import KAGGLE, Task

PATIENTS_ACROSS = "patients in more than one split"
FILES_ACROSS = "identical files in more than one split"
COPIES_ACROSS = "near duplicates in more than one split"
LEAKS = {PATIENTS_ACROSS, FILES_ACROSS, COPIES_ACROSS}
SHORTCUT = 0.8  # AUC of a cue above which the audit warns
SHIFTED = 0.7  # AUC above which two splits are reported as different
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of an audit: the name of the check, whether it passed, and details; `conclusive` is whether there was
    enough data for a result."""

    check: str
    ok: bool
    detail: str
    conclusive: bool = True

    def line(self) -> str:
        """The finding as one line of text."""
        return f"{('ok  ' if self.conclusive else '?   ') if self.ok else 'WARN'} {self.check}: {self.detail}"


def audit(
    manifest: pd.DataFrame,
    bad: dict[str, str],
    images: Images | None = None,
    root: Path | None = None,
    features: npt.NDArray[np.float32] | None = None,
    task: Task = KAGGLE,
) -> list[Finding]:
    """Run all checks for which the inputs are given. `bad` maps the path of an unreadable file to the reason; `images`
    and `features` are in the order of the manifest.

    Always: counts, corrupt files, patients across splits and, if there is a column `digest`, identical files. `images`
    (uint8 [n, s, s], decoded) adds near duplicates, `root` (the data folder, to read image headers) adds shortcuts, and
    `features` ([n, d], of any network) adds the shift between splits. 5,856 images take about 15 seconds.
    Raises ValueError if the length of `images` or `features` differs from that of the manifest.
    """
    for given in (images, features):
        if given is not None and len(given) != len(manifest):
            raise ValueError(f"{len(given)} rows for {len(manifest)} images")
    findings = [_count(manifest, task), _balance(manifest, task)]
    findings += [_corrupt(bad), _unnamed(manifest), _crossing(manifest)]
    findings += _duplicates(manifest, images)
    if root is not None:
        findings.append(_shortcuts(manifest, cue_table(root, manifest, images)))
    if features is not None:
        groups, labels = manifest["group"].to_numpy(), manifest["label"].to_numpy(np.int64)
        findings.append(_shift(shift(features, manifest["split"].to_numpy(), labels, groups, task)))
    return findings


def leaks(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are leakage: the same patient or image is in more than one split."""
    return [finding for finding in findings if finding.check in LEAKS and not finding.ok]


def _count(manifest: pd.DataFrame, task: Task) -> Finding:
    table = (
        manifest.groupby(["split", "label"])
        .size()
        .unstack(fill_value=0)
        .reindex(columns=range(len(task.classes)), fill_value=0)
    )
    parts = [f"{split} {'/'.join(map(str, row))}" for split, row in table.iterrows()]
    return Finding(f"images ({'/'.join(task.classes)})", True, ", ".join(parts))


def _balance(manifest: pd.DataFrame, task: Task) -> Finding:
    """The share of the positive class in each split, or of every class of more than two."""
    shares = pd.crosstab(manifest["split"], manifest["label"], normalize="index")
    shares = shares.reindex(columns=range(len(task.classes)), fill_value=0.0).iloc[:, 1 if task.binary else 0 :]
    spread = float((shares.max() - shares.min()).max())
    text = ", ".join(f"{split} {'/'.join(f'{share:.1%}' for share in row)}" for split, row in shares.iterrows())
    return Finding("class balance", spread < 0.05, text + ("" if spread < 0.05 else " (differs between splits)"))


def _corrupt(bad: dict[str, str]) -> Finding:
    return Finding("corrupt files", not bad, list_bad(bad) or "none")


def _unnamed(manifest: pd.DataFrame) -> Finding:
    count = int((manifest["group"] == manifest["path"]).sum())
    text = f"{manifest['group'].nunique()} groups"
    if count:
        text += f"; {count} file names do not identify patients; each counts as a separate patient"
    return Finding("patients", not count, text)


def _crossing(manifest: pd.DataFrame) -> Finding:
    crossing = patients_across(manifest["group"], manifest["split"])
    text = f"{len(crossing)}" + (f" ({', '.join(crossing[:5])}{', …' * (len(crossing) > 5)})" if crossing else "")
    return Finding(PATIENTS_ACROSS, not crossing, text)


def _duplicates(manifest: pd.DataFrame, images: Images | None) -> list[Finding]:
    if "digest" not in manifest:
        return []
    groups = exact_duplicates(manifest)
    findings = [_identical(manifest, groups), _across(FILES_ACROSS, manifest, groups)]
    if images is not None:
        copies = _copies(manifest, images)
        pairs = copies[["a", "b"]].to_numpy().tolist()
        findings += [_near(manifest, copies), _across(COPIES_ACROSS, manifest, pairs)]
        groups = groups + pairs
    return [*findings, _conflicts(manifest, groups), _renamed(manifest, groups)]


def _copies(manifest: pd.DataFrame, images: Images) -> pd.DataFrame:
    """Near duplicates, and different files that decode to the same pixels (column `how`: `same pixels`)."""
    digests = manifest["digest"].to_numpy()
    same = [pair for pair in pairs_of(pixel_duplicates(images)) if digests[pair[0]] != digests[pair[1]]]
    table = pd.DataFrame(same, columns=["a", "b"], dtype=np.int64).assign(correlation=1.0, how="same pixels")
    return pd.concat([table, near_duplicates(images)], ignore_index=True) if same else near_duplicates(images)


def _identical(manifest: pd.DataFrame, groups: Groups) -> Finding:
    places = manifest["split"].iloc[[group[0] for group in groups]].value_counts(sort=False)
    extra = sum(len(group) - 1 for group in groups)
    where = ", ".join(f"{split} {count}" for split, count in places.items())
    text = f"{len(groups)} groups ({where}), {extra} redundant images" if groups else "none"
    return Finding("identical files", not groups, text)


def _near(manifest: pd.DataFrame, copies: pd.DataFrame) -> Finding:
    kinds = ", ".join(f"{count} {how}" for how, count in copies["how"].value_counts().items())
    examples = _examples(manifest, copies[["a", "b"]].to_numpy().tolist())
    return Finding("near duplicates", copies.empty, "none" if copies.empty else f"{kinds}: {examples}")


def _across(check: str, manifest: pd.DataFrame, groups: Groups) -> Finding:
    found = mixed(groups, manifest["split"])
    return Finding(check, not found, _counted(manifest, found))


def _conflicts(manifest: pd.DataFrame, groups: Groups) -> Finding:
    found = mixed(groups, manifest["label"])
    return Finding("duplicates with different labels", not found, _counted(manifest, found))


def _renamed(manifest: pd.DataFrame, groups: Groups) -> Finding:
    found = mixed(groups, manifest["group"])
    text = _counted(manifest, found) + ("; a split by patient may separate them" if found else "")
    return Finding("duplicates under different patients", not found, text)


def _counted(manifest: pd.DataFrame, groups: Groups) -> str:
    return f"{len(groups)}: {_examples(manifest, groups)}" if groups else "none"


def _examples(manifest: pd.DataFrame, groups: Groups) -> str:
    paths = manifest["path"].to_numpy()
    shown = "; ".join(" = ".join(paths[row] for row in group) for group in groups[:_SHOWN])
    return shown + "; …" * (len(groups) > _SHOWN)


def _shortcuts(manifest: pd.DataFrame, cues: pd.DataFrame) -> Finding:
    """Computed on all images except the test split, which must not inform training."""
    seen = (manifest["split"] != "test").to_numpy()
    part = manifest[seen]
    found = separabilities(cues[seen], part["label"].to_numpy(np.int64), part["group"].to_numpy())
    if all(np.isnan(auc) for auc in found.values()):
        return Finding("shortcuts", True, "inconclusive, too few patients in a class", False)
    strong = [cue for cue, auc in found.items() if auc > SHORTCUT]
    text = "AUC of predicting the class from one cue: " + ", ".join(f"{cue} {auc:.2f}" for cue, auc in found.items())
    return Finding("shortcuts", not strong, text + (f" (a model may learn {_joined(strong)})" if strong else ""))


def _shift(found: dict[tuple[str, str], float]) -> Finding:
    strong = [(split, name) for (split, name), auc in found.items() if auc > SHIFTED]
    text = ", ".join(f"train and {split} {name} {auc:.2f}" for (split, name), auc in found.items())
    text = f"AUC of a linear probe between {text}" if found else "inconclusive, too few images in val and test"
    consequence = _consequence({split for split, _ in strong})
    return Finding("shift between splits", not strong, text + consequence, bool(found))


def _consequence(shifted: set[str]) -> str:
    if shifted == {"test"}:
        return " (validation does not represent test: model selection and threshold may not carry over)"
    if shifted == {"val"}:
        return " (validation differs from train: a gap between them does not imply overfitting)"
    return " (validation and test both differ from train: expect worse metrics than on train)" if shifted else ""


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
