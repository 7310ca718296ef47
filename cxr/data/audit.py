"""What a data folder holds and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from cxr.data.index import CLASSES
from cxr.errors import UserError


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of an audit: what was checked, whether it is as it should be, and what was seen."""

    check: str
    ok: bool
    detail: str

    def line(self) -> str:
        """For people."""
        return f"{'ok  ' if self.ok else 'WARN'} {self.check}: {self.detail}"


def audit(manifest: pd.DataFrame, bad: dict[str, str]) -> list[Finding]:
    """Counts, corrupt files and groups across splits. `bad` maps a path to why it cannot be read."""
    return [_count(manifest), _balance(manifest), _corrupt(bad), _unnamed(manifest), _crossing(manifest)]


def _count(manifest: pd.DataFrame) -> Finding:
    table = (
        manifest.groupby(["split", "label"])
        .size()
        .unstack(fill_value=0)
        .reindex(columns=range(len(CLASSES)), fill_value=0)
    )
    parts = [f"{split} {row[0]}/{row[1]}" for split, row in table.iterrows()]
    return Finding(f"images ({'/'.join(CLASSES)})", True, ", ".join(parts))


def _balance(manifest: pd.DataFrame) -> Finding:
    shares = manifest.groupby("split")["label"].mean()
    spread = float(shares.max() - shares.min())
    text = ", ".join(f"{split} {share:.1%}" for split, share in shares.items())
    return Finding("share of pneumonia", spread < 0.05, text + ("" if spread < 0.05 else " (the prior shifts)"))


def _corrupt(bad: dict[str, str]) -> Finding:
    return Finding("corrupt files", not bad, list_bad(bad) or "none")


def _unnamed(manifest: pd.DataFrame) -> Finding:
    count = int((manifest["group"] == manifest["path"]).sum())
    text = f"{manifest['group'].nunique()} groups"
    if count:
        text += f"; {count} file names tell no patient, each counted as a patient of its own"
    return Finding("patients", not count, text)


def _crossing(manifest: pd.DataFrame) -> Finding:
    splits = manifest.groupby("group")["split"].nunique()
    crossing = sorted(splits.index[splits > 1])
    text = f"{len(crossing)}" + (f" ({', '.join(crossing[:5])}{', …' * (len(crossing) > 5)})" if crossing else "")
    return Finding("patients in more than one split", not crossing, text)


def list_bad(bad: dict[str, str]) -> str:
    """Every unreadable image with its reason, on one line. `bad` maps a path to the reason."""
    return "; ".join(f"{path} ({reason})" for path, reason in sorted(bad.items()))


def reject_bad(manifest: pd.DataFrame, bad: dict[str, str], on_bad_image: str) -> pd.DataFrame:
    """The manifest without the unreadable images. `bad` maps a path to the reason.

    Raises `UserError` naming all of them when `on_bad_image` is `stop` and there are any.
    """
    if bad and on_bad_image == "stop":
        raise UserError(
            f"{len(bad)} unreadable image(s): {list_bad(bad)}; mend or remove them, or use --on-bad-image skip"
        )
    return manifest[~manifest["path"].isin(bad)].reset_index(drop=True)
