"""`fastops audit` as its user meets it: rows, rules, exit status, JSON and assembly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastops
from fastops.audit import launches, machine_code, rules, targets
from fastops.cli import main
from fastops.kernels import configs

ROOT = Path(fastops.__file__).parents[1]


def first_product() -> launches.Launch:
    return launches.launches("sm80", ["linear"])[0]


def test_in_an_installed_package(tmp_path: Path) -> None:
    """From the package alone, in another folder and without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = "audit --target gfx942 --op add_relu --jobs 1 --json found.json --dump code"
    (tmp_path / "fastops").symlink_to(ROOT / "fastops")
    done = subprocess.run(
        [sys.executable, "-m", "fastops", *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"add_relu_kernel", "add_relu_backward_kernel"}
    assert {row["dtype"] for row in rows} == {"fp64", "fp32", "bf16", "fp16"}
    assert f"{len(rows)} compilations for gfx942" in done.stdout
    dumped = list((tmp_path / "code").iterdir())
    assert len(dumped) == len(rows)
    assert all("s_endpgm" in file.read_text() for file in dumped)


def with_tile(launch: launches.Launch, tile: configs.MatmulConfig) -> launches.Launch:
    options = {name: value for name, value in tile._asdict().items() if name.startswith("num")}
    blocks = {name: value for name, value in tile._asdict().items() if name.startswith("BLOCK")}
    constants = launch.request["constants"] | blocks
    return launch._replace(request=launch.request | {"constants": constants, **options})


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A crash of the compiler, an error and a broken rule are one row each; what follows is compiled as ever."""
    (tmp_path / "crashes.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    good = first_product()
    crash = good._replace(request=good.request | {"kernel": "crashes:kernel"})
    error = good._replace(request=good.request | {"num_warps": 3})
    too_large = with_tile(good, configs.MatmulConfig(128, 128, 128, 8, 4))
    spilling = with_tile(good, configs.MatmulConfig(256, 256, 32, 4, 2))
    monkeypatch.setitem(launches.AUDITED, "linear", lambda _: iter((crash, error, too_large, spilling, good)))
    file, code = tmp_path / "audit.json", tmp_path / "code"
    status = main(f"audit --target sm80 --op linear --jobs 1 --json {file} --dump {code}".split())
    assert status == 1

    *rows, row = json.loads(file.read_text())["rows"]
    assert [next(iter(bad["broken"])) for bad in rows] == ["compile", "compile", "shared-memory", "spill"]
    assert rows[0]["broken"]["compile"] == "the compiler crashed with exit status -6"
    printed = capsys.readouterr().out
    assert "compile: the compiler takes it: broken by 2" in printed
    assert "shared-memory: a program's shared memory fits the card: broken by 1" in printed

    assert row["target"] == "sm80" and row["kernel"] == "matmul_kernel" and row["dtype"] == "bf16"
    assert row["broken"] == {}
    assert 0 < row["shared_memory"] <= row["shared_memory_limit"] == 163 << 10
    assert 0 < row["registers"] <= 255 and row["spilled_registers"] == 0
    assert row["matrix_instructions"].keys() == {"HMMA"} and row["loop"]["matrix"] > 0
    assert row["accesses"]["128"] > 0 and 0 < row["occupancy"] <= 1 and 0 < row["issue_bound"] <= 1
    assert row["seconds"] > 0
    assert len(list(code.iterdir())) == 3 and all("HMMA" in part.read_text() for part in code.iterdir())


def test_main_loop_is_the_innermost_with_matrix_instructions() -> None:
    nvidia = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/               @P2 BRA 0x10 ;
        /*0070*/                   BRA 0x70;
"""
    loop = machine_code._main_loop(machine_code._instructions(nvidia))
    assert [text.split()[0] for text in loop] == ["HMMA.16816.F32.BF16", "IADD3", "BRA"]
    amd = """
.LBB0_1:
\ts_barrier
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""
    loop = machine_code._main_loop(machine_code._instructions(amd))
    assert [machine_code._kind(text) for text in loop] == ["other", "global", "matrix", "other"]


@pytest.mark.parametrize(
    ("instruction", "bits"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", 128),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", 128),
        ("UTMALDG.2D [UR8], [UR4], desc[UR6]", 128),
        ("UTMASTG.2D [UR8], [UR4]", 128),
        ("LDG.E.64 R4, desc[UR4][R2.64]", 64),
        ("LDG.E R4, desc[UR4][R2.64]", 32),
        ("STG.E.U16 desc[UR4][R2.64], R4", 16),
        ("global_load_dwordx4 v[0:3], v[4:5], off", 128),
        ("buffer_store_dwordx2 v[0:1], v2, s[0:3], 0", 64),
        ("global_load_dword v0, v[4:5], off", 32),
        ("global_load_ushort v0, v[4:5], off", 16),
        ("global_load_b128 v[0:3], v[4:5], off", 128),
        ("global_store_d16_hi_b16 v[4:5], v0, off", 16),
        ("global_load_u8 v0, v[4:5], off", 8),
    ],
)
def test_width_of_an_access(instruction: str, bits: int) -> None:
    assert machine_code.GLOBAL.match(instruction)
    assert machine_code._width(instruction) == bits


def test_every_rule_is_explained() -> None:
    page = (ROOT / "docs" / "audit.md").read_text()
    assert all(f"`{rule.name}`" in page for rule in rules.RULES)
    assert all(target in page for target in targets.TARGETS)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("sm70", "sm75"),
        ("sm87", "sm86"),
        ("sm89", "sm86"),
        ("sm103", "sm100"),
        ("sm121", "sm120"),
        ("gfx908", "gfx90a"),
        ("gfx940", "gfx90a"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx950"),
        ("gfx1030", "gfx1100"),
        ("gfx1201", "gfx1100"),
    ],
)
def test_unlisted_gpu_takes_the_nearest_older_entry_of_its_line(name: str, entry: str) -> None:
    assert configs.listed(name) == entry


def test_every_kernel_of_a_loss_is_held_to_its_width() -> None:
    pairs = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"]
    found = launches.launches("sm90", ["add_relu", "cross_entropy", "binary_cross_entropy_with_logits", *pairs])
    held = {(launch.kernel, launch.width) for launch in found if launch.stream}
    names = [
        f"{op}{way}_kernel" for op in ("add_relu", "cross_entropy", "bce", "pair_loss") for way in ("", "_backward")
    ]
    assert held == {(name, width) for name in names for width in (128, 64)}
    assert {launch.kernel for launch in found if not launch.stream} == {"total_kernel", "cross_entropy_total_kernel"}


@pytest.mark.parametrize("words", ["--target sm42", "--op softmax", "--jobs 0"])
def test_wrong_words(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["audit", *words.split()])
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]
    assert status == 2
    assert words.split()[1] in capsys.readouterr().err
