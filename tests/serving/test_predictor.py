from __future__ import annotations

import base64
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from dicoms import encoded, radiograph
from narrow import narrow_resnet
from PIL import Image
from torchvision.models import ResNet

from cxr.data.decode import ImageError, decode_gray
from cxr.data.views import to_input
from cxr.errors import UserError
from cxr.evaluation.familiarity import Familiarity
from cxr.network.ensemble import Ensemble
from cxr.network.inference import infer
from cxr.network.resnet import build_model
from cxr.network.start import StartNetwork
from cxr.serving.familiar import Familiar
from cxr.serving.predictor import CARD, DIGESTS, FEATURES, WEIGHTS, ModelCard, Predictor, save_package
from cxr.strategies import STRATEGIES
from cxr.task import KAGGLE
from cxr.tracking.registry import read_package

CARD_OF_TEST = ModelCard(
    arch="resnet18",
    image_size=32,
    resize="pad",
    threshold=0.5,
    strategy="partial",
    data_fingerprint="0123456789ab",
    weights="random",
    class_to_index=KAGGLE.class_to_index,
)


@pytest.fixture(scope="module")
def model() -> ResNet:
    """A network with non-default BatchNorm statistics, so that a lost buffer is detected."""
    model, _ = build_model("resnet18", "random", 4)
    model.train()(torch.randn(4, 3, 32, 32))
    return model


@pytest.fixture(scope="module")
def predictor(model: ResNet, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("package") / "made" / "here"
    save_package(folder, model.state_dict(), CARD_OF_TEST)
    return Predictor.load(folder)


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_package_reproduces_the_probabilities_of_the_evaluation(
    predictor: Predictor, model: ResNet, phantoms: Path
) -> None:
    files = sorted(phantoms.glob("test/*/*.jpeg"))
    images = [decode_gray(file.read_bytes(), 32, "pad")[0] for file in files]
    inputs = to_input(torch.from_numpy(np.stack(images)))
    logits, _ = infer(model, [(inputs, torch.zeros(len(files), dtype=torch.int64))])
    table = predictor.predict([predictor.prepare(file.read_bytes()) for file in files])
    # The package runs channels last and in other batches: float32 sums in another order.
    np.testing.assert_allclose(table["probability"], torch.softmax(logits.double(), 1)[:, 1], rtol=1e-4)
    assert len(set(table["probability"])) == len(files)


def test_more_images_than_a_batch_keep_their_order(predictor: Predictor) -> None:
    images = list(np.random.default_rng(1).integers(0, 256, (40, 32, 32), np.uint8))
    whole = predictor.predict(images)["probability"]
    for place in (0, 31, 32, 39):
        single = predictor.predict([images[place]])["probability"][0]
        assert whole[place] == pytest.approx(single, rel=1e-4)
    assert len(set(whole)) == 40


def test_the_model_card_survives_saving_and_loading(predictor: Predictor) -> None:
    kept = {name: getattr(predictor.card, name) for name in ("arch", "image_size", "resize", "class_to_index")}
    assert kept == {"arch": "resnet18", "image_size": 32, "resize": "pad", "class_to_index": KAGGLE.class_to_index}
    assert not predictor.model.training


def test_a_package_contains_no_pickle(model: ResNet, tmp_path: Path) -> None:
    save_package(tmp_path, model.state_dict(), CARD_OF_TEST)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CARD, DIGESTS}
    assert json.loads((tmp_path / CARD).read_text())["data_fingerprint"] == "0123456789ab"


@pytest.mark.parametrize("strategy", ["frozen", "partial"])
def test_a_package_tells_familiarity_as_when_it_was_saved(strategy: str, png: bytes, tmp_path: Path) -> None:
    network = narrow_resnet().eval()
    start = StartNetwork.of(network, STRATEGIES[strategy])
    with torch.no_grad():
        network.layer4[0].conv1.weight.add_(0.1 if strategy == "partial" else 0.0)
    known = np.random.default_rng(0).normal(size=(20, network.fc.in_features)).astype(np.float32)
    familiar = Familiar(start, Familiarity.fit(known, np.repeat([0, 1], 10), known))
    save_package(tmp_path, network.state_dict(), replace(CARD_OF_TEST, certainty_limit=0.1), familiar)
    loaded = Familiar.read(tmp_path / FEATURES, network)
    assert loaded.start.own == (() if strategy == "frozen" else ("layer4",))
    first, again = (Predictor(network, CARD_OF_TEST, each) for each in (familiar, loaded))
    pd.testing.assert_frame_equal(first.predict([first.prepare(png)]), again.predict([again.prepare(png)]))
    assert (tmp_path / FEATURES).stat().st_size < (tmp_path / WEIGHTS).stat().st_size


