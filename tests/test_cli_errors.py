"""What goes wrong ends in one line on stderr and a status that is not 0, before anything is begun or lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import fail, run
from forked import run_python

import fastops
from fastops.cli import main

Capture = pytest.CaptureFixture[str]
FASTOPS = str(Path(sys.executable).with_name("fastops"))


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("demo --output {tmp}", "matplotlib", "demo"),
        ("demo --output {tmp}", "mlxtend", "demo"),
        ("train fashion-mlp --output {tmp}", "matplotlib", "demo"),
        ("train fashion-mlp --output {tmp}", "mlxtend", "demo"),
        ("audit", "elftools", "audit"),
    ],
)
def test_missing_extra_is_named_with_its_pip_command(
    command: str, package: str, extra: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in list(sys.modules):
        if name.startswith(("fastops.cli.", "fastops.audit.")):
            monkeypatch.delitem(sys.modules, name)
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    line = fail(capsys, *command.format(tmp=tmp_path).split())
    assert line == f'fastops: error: this command needs {package}: pip install "torch-fastops[{extra}]"'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: command"),
        ("dance", "invalid choice: 'dance'"),
        ("train", "the following arguments are required: MODEL"),
        ("train vgg", "argument MODEL: invalid choice: 'vgg'"),
        ("train lenet --epochs 0", "argument --epochs: '0' is not a positive integer"),
        ("train lenet --batch-size many", "argument --batch-size: 'many' is not a positive integer"),
        ("train lenet --random-image --batch-size 2", "this model trains on one random image: --batch-size must be 1"),
        ("train logistic --batch-size 2", "this model trains on one row of five ones: --batch-size must be 1"),
        ("train resnet18 --random-image", "--random-image is only for lenet, whose tutorial has it"),
        ("train lenet --seed 18446744073709551616", "argument --seed: '18446744073709551616' is not an integer of 64"),
        ("train lenet --backend cudnn", "argument --backend: invalid choice: 'cudnn'"),
        ("train lenet --device toaster", "cannot use device 'toaster'"),
        ("train lenet --device meta", "cannot use device 'meta'"),
        ("train logistic --data .", "makes its own data: --data is only for fashion-mlp, lenet, cifar-net, resnet18"),
        ("train lenet --compare --save x.pt", "leave out --save and --resume"),
        ("train lenet --output {tmp}/file", "cannot write to {tmp}/file: File exists"),
        ("train lenet --save {tmp}", "cannot write to {tmp}: it is a folder"),
        ("train lenet --save {tmp}/no/x.pt", "cannot write to {tmp}/no/x.pt: No such file or directory"),
        ("train lenet --resume {tmp}/no.pt", "cannot read checkpoint {tmp}/no.pt: No such file or directory"),
        ("train lenet --resume {tmp}/file", "cannot read checkpoint {tmp}/file: damaged, or not a checkpoint"),
        ("train fashion-mlp --data {tmp}/no", "{tmp}/no is not a folder"),
        (
            "train fashion-mlp --data {tmp}",
            "{tmp} holds no FashionMNIST/raw, MNIST/raw, cifar-10-batches-py, or train.csv and test.csv",
        ),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    words: str, message: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("some text")
    assert message.format(tmp=tmp_path) in fail(capsys, *words.format(tmp=tmp_path).split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing was begun


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("words", ["train lenet --backend triton --output {tmp}", "verify --backend triton"])
def test_backend_that_cannot_run_here(
    words: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastops.dispatch.triton_installed", False)
    line = fail(capsys, *words.format(tmp=tmp_path).split(), "--device", "cpu")
    assert "backend 'triton' is selected but Triton is not installed: pip install" in line


@pytest.mark.parametrize("command", ["train linear-regression", "bench", "verify"])
def test_device_that_is_not_there(command: str, capsys: Capture, no_interpreter: None) -> None:
    for device in ("cpu:7", "meta"):
        assert f"cannot use device {device!r}: " in fail(capsys, *command.split(), "--device", device)


@pytest.mark.parametrize("option", ["--json {tmp}/no/x", "--json {tmp}", "--dump {tmp}/file", "--dump {tmp}/file/x"])
def test_audit_finds_out_before_it_compiles(
    option: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastops.audit.machine_code.machine_code", lambda *_: pytest.fail("compiles"))
    (tmp_path / "file").write_text("some text")
    words = f"audit --target sm90 --op add_relu {option}".format(tmp=tmp_path).split()
    assert f"cannot write to {words[-1]}: " in fail(capsys, *words)


INTO_A_FULL_DEVICE = """
import io, os, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
if sys.argv[1] == "unbuffered":  # as PYTHONUNBUFFERED has it
    sys.stdout = io.TextIOWrapper(open(1, "wb", 0), write_through=True)
