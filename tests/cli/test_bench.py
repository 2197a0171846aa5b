"""`bench` runs, checks what it times, and writes every row."""

import csv

from click.testing import CliRunner

from focalnet_kernels.cli import main


def rows_of(tmp_path, *args):
    output = tmp_path / "bench.csv"
    command = ["bench", "--batch", "1", "--size", "32", "--rounds", "3", "--output", str(output), *args]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(output.open()))


def test_layers(tmp_path):
    rows = rows_of(tmp_path, "--dtype", "float32", "--variant", "focalnet_tiny_srf")
    providers = {"ours", "authors' form", "timm", "transformers", "products"}
    assert {row["provider"] for row in rows} == providers
    assert len(rows) == len(providers) * 4 * 2  # stages and modes
    assert all(0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in rows)


def test_model(tmp_path):
    rows = rows_of(tmp_path, "--dtype", "float32", "--what", "model", "--variant", "focalnet_tiny_srf")
    assert {row["provider"] for row in rows} == {"ours", "timm", "FocalNet"}
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}
