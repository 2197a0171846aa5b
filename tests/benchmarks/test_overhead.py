"""The micro-benchmark of calls walks its whole way."""

import importlib.util
from pathlib import Path

from click.testing import CliRunner

FILE = Path(__file__).parents[2] / "benchmarks/overhead.py"


def test_every_call_is_timed(cpu_kernels, monkeypatch):
    spec = importlib.util.spec_from_file_location("overhead", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CALLS", 1)
    monkeypatch.setattr(module, "ROUNDS", 2)
    result = CliRunner().invoke(module.main, ["--print"])
    assert result.exit_code == 0, result.output
    for call in ("timm", "timm accelerated", "ours", "focal_modulation", "raw op"):
        assert f"  {call} " in result.output