@pytest.mark.parametrize("above", [False, True])
def test_the_threshold_of_the_model_card_is_used(model: ResNet, png: bytes, above: bool) -> None:
    image = Predictor(model, CARD_OF_TEST).prepare(png)
    probability = Predictor(model, CARD_OF_TEST).predict([image])["probability"][0]
    threshold = np.nextafter(probability, 1) if above else probability  # at the threshold is positive
    card = replace(CARD_OF_TEST, threshold=threshold)
    row = Predictor(model, card).predict([image]).iloc[0]
    assert (row["label"], row["decision"]) == (("NORMAL", 0) if above else ("PNEUMONIA", 1))


def test_bytes_text_and_arrays_of_one_image_agree(predictor: Predictor, png: bytes) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    rgb = np.repeat(pixels[:, :, None], 3, 2)
    forms: list[Any] = [bytearray(png), memoryview(png), base64.b64encode(png).decode(), pixels, rgb]
    forms += [pixels.astype(np.int64), pixels.tolist(), np.asfortranarray(pixels)]
    expected = predictor.prepare(png)
    assert expected.shape == (32, 32)
    for form in forms:
        np.testing.assert_array_equal(predictor.prepare(form), expected)


@pytest.mark.parametrize(
    "image",
    [
        "/etc/hostname",
        "/etc/abcd123",  # valid base64 as it stands
        "data/test/NORMAL/x.jpeg",
        "https://example.org/x.png",
        "file:///etc/hostname",
        "röntgen",
        "",
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a" + bytes(100),
        np.zeros((64, 64), np.float32),
        np.zeros((64, 64), bool),
        np.full((64, 64), 256),
        np.full((64, 64), -1),
        np.zeros(64, np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 1), np.uint8),
        np.zeros((2, 64, 64, 3), np.uint8),
        np.zeros((31, 64), np.uint8),
        np.zeros((0, 64), np.uint8),
        [[1, 2], [3]],
        [],
        ["a"],
        None,
        3,
        Path("/etc/hostname"),
    ],
    ids=repr,
)
def test_an_invalid_image_is_rejected(predictor: Predictor, image: object) -> None:
    with pytest.raises(ImageError):
        predictor.prepare(image)


def test_text_never_reads_a_file(predictor: Predictor, png: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png)
    predictor.prepare((tmp_path / "x.png").read_bytes())
    with pytest.raises(ImageError, match="paths and addresses are not read"):
        predictor.prepare(str(tmp_path / "x.png"))


