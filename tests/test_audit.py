"""What the audit says of a manifest, and what becomes of unreadable images."""

import pandas as pd
import pytest

from cxr.data.audit import Finding, audit, reject_bad
from cxr.errors import UserError

BAD = {"train/NORMAL/b.png": "zero bytes", "test/PNEUMONIA/a.png": "not a JPEG or PNG"}


def manifest(rows: list[tuple[str, int, str]]) -> pd.DataFrame:
    """Rows of (split, label, group); a path is made up for each."""
    table = pd.DataFrame(rows, columns=["split", "label", "group"])
    table["path"] = [f"{split}/{n}.png" for n, split in enumerate(table["split"])]
    return table


def sound() -> pd.DataFrame:
    return manifest([(split, y, f"{split}{y}") for split in ("train", "val", "test") for y in (0, 1)])


def find(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def test_a_sound_folder_passes_every_check() -> None:
    findings = audit(sound(), {})
    assert len(findings) == 5
    assert [finding.line()[:5] for finding in findings] == ["ok   "] * 5


def test_images_are_counted_by_split_and_class() -> None:
    rows = [("train", 1, "a"), ("train", 1, "b"), ("train", 0, "c"), ("test", 1, "d")]
    assert (
        find(audit(manifest(rows), {}), "images (NORMAL/PNEUMONIA)").line()
        == "ok   images (NORMAL/PNEUMONIA): test 0/1, train 1/2"
    )


def test_a_prior_that_shifts_between_splits_is_a_warning() -> None:
    rows = [("train", 1, "a"), ("train", 1, "b"), ("train", 0, "c"), ("test", 1, "d"), ("test", 0, "e")]
    finding = find(audit(manifest(rows), {}), "share of pneumonia")
    assert finding.line() == "WARN share of pneumonia: test 50.0%, train 66.7% (the prior shifts)"


def test_corrupt_files_are_named_with_their_reasons() -> None:
    finding = find(audit(sound(), BAD), "corrupt files")
    assert finding.line() == (
        "WARN corrupt files: test/PNEUMONIA/a.png (not a JPEG or PNG); train/NORMAL/b.png (zero bytes)"
    )


def test_names_that_tell_no_patient_are_counted() -> None:
    table = sound()
    table.loc[:1, "group"] = table.loc[:1, "path"]
    finding = find(audit(table, {}), "patients")
    assert not finding.ok
    assert "6 groups; 2 file names tell no patient" in finding.detail


@pytest.mark.parametrize(("crossing", "said"), [(1, "1 (p0)"), (5, "5 (p0, p1, p2, p3, p4)"), (6, "p4, …)")])
def test_patients_in_more_than_one_split_are_named(crossing: int, said: str) -> None:
    rows = [(split, 0, f"p{n}") for n in range(crossing) for split in ("train", "test")]
    finding = find(audit(manifest(rows), {}), "patients in more than one split")
    assert not finding.ok
    assert finding.detail.endswith(said)


def test_stop_names_all_bad_images_at_once_in_order() -> None:
    with pytest.raises(UserError, match=r"^2 unreadable image\(s\): ") as caught:
        reject_bad(sound(), BAD, "stop")
    said = str(caught.value)
    assert "test/PNEUMONIA/a.png (not a JPEG or PNG); train/NORMAL/b.png (zero bytes)" in said
    assert "--on-bad-image skip" in said
    assert "\n" not in said


def test_skip_drops_the_bad_images_and_no_others() -> None:
    table = sound()
    kept = reject_bad(table, {"train/1.png": "x", "test/5.png": "y"}, "skip")
    assert list(kept["path"]) == ["train/0.png", "val/2.png", "val/3.png", "test/4.png"]
    assert list(kept.index) == [0, 1, 2, 3]
    assert len(table) == 6


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_nothing_is_dropped_where_nothing_is_bad(on_bad_image: str) -> None:
    pd.testing.assert_frame_equal(reject_bad(sound(), {}, on_bad_image), sound())
