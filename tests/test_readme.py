"""README's tables are those of the committed CSV files."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load_report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_come_from_the_files():
    report = load_report()
    text = (ROOT / "README.md").read_text()
    assert len(report.TABLE.findall(text)) >= 4
    assert report.rendered(text) == text, "run benchmarks/report.py"


def test_another_number_is_noticed():
    report = load_report()
    text = (ROOT / "README.md").read_text()
    table = report.TABLE.search(text).group()
    changed = text.replace(table, re.sub(r"\d+\.\d+ \|", "0.1 |", table, count=1))
    assert changed != text
    assert report.rendered(changed) == text
