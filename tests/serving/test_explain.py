from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from narrow import narrow_resnet
from PIL import Image
from torchvision.models import ResNet

from cxr.data.decode import UInt8
from cxr.data.splits import CLASS_TO_INDEX
from cxr.data.views import to_input
from cxr.errors import UserError
from cxr.figures.style import Floats
from cxr.network.freezing import checksum
from cxr.network.resnet import run_stages, stage_modules
from cxr.serving import explain
from cxr.serving.predictor import ModelCard, Predictor
from cxr.strategies import STAGES

SIDE, SQUARE = 128, 40
Bools = npt.NDArray[np.bool_]


def planted(seed: int, count: int) -> tuple[UInt8, npt.NDArray[np.int64], Bools]:
    """(noise, every other image with a bright square somewhere, class 1 for those, and where the square is)."""
    random = np.random.default_rng(seed)
    images = random.integers(60, 120, (count, SIDE, SIDE), np.uint8)
    labels, inside = np.arange(count) % 2, np.zeros(images.shape, bool)
    for image in np.flatnonzero(labels):
        top, left = random.integers(0, SIDE - SQUARE, 2)
        inside[image, top : top + SQUARE, left : left + SQUARE] = True
    images[inside] = 230
    return images, labels, inside


@pytest.fixture(scope="module")
def finder() -> ResNet:
    """A network that has learnt to tell images with a square."""
    model = narrow_resnet(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(30):
        images, labels, _ = planted(step, 16)
        optimizer.zero_grad()
        F.cross_entropy(model(to_input(torch.from_numpy(images))), torch.from_numpy(labels)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def squares() -> tuple[UInt8, Bools]:
    """(images with a square that the finder has not seen, where it is)."""
    images, labels, inside = planted(999, 40)
    return images[labels == 1], inside[labels == 1]


def correlation(a: Floats, b: Floats) -> float:
    """The mean correlation of pairs of maps; a map that is the same everywhere correlates with none."""
    pairs = [(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True)]
    return float(np.mean([np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else 0.0 for x, y in pairs]))


def test_a_map_has_the_images_size_and_its_own_maximum_is_one(finder: ResNet, squares: tuple[UInt8, Bools]) -> None:
    heats = explain.heatmaps(finder, squares[0])
    assert heats.shape == (20, SIDE, SIDE)
    assert heats.dtype == np.float32
    assert heats.min() >= 0
    np.testing.assert_allclose(heats.max((1, 2)), 1, rtol=1e-6)


@pytest.mark.parametrize("target", [0, 1])
def test_before_a_pooled_head_grad_cam_is_the_heads_own_sum(finder: ResNet, target: int) -> None:
    """With global average pooling and one linear layer, Grad-CAM is CAM (Zhou et al. 2016) but for a factor."""
    images = planted(5, 6)[0]
    features = run_stages(finder, to_input(torch.from_numpy(images)), STAGES[:-1])
    maps = torch.einsum("c,nchw->nhw", finder.fc.weight[target], features).relu()
    large = F.interpolate(maps.unsqueeze(1), (SIDE, SIDE), mode="bilinear").squeeze(1)
    expected = large / large.amax((1, 2), keepdim=True).clamp(min=1e-30)
    np.testing.assert_allclose(explain.heatmaps(finder, images, target), expected, atol=1e-5)


def test_the_map_follows_the_evidence(finder: ResNet, squares: tuple[UInt8, Bools]) -> None:
    images, inside = squares
    heats = explain.heatmaps(finder, images)
    assert heats[inside].mean() > 2 * heats[~inside].mean()
    assert all(heat[place].mean() > heat[~place].mean() for heat, place in zip(heats, inside, strict=True))


@pytest.mark.parametrize("depth", range(1, 7))
def test_randomised_weights_change_the_map(finder: ResNet, squares: tuple[UInt8, Bools], depth: int) -> None:
    """Cascading from the top: Adebayo et al., Sanity Checks for Saliency Maps, 2018."""
    images = squares[0][:8]
    heats = explain.heatmaps(finder, images)
    found = []
    for seed in range(6):  # one draw of a head may agree by chance
        model, fresh = copy.deepcopy(finder), narrow_resnet(100 + seed)
        for stage in STAGES[-depth:]:
            for mine, other in zip(stage_modules(model, stage), stage_modules(fresh, stage), strict=True):
                mine.load_state_dict(other.state_dict())
        found.append(correlation(heats, explain.heatmaps(model, images)))
    assert correlation(heats, heats) > 0.999
    assert np.mean(found) < (0.3 if depth == len(STAGES) else 0.5)


def test_without_support_the_map_is_zero(finder: ResNet) -> None:
    model = copy.deepcopy(finder)
    torch.nn.init.zeros_(model.fc.weight)
    assert not explain.heatmaps(model, planted(0, 3)[0]).any()


def test_maps_do_not_depend_on_the_other_images(finder: ResNet) -> None:
    images = planted(3, 70)[0]
    heats = explain.heatmaps(finder, images)
    np.testing.assert_array_equal(explain.heatmaps(finder, images), heats)
    for place in (0, 31, 32, 69):
        np.testing.assert_allclose(explain.heatmaps(finder, [images[place]])[0], heats[place], atol=1e-4)


def test_images_that_cannot_be_written_to_are_taken(finder: ResNet, tmp_path: Path) -> None:
    images = planted(3, 2)[0]
    images.tofile(tmp_path / "images")
    stored = np.memmap(tmp_path / "images", np.uint8, "r", shape=images.shape)
    np.testing.assert_array_equal(explain.heatmaps(finder, stored), explain.heatmaps(finder, images))


@pytest.mark.parametrize("mode", ["in use", "in training", "partly frozen"])
def test_the_model_is_left_as_it_was(tiny: ResNet, mode: str) -> None:
    tiny.train(mode != "in use").requires_grad_(mode != "in use")
    if mode == "partly frozen":
        tiny.layer1.eval().requires_grad_(False)
    modes = [module.training for module in tiny.modules()]
    flags = [parameter.requires_grad for parameter in tiny.parameters()]
    before = checksum(tiny)
    heats = explain.heatmaps(tiny, planted(0, 2)[0])
    assert [module.training for module in tiny.modules()] == modes
    assert [parameter.requires_grad for parameter in tiny.parameters()] == flags
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())
    assert checksum(tiny) == before
    np.testing.assert_array_equal(explain.heatmaps(tiny.eval(), planted(0, 2)[0]), heats)


def test_a_failure_leaves_no_hook(tiny: ResNet) -> None:
    with pytest.raises((IndexError, AssertionError)):
        explain.heatmaps(tiny, planted(0, 2)[0], target=7)
    assert not any(module._forward_hooks for module in tiny.modules())


def test_an_overlay_is_the_image_where_there_is_no_heat() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    plain = explain.overlay(image, np.zeros((16, 16)))
    assert plain.dtype == np.uint8
    np.testing.assert_array_equal(plain, np.repeat(image[:, :, None], 3, 2))


def test_an_overlay_warms_with_the_heat() -> None:
    red, _, blue = explain.overlay(np.full((1, 5), 128, np.uint8), np.linspace(0, 1, 5)[None])[0].astype(int).T
    assert (np.diff(red - blue)[1:] > 20).all()
    assert red[-1] - blue[-1] > 100


scores = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1)  # ties, too
scored = st.lists(st.tuples(st.sampled_from([0, 1]), scores), max_size=30)
thresholds = st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.floats(0, 1)