from fastops.cli import main
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("buffered", ["buffered", "unbuffered"])
@pytest.mark.parametrize("command", ["doctor", "--version"])
def test_full_device(command: str, buffered: str) -> None:
    done = run_python(["-c", INTO_A_FULL_DEVICE, buffered, command])
    assert done.returncode == 2
    assert done.stderr == "fastops: error: cannot write the output: No space left on device\n"


def test_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        done = subprocess.run([FASTOPS, "doctor"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("name", ["curves.png", "saved.pt"])
def test_diverging_run_stops_and_keeps_what_was_saved(name: str, capsys: Capture, tmp_path: Path) -> None:
    common = ["train", "linear-regression", "--device", "cpu", "--output", tmp_path, "--save", tmp_path / "saved.pt"]
    run(capsys, *common, "--epochs", 1)
    before = (tmp_path / name).read_bytes()
    with fastops.backend("torch"):
        assert main([str(word) for word in (*common, "--lr", 1e30)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "training stopped: the swapped model's loss is inf in epoch 1, batch 2" in line
    assert (tmp_path / name).read_bytes() == before


def test_last_step_of_an_epoch_that_spoils_the_weights(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loss was still finite: no checkpoint of such weights is written."""
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self: (step(self), self.param_groups[0]["params"][0].data.mul_(torch.inf))
    )
    words = f"train linear-regression --device cpu --batch-size 3 --save {tmp_path}/x.pt --output {tmp_path}"
    with fastops.backend("torch"):
        assert main(words.split()) == 2
    assert "the swapped model's weights are no longer finite in epoch 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Before there is a command line


LACKS = {
    "FASTOPS_BACKEND": "environment variable FASTOPS_BACKEND: unknown backend 'foo': expected one of 'auto', ",
    "torch": 'this command needs torch: pip install "torch-fastops"\n',
    "interrupt": "fastops: interrupted\n",
}


def without(lack: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the package cannot be imported; from the very start of a process if torch cannot."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTOPS_BACKEND"}
    if lack == "FASTOPS_BACKEND":
        return run_python(words, env=environment | {"FASTOPS_BACKEND": "foo"})
    (folder / "torch.py").write_text(
        "raise ModuleNotFoundError(name='torch')" if lack == "torch" else "raise KeyboardInterrupt"
    )
    environment["PYTHONPATH"] = str(folder)
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("program", [[FASTOPS], ["-m", "fastops"]])
@pytest.mark.parametrize("lack", LACKS)
def test_package_that_cannot_be_imported(program: list[str], lack: str, tmp_path: Path) -> None:
    """One line for who typed the command."""
    done = without(lack, tmp_path, *program, "doctor")
    assert done.returncode == (130 if lack == "interrupt" else 2)
    assert LACKS[lack] in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("code", ["import fastops", "import sys; sys.argv = ['fastops']; import fastops"])
@pytest.mark.parametrize("lack", LACKS)
def test_exception_of_a_program_that_cannot_import_it(code: str, lack: str, tmp_path: Path) -> None:
    assert "Traceback" in without(lack, tmp_path, "-c", code, "fastops").stderr
