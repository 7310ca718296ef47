"""Folders and lists as sources of images: what they become, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import pandas as pd
import pytest
from command import run_main
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.config import TrainConfig
from cxr.data.kaggle import index_folder
from cxr.data.load import read_data
from cxr.data.sources import Source, _in_order, read_source, with_test
from cxr.data.splits import assign_splits, fingerprint
from cxr.errors import UserError
from cxr.task import KAGGLE, Task

Rows = list[dict[str, str]]


def touch(folder: Path, *names: str) -> None:
    """Files of different bytes; indexing never decodes."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())


def read(folder: Path, **options: object) -> Source:
    return read_source(TrainConfig(**options), folder)  # type: ignore[arg-type]


class Refused(Protocol):
    """Runs `cxr data check` on a bad source; returns its one line."""

    def __call__(self, source: Path, **options: str) -> str: ...


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    def run(source: Path, **options: str) -> str:
        cache = tmp_path / "cache"
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        assert run_main(monkeypatch, "data", "check", str(source), *arguments, "--cache-dir", str(cache)) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        assert (printed.out, cache.exists()) == ("", False)
        return line

    return run


def write_list(folder: Path, rows: Rows, name: str = "list.csv", separator: str = ",") -> Path:
    """A list of images that exist."""
    table = pd.DataFrame(rows)
    for path in table.iloc[:, 0]:
        if path and not path.startswith(("..", "/", "gone")):
            touch(folder, path)
    table.to_csv(folder / name, sep=separator, index=False)
    return folder / name


def patients(count: int, **columns: Callable[[int], str]) -> Rows:
    """Two images of each patient; the class is that of the patient."""
    return [
        {
            "path": f"images/{n}-{k}.png",
            "label": "sick" if n % 2 else "well",
            "patient": f"p{n}",
            **{name: value(n) for name, value in columns.items()},
        }
        for n in range(count)
        for k in range(2)
    ]


def test_the_kaggle_folder_is_indexed_as_before(phantoms: Path) -> None:
    found = read(phantoms)
    pd.testing.assert_frame_equal(found.table, index_folder(phantoms))
    assert (found.task, found.remarks, found.root) == (KAGGLE, (), phantoms)


def test_a_shuffled_list_of_the_same_images_is_the_same_data(phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    known = index_folder(folder)
    rows = known.assign(label=[KAGGLE.classes[label] for label in known["label"]])
    rows = rows.rename(columns={"group": "patient", "official": "split"}).drop(columns="digest")
    rows.sample(frac=1, random_state=0).to_csv(folder / "all.csv", index=False)
    found = read(folder / "all.csv")
    pd.testing.assert_frame_equal(found.table[list(known)], known)
    own, theirs = (assign_splits(table, "grouped", 0.1, 3) for table in (known, found.table))
    assert fingerprint(own) == fingerprint(theirs)
    assert list(own["split"]) == list(theirs["split"])


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "with train and test above"])
def test_class_folders_of_any_names_are_a_source(tmp_path: Path, nested: bool) -> None:
    for n in range(10):
        touch(tmp_path / ("train" if nested else "."), f"cat/a{n}.png", f"dog/b{n}.png")
        if nested:
            touch(tmp_path / "test", f"cat/c{n}.png", f"dog/d{n}.png")
    found = read(tmp_path)
    assert found.task == Task(("cat", "dog"))
    assert found.task.positive == "dog"
    assert set(found.table["official"]) == {"train", "test"}
    made = [remark for remark in found.remarks if remark.startswith("test split: made here")]
    assert len(made) == (0 if nested else 1)
    assert any("unknown for" in remark for remark in found.remarks)
    assert read(tmp_path, positive="cat").task == Task(("dog", "cat"))
    assert list(read(tmp_path, positive="cat").table["label"]) == list(1 - found.table["label"])


@pytest.mark.parametrize(
    ("header", "separator"),
    [
        ({"path": "file_name", "label": "label", "patient": "patient"}, ","),
        ({"path": "Image Index", "label": "Finding", "patient": "Patient ID"}, ";"),
        ({"path": "filename", "label": "Class", "patient": "subject_id"}, "\t"),
    ],
)
def test_lists_with_usual_column_names_and_separators_need_no_options(
    tmp_path: Path, header: dict[str, str], separator: str
) -> None:
    rows = [{header[name]: value for name, value in row.items()} for row in patients(10)]
    options = {"columns": "path=Image Index"} if "Image Index" in rows[0] else {}
    found = read(write_list(tmp_path, rows, separator=separator), **options)
    assert found.task == Task(("sick", "well"))
    assert set(found.table["group"]) == {f"p{n}" for n in range(10)}
    assert "read from the list list.csv" in found.remarks