def predictions(rows: list[tuple[int, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["label", "probability"]).astype({"label": int, "probability": float})
    return table.assign(path=[f"image{i:02}" for i in range(len(rows))])


@given(scored, thresholds, st.integers(0, 5))
def test_examples_are_the_most_confident_and_the_nearest(
    rows: list[tuple[int, float]], threshold: float, count: int
) -> None:
    table = predictions(rows)
    chosen = explain.choose_examples(table, threshold, count)
    assert chosen.index.is_unique
    pd.testing.assert_frame_equal(chosen[list(table)], table.loc[chosen.index])
    called = table["probability"] >= threshold
    confidence = table["probability"].where(called, 1 - table["probability"])
    correct = called == (table["label"] == 1)
    right, wrong, near = (
        chosen[chosen["kind"] == kind].index for kind in (explain.RIGHT, explain.WRONG, explain.BORDERLINE)
    )
    assert [*right, *wrong, *near] == list(chosen.index)
    assert len(right) == min(count, correct.sum())
    assert len(wrong) == min(count, (~correct).sum())
    assert len(near) == min(count, len(table) - len(right) - len(wrong))
    assert correct[right].all()
    assert not correct[wrong].any()
    for picked, pool in ((wrong, ~correct), *((right[called[right] == c], correct & (called == c)) for c in (0, 1))):
        left = confidence[pool].drop(picked)
        assert picked.empty or left.empty or confidence[picked].min() >= left.max()
    distance = (table["probability"] - threshold).abs()
    farther = distance.drop(chosen.index)
    assert near.empty or farther.empty or distance[near].max() <= farther.min()
    if count >= 2:
        assert set(table.loc[right, "label"]) == set(table.loc[correct, "label"])


@given(scored, thresholds, st.randoms(use_true_random=False))
def test_examples_do_not_depend_on_the_order_of_the_rows(
    rows: list[tuple[int, float]], threshold: float, random: np.random.Generator
) -> None:
    table = predictions(rows)
    order = list(table.index)
    random.shuffle(order)
    pd.testing.assert_frame_equal(
        explain.choose_examples(table.loc[order], threshold), explain.choose_examples(table, threshold)
    )


def test_an_image_stored_twice_is_chosen_once() -> None:
    table = predictions([(1, 0.9), (1, 0.9), (0, 0.2)]).assign(digest=["a", "a", "b"])
    assert list(explain.choose_examples(table, 0.5)["path"]) == ["image00", "image02"]


def test_confidence_is_that_of_the_decision_when_the_threshold_is_high() -> None:
    table = predictions([(1, 0.9), (1, 0.5), (0, 0.99), (0, 0.96)])  # all wrong at 0.95
    wrong = explain.choose_examples(table, 0.95, 2)
    assert list(wrong["path"][:2]) == ["image02", "image03"]


def test_the_panel_names_kind_truth_and_probability(finder: ResNet) -> None:
    images = planted(7, 4)[0]
    chosen = explain.choose_examples(predictions([(0, 0.125), (1, 0.75), (0, 0.875), (1, 0.25)]), 0.5)
    figure = explain.examples_panel(finder, images[chosen.index], chosen, "test")
    shown = {axes.get_title().replace("\n", " ").replace("\xa0", " ") for axes in figure.axes if axes.images}
    assert shown == {
        "confident right: NORMAL, p = 0.125",
        "confident right: PNEUMONIA, p = 0.750",
        "confident wrong: NORMAL, p = 0.875",
        "confident wrong: PNEUMONIA, p = 0.250",
    }


@pytest.fixture
def predictor(tiny: ResNet) -> Predictor:
    card = ModelCard("resnet18", 64, "pad", 0.5, "full", "0123456789ab", "random", CLASS_TO_INDEX)
    return Predictor(tiny, card)


@pytest.fixture
def files(phantoms: Path) -> list[Path]:
    return sorted(phantoms.glob("test/*/*.jpeg"))[:2]


def test_every_file_gets_a_picture(predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    written = explain.explain_files(predictor, files, tmp_path / "made" / "here")
    assert written == [tmp_path / "made" / "here" / f"{file.stem}_gradcam.png" for file in files]
    assert set(written) == set((tmp_path / "made" / "here").iterdir())
    for file in written:
        with Image.open(file) as picture:
            assert picture.width > 2 * 64


def test_a_picture_names_file_decision_and_probability(
    predictor: Predictor, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: titles.append(figure.get_suptitle()))
    explain.explain_files(predictor, files, tmp_path)
    table = predictor.predict_files(files)
    for title, file, (_, row) in zip(titles, files, table.iterrows(), strict=True):
        words = " ".join(title.split())
        assert words.startswith(f"{file.name}: decision {row['label']}, ")
        assert f"{row['probability']:.3f}" in words


@pytest.mark.parametrize("name", ["a$x_{$.png", "\u80ba.png", "two\nlines.png", "a" * 200 + ".png"])
def test_no_name_breaks_a_picture(predictor: Predictor, files: list[Path], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(files[0].read_bytes())
    (written,) = explain.explain_files(predictor, [tmp_path / name], tmp_path / "out")
    assert written.stat().st_size > 0


def test_images_of_one_stem_do_not_overwrite_each_other(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    names = ["a/x.jpeg", "b/x.jpeg", "b/X.jpeg", "b/x_gradcam.jpeg", "b/x_gradcam_2.jpeg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[0].read_bytes())
    paths = [tmp_path / name for name in [*names, "a/x.jpeg"]]
    written = explain.explain_files(predictor, paths, tmp_path / "out")
    assert [file.name for file in written[:3]] == ["x_gradcam.png", "x_gradcam_2.png", "X_gradcam_3.png"]
    assert len({str(file).casefold() for file in written}) == len(paths)


def test_all_bad_files_are_named_before_anything_is_written(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image")
    paths = [files[0], tmp_path / "text.png", tmp_path / "absent.png"]
    with pytest.raises(UserError, match=r"2 of 3 .*text\.png.*absent\.png"):
        explain.explain_files(predictor, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_to_explain_is_not_overwritten(predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    paths = [tmp_path / "x.png", tmp_path / "x_gradcam.png"]
    for path in paths:
        path.write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match=r"would overwrite .*x_gradcam\.png"):
        explain.explain_files(predictor, paths, tmp_path / "absent" / "..")
    assert paths[1].read_bytes() == files[0].read_bytes()


def test_a_folder_that_cannot_be_written_is_a_user_error(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="name another folder"):
            explain.explain_files(predictor, files, folder)
