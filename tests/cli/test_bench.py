"""`bench` lists, runs, checks what it times, and writes every row."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from focalnet_kernels.bench import roofline
from focalnet_kernels.bench.cases import LEVELS, PEERS
from focalnet_kernels.bench.records import MEASURED, read
from focalnet_kernels.cli import main
from focalnet_kernels.models.variants import VARIANTS

EVERYTHING = [argument for level in LEVELS for argument in ("--level", level)] + ["--target", "all"]


def invoke(*args):
    result = CliRunner().invoke(main, ["bench", *args])
    assert result.exit_code == 0, result.output
    return result.output


def rows_of(tmp_path, *args):
    output = tmp_path / "bench.csv"
    quick = ["--batch", "1", "--size", "32", "--rounds", "3", "--no-roofline", "--no-memory", "--dtype", "float32"]
    invoke(*quick, "--output", str(output), *args)
    return read(output), json.loads(output.with_suffix(".json").read_text())


def test_dry_run_lists_every_published_shape():
    lines = invoke("--dry-run", "--size", "0", "--dtype", "bfloat16", *EVERYTHING).splitlines()
    cases = [line for line in lines if not line.startswith(" ")]
    for variant in VARIANTS:
        for level in ("op: focal_context", "op: modulate", "layer:", "block: block", "model: model"):
            assert any(c.startswith(level) and f" {variant} " in c for c in cases), (level, variant)
    assert sum(c.startswith("peers") for c in cases) == len(PEERS) == 3
    assert any("detection" in c and "8x200x334x96" in c for c in cases)
    assert any("video" in c and "8x8x56x56x96" in c for c in cases)
    assert "layer: focalnet_large_fl4 stage 1 k=3,5,7,9 8x96x96x192 bfloat16" in cases
    assert any(line.startswith("    ours cuda    skipped: ") for line in lines)
    if not torch.cuda.is_available():
        assert any(line.startswith("    ours triton    skipped: ") for line in lines)
    assert any(line.startswith("    timm    skipped: timm has no focalnet_tiny_iso") for line in lines)


def test_dry_run_lists_peers_and_compiled_forms():
    output = invoke("--dry-run", "--level", "peers", "--compile", "default", "--compile", "max-autotune")
    for name in ("swin_tiny_patch4_window7_224", "convnext_tiny", "focalnet_tiny_lrf accelerated cpu"):
        for form in ("", " compiled", " compiled max-autotune"):
            assert f"    {name}{form}\n" in output or f"    {name}{form}    skipped: " in output


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--device", "banana", "expected cpu, cuda or cuda:N, got 'banana'"),
        ("--device", "mps", "expected cpu, cuda or cuda:N, got 'mps'"),
        ("--device", "cuda:99", "got 'cuda:99', but"),
        ("--dtype", "float64", "'float64' is not one of 'float32', 'bfloat16', 'float16'"),
        ("--size", "31", "expected at least 32 pixels a side for focalnet_tiny_lrf, got 31"),
        ("--size", "800x16", "expected at least 32 pixels a side for focalnet_tiny_lrf, got 16"),
        ("--size", "800x0", "expected two sides of some pixels, got '800x0'"),
        ("--size", "8x8x8", "expected pixels a side, or HEIGHTxWIDTH, got '8x8x8'"),
        ("--output", "{}/file/bench.csv", "cannot be written: "),
        ("--output", "{}/bench.csv", "cannot be written: "),
        ("--output", "{}/other.json", "expected the CSV file's name"),
    ],
)
@pytest.mark.parametrize("level", ["layer", "model"])
def test_what_cannot_be_is_known_before_the_measuring(option, value, message, level, tmp_path, monkeypatch):
    """A file where a folder is wanted, and a folder where the other file is, refuse even root."""
    (tmp_path / "file").touch()
    (tmp_path / "bench.json").mkdir()
    monkeypatch.setattr(sys.modules["focalnet_kernels.cli.bench"], "run_case", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(sys.modules["focalnet_kernels.cli.bench"], "ceilings", lambda *args: 1 / 0)
    arguments = ["--level", level, "--no-memory", option, value.format(tmp_path)]
    for dry_run in [False] if option == "--output" else [False, True]:
        result = CliRunner().invoke(main, ["bench", *arguments, *["--dry-run"] * dry_run], terminal_width=500)
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
        assert option in result.output and message in result.output
    assert not (tmp_path / "bench.csv").exists()


def test_ctrl_c_keeps_the_rows_of_an_unfinished_case(tmp_path, monkeypatch):
    command = sys.modules["focalnet_kernels.cli.bench"]
    finished = []

    def interrupted(case, found, **options):
        yield case.labels() | {"mode": "forward", "provider": "ours", "p50_ms": 1.0}
        finished.append(case)
        if len(finished) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_case", interrupted)
    output = tmp_path / "bench.csv"
    result = CliRunner().invoke(main, ["bench", "--no-roofline", "--no-memory", "--output", str(output)])
    assert result.exit_code == 1 and "Aborted!" in result.output
    assert f"wrote {output}" in result.output
    assert len(read(output)) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there it measures in other processes")
@pytest.mark.slow  # on a busy machine a thread of concurrent.futures complains now and then of shutdown(wait=False)
@pytest.mark.parametrize("when", ["starting", "measuring"])
def test_ctrl_c_ends_every_process(when, tmp_path):
    """As a terminal sends it, to all of them: no traceback of theirs, nobody left."""
    output = tmp_path / "bench.csv"
    command = ["bench", "--target", "focalnet_tiny_srf", "--size", "32", "--batch", "1", "--dtype", "float32"]
    command += ["--rounds", "3", "--no-roofline", "--provider", "ours cpu", "--output", str(output)]
    command += ["--mode", "forward", "--stage", "1", "--stage", "2", "--level", "layer", "--level", "block"]
    process = subprocess.Popen(
        [sys.executable, "-m", "focalnet_kernels", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: output.exists() if when == "measuring" else len(session(process.pid)) > 2)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1 and "Aborted!" in said and "Traceback" not in said, said
    wait_for(lambda: not session(process.pid), seconds=10)


def session(leader):
    """Its processes that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == leader and state != "Z":
                found.append(stat.parent.name)
    return found


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_layers(tmp_path):
    rows, whole = rows_of(tmp_path, "--target", "focalnet_tiny_srf")
    providers = {"authors' form", "timm", "timm channels_last", "transformers"}
    timed = [row for row in rows if not row["skipped"]]
    assert {row["provider"] for row in timed} >= providers
    assert {row["mode"] for row in rows} == {"forward", "backward", "forward+backward"}
    assert len({row["shape"] for row in rows}) == 4
    assert set(MEASURED) < set(rows[0])
    assert all(
        row[key] for row in rows for key in ("device", "machine", "threads", "torch", "date", "levels", "rounds")
    )
    assert all(0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in timed)
    assert all(row["saved_bytes"] for row in timed if row["mode"] != "forward")
    assert not any(row["p50_ms"] for row in rows if row["skipped"])
    assert len(whole["rows"]) == len(rows)
    assert whole["machine"]["torch"] == rows[0]["torch"]
    assert whole["configuration"]["batch"] == 1


def test_model_and_roofline(tmp_path, monkeypatch):
    command = sys.modules["focalnet_kernels.cli.bench"]  # cli.bench is the click command
    monkeypatch.setattr(command, "ceilings", lambda *args: roofline.ceilings(*args, small=True))
    options = ["--level", "model", "--target", "focalnet_tiny_srf", "--mode", "forward", "--roofline"]
    for provider in ("authors' form", "timm", "timm channels_last", "ours cpu"):
        options += ["--provider", provider]
    rows, _ = rows_of(tmp_path, *options)
    assert {row["case"] for row in rows if row["level"] == "ceiling"} == {"copy", "product"}
    timed = {row["provider"]: row for row in rows if row["level"] == "model" and not row["skipped"]}
    assert set(timed) >= {"authors' form", "timm", "timm channels_last"}
    assert all(float(row["share_of_bound"]) > 0 and float(row["images_per_s"]) > 0 for row in timed.values())


@pytest.mark.parametrize("arguments", [["--target", "focalnet_nano"], ["--dtype", "int8"], ["--provider", "nobody"]])
def test_what_does_not_exist_is_named(arguments):
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == 2
    assert result.output