def test_metadata_csv_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    rows = [{"file_name": row.pop("path"), **row} for row in patients(6)]
    file = write_list(tmp_path, rows, "metadata.csv")
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    assert len(read(tmp_path).table) == len(read(file).table) == 12


def test_a_data_list_of_monai_is_read(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}.png" for n in range(8)))
    items = [{"image": f"./{n}.png", "label": n % 2} for n in range(8)]
    content = {"name": "films", "training": items[:4], "validation": items[4:6], "test": items[6:]}
    (tmp_path / "data.json").write_text(json.dumps(content))
    found = read(tmp_path / "data.json")
    assert found.task == Task(("0", "1"))
    assert list(found.table["official"]) == ["train"] * 4 + ["val"] * 2 + ["test"] * 2


def test_a_split_that_is_made_is_seeded_and_can_be_taken_by_another_run(tmp_path: Path) -> None:
    file = write_list(tmp_path, patients(20))
    first, again, other = (read(file, split_seed=seed).table for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert set(first.loc[first["official"] == "test", "digest"]) != set(
        other.loc[other["official"] == "test", "digest"]
    )
    split = assign_splits(first, "grouped", 0.2, 0, Task(("sick", "well")))
    split.to_csv(tmp_path / "manifest.csv", index=False)
    taken = read(file, splits=str(tmp_path / "manifest.csv"), split_seed=1).table
    assert dict(zip(taken["digest"], taken["official"], strict=True)) == dict(
        zip(split["digest"], split["split"], strict=True)
    )


def test_a_pattern_finds_the_patients(tmp_path: Path) -> None:
    for n in range(6):
        touch(tmp_path, f"cat/{n}_1.png", f"cat/{n}_2.png", f"dog/x{n}_1.png")
    found = read(tmp_path, patient_pattern=r"/(\w+)_\d")
    assert set(found.table["group"]) == {*map(str, range(6)), *(f"x{n}" for n in range(6))}


def test_subtypes_of_the_kaggle_set_are_three_classes(phantoms: Path) -> None:
    found = read(phantoms, labels="subtype")
    assert found.task.classes == ("NORMAL", "BACTERIA", "VIRUS")
    kinds = [found.task.classes[label].lower() for label in found.table["label"]]
    assert kinds == list(found.table["subtype"])
    assert not found.task.binary


@settings(max_examples=25, deadline=None)
@given(st.integers(9, 40), st.integers(0, 1000), st.floats(0.1, 0.5))
def test_a_patient_is_never_on_two_sides_of_a_split_that_is_made(count: int, seed: int, fraction: float) -> None:
    groups = np.repeat([f"p{n}" for n in range(count)], 2)
    labels = np.repeat(np.arange(count) % 3, 2)
    table = pd.DataFrame({"group": groups, "label": labels, "official": "", "path": groups, "digest": groups})
    found = with_test(
        Source(Path(), table, Task(("a", "b", "c"))), TrainConfig(split_seed=seed, test_fraction=fraction)
    )
    assert found.table.groupby("group")["official"].nunique().max() == 1
    assert set(found.table["official"]) == {"train", "test"}


def test_two_classes_under_other_names_give_the_same_split_and_images(phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    for split in ("train", "val", "test"):
        if (folder / split).exists():
            (folder / split / "NORMAL").rename(folder / split / "A healthy")
            (folder / split / "PNEUMONIA").rename(folder / split / "B ill")
    config = TrainConfig(image_size=32, cache_dir=str(tmp_path / "cache"))
    theirs, own = (read_data(replace(config, data_dir=str(root))) for root in (phantoms, folder))
    assert own.task.classes == ("A healthy", "B ill")
    assert own.fingerprint == theirs.fingerprint
    assert list(own.manifest["digest"]) == list(theirs.manifest["digest"])


def _rows(**changes: str) -> Rows:
    """Four patients, the first row changed."""
    rows = patients(4)
    rows[0] |= changes
    return rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (_rows(path="gone.png"), "1 image(s) that do not exist: 'gone.png'"),
        (_rows(path=""), "1 image(s) without a path"),
        (_rows(path="images/0-1.png"), "1 image(s) named more than once: 'images/0-1.png'"),
        (_rows(path="../other.png"), "1 image(s) outside the list's folder"),
        (_rows(path="/etc/hostname"), "1 image(s) outside the list's folder"),
        (_rows(label=""), "1 image(s) without a label"),
        (_rows(label="WELL"), "one label in 2 spellings (WELL, well)"),
        ([{**row, "label": "sick"} for row in patients(4)], "sick: a classifier needs 2 to 50 classes"),
        (patients(4, split=lambda n: "holdout" if n == 0 else "train"), "2 row(s) of unknown split (holdout)"),
        (patients(4, split=lambda n: "" if n == 0 else "train"), "2 of 8 rows have no split"),
        (
            [{**row, "split": ("train", "test")[i % 2]} for i, row in enumerate(patients(4))],
            "4 patient(s) in more than",
        ),
        ([{"path": row["path"], "x": "1"} for row in patients(2)], "no column for the label in path, x"),
        ([{"a": row["path"], "label": row["label"]} for row in patients(2)], "no column for the path in a, label"),
    ],
)
def test_a_bad_list_is_refused_in_one_line(tmp_path: Path, refused: Refused, rows: Rows, says: str) -> None:
    assert says in refused(write_list(tmp_path, rows))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "not a CSV with a header"),
        ("a.csv", b"path,label\n", "has no rows"),
        ("a.csv", b'path,label\n"1.png,well\n2.png,sick\n', "not a CSV with a header"),
        ("a.csv", b"path,label\n1.png,well,3,4\n2.png,sick\n", "not a CSV with a header"),
        ("a.csv", b"\xff\xfe\x00p\x00a\x00t\x00h", "not a CSV with a header in UTF-8"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b'[{"path": "\\ud800", "label": "x"}]', "not JSON"),
        ("a.json", b'{"training": 3}', "training is not a list of objects"),
        ("a.json", b'{"name": "films"}', "has no rows"),
        ("a.xlsx", b"PK", "neither a folder nor a list"),
    ],
)
def test_a_broken_list_is_refused_in_one_line(
    tmp_path: Path, refused: Refused, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"classes": "sick,well,other"}, "other not in the data"),
        ({"classes": "sick,sick"}, "well in the data and not listed"),
        ({"positive": "other"}, "must name one of the two classes"),
        ({"columns": "path"}, "use the form"),
        ({"columns": "path=nothing"}, "has no column nothing"),
        ({"patient_pattern": "("}, "not a regular expression"),
        ({"patient_pattern": "a"}, "has 0 groups in parentheses"),
        ({"patient_pattern": "(zzz)"}, "matches no path"),
        ({"splits": "gone.csv"}, "cannot be read"),
    ],
)
def test_bad_options_of_a_source_are_refused_in_one_line(
    tmp_path: Path, refused: Refused, options: dict[str, str], says: str
) -> None:
    file = write_list(tmp_path, [{k: v for k, v in row.items() if k != "patient"} for row in patients(4)])
    assert says in refused(file, **options)


