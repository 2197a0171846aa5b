"""`make bench-compare` builds two revisions and sees which one is slower."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]


def load_compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks/compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # it installs two trees
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_a_slower_tree_is_noticed(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(clone)], check=True)
    layer = clone / "focalnet_kernels/nn/focal_modulation.py"
    before = "        self.check_input("
    assert before in layer.read_text()
    layer.write_text(layer.read_text().replace(before, "        import time; time.sleep(0.2)\n" + before))
    compare = load_compare()
    monkeypatch.setattr(compare, "ROOT", clone)
    monkeypatch.setenv("FOCALNET_KERNELS_BUILD", "none")
    arguments = "--base HEAD --variant focalnet_tiny_iso --size 32 --batch 1 --dtype float32 --rounds 2 --restarts 1"
    result = CliRunner().invoke(compare.main, arguments.split())
    assert result.exit_code == 1, result.output
    assert "building tree" in result.output
    rows = [line.split() for line in result.output.splitlines() if line.startswith("1x2x2x192")]
    assert [row[2] for row in rows] == ["forward", "forward+backward"]
    assert all(float(row[4]) > 1.5 for row in rows), result.output
    assert "slower than 1.05 times" in result.output