def test_a_truncated_image_is_rejected(predictor: Predictor, png: bytes) -> None:
    with pytest.raises(ImageError):
        predictor.prepare(png[: len(png) // 2])


@pytest.mark.parametrize("members", [1, 2])
def test_onnx_agrees_with_the_predictor(predictor: Predictor, tmp_path: Path, members: int) -> None:
    import onnxruntime

    if members > 1:
        card = replace(predictor.card, arch="narrow_resnet", members=members)
        network = Ensemble(narrow_resnet(seed) for seed in range(members))
        save_package(tmp_path / "package", network.state_dict(), card)
        predictor = Predictor.load(tmp_path / "package")
    files = predictor.export(tmp_path, onnx=True)
    assert files[-1].name == "X_ray_classifier.onnx"
    session = onnxruntime.InferenceSession(files[-1])
    images = np.random.default_rng(2).integers(0, 256, (5, 32, 32), np.uint8)
    for part in (images, images[:1]):
        (answers,) = session.run(None, {"image": part})
        np.testing.assert_allclose(answers, predictor.predict(list(part))["probability"], rtol=1e-4)


def test_onnx_without_its_packages_is_a_user_error(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="--extra onnx"):
        predictor.export(tmp_path / "new", onnx=True)
    assert not (tmp_path / "new").exists()


def test_dicom_bytes_and_their_base64_are_predicted_as_the_png(predictor: Predictor, png: bytes) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    expected = predictor.prepare(png)
    inverted = radiograph(255 - pixels, PhotometricInterpretation="MONOCHROME1")
    for data in (encoded(radiograph(pixels)), encoded(inverted)):
        assert np.array_equal(predictor.prepare(data), expected)
        assert np.array_equal(predictor.prepare(base64.b64encode(data).decode()), expected)


def test_a_dicom_file_without_a_preamble_is_known_by_its_name(predictor: Predictor, tmp_path: Path) -> None:
    pixels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    data = encoded(radiograph(pixels))
    for name in ("old.dcm", "old.png"):
        (tmp_path / name).write_bytes(data[132:])
    assert np.array_equal(predictor.read_files([tmp_path / "old.dcm"])[0], predictor.prepare(data))
    with pytest.raises(UserError, match="not a JPEG, PNG or DICOM file"):
        predictor.read_files([tmp_path / "old.png"])


def test_16_bit_grey_is_scaled_by_the_depth_of_the_card(model: ResNet) -> None:
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # 12 bits
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    levels = {
        depth: Predictor(model, replace(CARD_OF_TEST, depth=depth)).prepare(buffer.getvalue()) for depth in (12, 16)
    }
    assert levels[12].max() >= 250
    assert levels[16].max() <= 16
    with pytest.raises(ImageError, match="values up to 4095, more than 10 bits"):
        Predictor(model, replace(CARD_OF_TEST, depth=10)).prepare(buffer.getvalue())


def test_a_card_of_version_0_1_has_16_bits(model: ResNet, tmp_path: Path) -> None:
    save_package(tmp_path, model.state_dict(), CARD_OF_TEST)
    fields = json.loads((tmp_path / CARD).read_text())
    del fields["depth"]
    (tmp_path / CARD).write_text(json.dumps(fields))
    (tmp_path / DIGESTS).unlink()
    assert Predictor.load(tmp_path).card.depth == 16


@pytest.mark.parametrize("name", [WEIGHTS, CARD, DIGESTS])
def test_a_package_with_one_changed_byte_is_refused(model: ResNet, tmp_path: Path, name: str) -> None:
    save_package(tmp_path, model.state_dict(), CARD_OF_TEST)
    whole = (tmp_path / name).read_bytes()
    for place in (20, len(whole) // 2, len(whole) - 5):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="models:/x/1: is damaged"):
            read_package(tmp_path, "models:/x/1")
    (tmp_path / name).write_bytes(whole)
    assert read_package(tmp_path, "models:/x/1").card.text() == CARD_OF_TEST.text()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arch", "resnet19"),
        ("arch", ["resnet18"]),
        ("image_size", 10**6),
        ("image_size", True),
        ("resize", "fit"),
        ("threshold", "0.5"),
        ("threshold", float("nan")),
        ("class_to_index", {}),
        ("class_to_index", {"A": 0, "B": 0}),
        ("class_to_index", {"A": {}, "B": 1}),
        ("calibration", {"method": "platt", "slope": "1"}),
        ("calibration", {"method": "none", "refused_slope": "x"}),
        ("calibration", []),
        ("members", 10**9),
        ("members", 2),
        ("depth", 64),
        ("mean", [1, 2]),
        ("strange", 1),
    ],
)
def test_a_card_that_cannot_be_is_refused_in_one_line(model: ResNet, tmp_path: Path, field: str, value: object) -> None:
    save_package(tmp_path, model.state_dict(), CARD_OF_TEST)
    (tmp_path / DIGESTS).unlink()
    card = {**json.loads((tmp_path / CARD).read_text()), field: value}
    (tmp_path / CARD).write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"models:/x/1: is damaged \(.+\)$"):
        read_package(tmp_path, "models:/x/1")