def test_class_folders_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "Cat/2.png", "dog/3.png")
    with pytest.raises(UserError, match="Cat and cat differ in case only"):
        read(tmp_path)


def test_a_loop_of_links_is_no_trap(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    (tmp_path / "cat/loop").symlink_to(tmp_path / "cat")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert read(tmp_path).task == Task(("cat", "dog"))


def test_other_classes_beside_those_of_the_kaggle_set_must_be_named(phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    for split in ("train", "test"):
        touch(folder / split / "COVID", "a.png", "b.png")
    with pytest.raises(UserError, match="COVID: not a class folder"):
        read(folder)
    assert read(folder, classes="NORMAL,PNEUMONIA,COVID").task.classes == ("NORMAL", "PNEUMONIA", "COVID")


def test_a_pattern_applies_only_where_no_column_tells(tmp_path: Path) -> None:
    rows = patients(6)
    for row in rows[:4]:
        row["patient"] = ""
    found = read(write_list(tmp_path, rows), patient_pattern=r"/(\d)-")
    assert set(found.table["group"]) == {"0", "1", *(f"p{n}" for n in range(2, 6))}


def test_copies_of_an_image_are_on_one_side_of_a_split_that_is_made(tmp_path: Path) -> None:
    file = write_list(tmp_path, patients(30))
    for n in range(0, 28, 4):  # the first image of a patient is also one of another patient of its class
        shutil.copy(tmp_path / f"images/{n}-0.png", tmp_path / f"images/{n + 2}-1.png")
    for seed in range(5):
        table = read(file, split_seed=seed, test_fraction=0.3).table
        assert table.groupby("digest")["official"].nunique().max() == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.assign(split=["train", "test"] * (len(t) // 2)), "4 patient(s) in more than one split"),
        (lambda t: pd.concat([t, t.assign(split="val")]), "in two splits"),
        (lambda t: t.assign(split="holdout"), "holdout is not a split"),
    ],
)
def test_a_file_of_splits_must_not_contradict(
    tmp_path: Path, refused: Refused, change: Callable[[pd.DataFrame], pd.DataFrame], says: str
) -> None:
    file = write_list(tmp_path, patients(4))
    table = read(file).table.sort_values("path").assign(split="train")
    change(table).to_csv(tmp_path / "splits.csv", index=False)
    assert says in refused(file, splits=str(tmp_path / "splits.csv"))


def test_images_without_a_split_are_named_unless_they_are_left_out(phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    config = TrainConfig(data_dir=str(folder), image_size=32, cache_dir=str(tmp_path / "cache"), on_bad_image="skip")
    bad = next(folder.glob("train/NORMAL/*"))
    bad.write_bytes(b"no image")
    manifest = read_data(config).manifest
    manifest.to_csv(tmp_path / "manifest.csv", index=False)
    again = read_data(replace(config, splits=str(tmp_path / "manifest.csv"))).manifest
    for split in ("train", "val", "test"):
        own, theirs = (table.loc[table["split"] == split, "digest"] for table in (again, manifest))
        assert list(own) == list(theirs)
    manifest.iloc[1:].to_csv(tmp_path / "manifest.csv", index=False)
    with pytest.raises(UserError, match=r"has no split for 1 image\(s\)"):
        read_data(replace(config, splits=str(tmp_path / "manifest.csv")))


def test_subtypes_of_a_list_come_from_its_column(tmp_path: Path) -> None:
    rows = patients(36, subtype=lambda n: ("", "mild", "severe")[n % 3] if n % 2 else "")
    found = read(write_list(tmp_path, rows), labels="subtype")
    assert found.task.classes == ("mild", "severe", "sick", "well")
    kaggle = [{**row, "label": "PNEUMONIA" if row["label"] == "sick" else "NORMAL"} for row in rows]
    for row in kaggle:
        row["subtype"] = "fungal" if row["label"] == "PNEUMONIA" else "none"
    assert read(write_list(tmp_path, kaggle), labels="subtype").task.classes == ("fungal", "none")
    plain = [{key: value for key, value in row.items() if key != "subtype"} for row in rows]
    with pytest.raises(UserError, match="tells no subtypes"):
        read(write_list(tmp_path, plain), labels="subtype")


def test_subtypes_may_be_listed_in_an_order_and_must_fit_their_class(phantoms: Path, tmp_path: Path) -> None:
    listed = read(phantoms, labels="subtype", classes="VIRUS,BACTERIA,NORMAL")
    assert listed.task.classes == ("VIRUS", "BACTERIA", "NORMAL")
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    file = next(folder.glob("train/NORMAL/*"))
    file.rename(folder / "train/PNEUMONIA" / file.name)
    with pytest.raises(UserError, match="tells no subtype of its class"):
        read(folder, labels="subtype")


def test_a_patient_written_as_missing_is_none(tmp_path: Path) -> None:
    rows = [{**row, "patient": "NA"} for row in patients(6)]
    found = read(write_list(tmp_path, rows))
    assert (found.table["group"] == found.table["path"]).all()


def test_metadata_beside_splits_is_not_read_as_a_list(phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    (folder / "metadata.csv").write_text("file_name,age\n1.png,3\n")
    pd.testing.assert_frame_equal(read(folder).table, read(phantoms).table)


def test_columns_are_refused_for_a_folder(phantoms: Path, refused: Refused) -> None:
    assert "is for lists" in refused(phantoms, columns="path=file")


NAMES = st.text("ab.-_0A é", min_size=1, max_size=6).filter(lambda name: name.strip(".") and not name.startswith("."))


@given(st.sets(st.tuples(st.sampled_from(["train", "val", "test", ""]), NAMES, NAMES), max_size=20))
def test_rows_are_in_the_order_of_the_splits_then_of_the_paths(rows: set[tuple[str, str, str]]) -> None:
    table = pd.DataFrame([(split, f"{one}/{two}") for split, one, two in rows], columns=["official", "path"])
    found = _in_order(table)
    order = ["", "train", "val", "test"]
    pairs = [(order.index(split), PurePosixPath(path)) for split, path in table.itertuples(index=False)]
    expected = [(order[split], str(path)) for split, path in sorted(pairs)]
    assert list(found.itertuples(index=False, name=None)) == expected
