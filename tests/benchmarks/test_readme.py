"""README, the pages of docs/, the reports and the plots are those of the committed CSV files."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("report")
    for name in ("report", "plots"):
        sys.modules.pop(name)


def test_texts_come_from_the_files(report):
    for path, text in report.texts().items():
        assert path.read_text() == text, f"{path.name}: run benchmarks/report.py"


def typed_numbers(report, text):
    """Those that stand neither in a block that report.py makes, nor in code, in a link's address or in a name."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", report.BLOCK.sub("", text), flags=re.S)
    return re.findall(r"(?<![\w-])\d[\d.,]*(?!\w)", prose)


def test_speed_has_no_number_of_its_own(report):
    """Every figure of docs/benchmarks.md, and of README before it says what the layer is, comes from a file."""
    page, readme = (ROOT / "docs/benchmarks.md").read_text(), (ROOT / "README.md").read_text()
    assert len(report.BLOCK.findall(page)) >= 20
    assert typed_numbers(report, page) == []
    chart = readme[readme.index("<!-- ") : readme.index("## What it replaces")]
    assert [kind for kind, _ in report.BLOCK.findall(chart)] == ["chart", "machine", "behind"]
    assert typed_numbers(report, chart) == []


def test_another_number_is_noticed(report):
    text = (ROOT / "docs/benchmarks.md").read_text()
    table = next(m.group() for m in report.BLOCK.finditer(text) if "| " in m.group())
    changed = text.replace(table, re.sub(r"\d+(\.\d+)? \|\n", "0.1 |\n", table, count=1))
    assert changed != text
    assert report.rendered(changed, "../") == text


def test_the_images_that_texts_show_are_there(report):
    for path in report.texts():
        for name in re.findall(r'(?:!\[[^\]]*\]\(|<img src=")([^)"]+)', path.read_text()):
            assert (path.parent / name).is_file(), f"{path}: {name}"


COLUMNS = (
    "level,case,shape,dtype,mode,provider,p20_ms,p50_ms,p80_ms,flops,least_bytes,gbyte_per_s,gflop_per_s,skipped,"
    "device,threads,torch\n"
)
ROWS = """ceiling,copy,10,float32,,torch,1,1,1,,,20.0,,,a CPU,2,2.15
ceiling,product,8x8x8,float32,,torch,1,1,1,,,,100.0,,a CPU,2,2.15
layer,some stage 1,2x4x4x8,float32,forward,authors' form,1,2.04,3,100,50,1,2,,a CPU,2,2.15
layer,some stage 1,2x4x4x8,float32,forward,timm compiled,1,2.0,3,100,50,1,2,,a CPU,2,2.15
layer,some stage 1,2x4x4x8,float32,forward,ours cpu,2,3.0,4,100,50,1,2,,a CPU,2,2.15
layer,some stage 1,2x4x4x8,float32,forward,ours cuda,,,,,,,,there is no GPU,a CPU,2,2.15
layer,some stage 1,2x4x4x8,bfloat16,forward,authors' form,1,2.0,3,100,50,1,2,,a CPU,2,2.15
layer,some stage 1,2x4x4x8,bfloat16,forward,ours cpu,1,1.5,4,100,50,1,2,,a CPU,2,2.15
"""


def test_peers_stand_below_one_another(report):
    def row(provider, mode, images):
        return {"provider": provider, "mode": mode, "images_per_s": images, "dtype": "float32", "shape": "8x3x32x32"}

    rows = [
        row("some net", "forward", "30.06"),
        row("some net", "forward+backward", "7"),
        row("another compiled", "forward", "40"),
        row("some net compiled", "forward", "31"),
        row("some net compiled max-autotune", "forward", "32"),
        row("absent", "forward", ""),
    ]
    assert report.peers(rows).splitlines()[2:] == [
        "| some net | float32 8x3x32x32 | 30.1 | 31.0 | 7.0 |  |",
        "| another | float32 8x3x32x32 |  | 40.0 |  |  |",
        "| some net max-autotune | float32 8x3x32x32 |  | 32.0 |  |  |",
    ]


def test_losing_rows_are_shown_and_said(report, tmp_path):
    (tmp_path / "layers.csv").write_text(COLUMNS + ROWS)
    rows = report.read(tmp_path / "layers.csv")
    table = report.table(rows, "forward", "p50_ms", 1).splitlines()
    assert table[0] == "| forward | authors' form | timm compiled | ours cpu |"
    assert table[2:] == ["| float32 2x4x4x8 | 2.0 | 2.0 | 3.0 |", "| bfloat16 2x4x4x8 | 2.0 |  | 1.5 |"]
    line = "- forward, some stage 1 float32 2x4x4x8: ours cpu takes 1.50 times as long as timm compiled"
    assert report.slower(rows) == line
    whole = report.report(tmp_path)
    for part in (line, "- ours cuda: there is no GPU", "2 threads of a CPU", "product float32 by torch: 100.0 GFLOP/s"):
        assert part in whole


def test_files_are_compared_each_by_itself(report, tmp_path, monkeypatch):
    """What lost on one machine is not hidden by a faster one."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "slow.csv").write_text(COLUMNS + ROWS)
    (tmp_path / "fast.csv").write_text(COLUMNS + ROWS.replace("ours cpu,2,3.0", "ours cpu,1,1.0"))
    line = "- forward, some stage 1 float32 2x4x4x8: ours cpu takes 1.50 times as long as timm compiled"
    assert report._block("slower", ["fast.csv", "slow.csv"]) == f"In slow.csv:\n\n{line}"
    assert report._block("slower", ["fast.csv"]) == report.NOWHERE


def test_what_is_ahead_of_us_is_said(report):
    """Everybody who is, and in the chart's words."""
    row = {"mode": "forward", "shape": "1x3x224x224", "dtype": "float32", "threads": "1"}
    times = {"timm": 9, "timm frozen": 4, "OpenVINO": 2, "ONNX Runtime": "", "timm accelerated cpu": 5, "ours cpu": 1}
    rows = [row | {"provider": provider, "p50_ms": str(time)} for provider, time in times.items()]
    assert report.behind(rows) == (
        "- inference, 1 image, 1 thread, float32: the time of `accelerate` is 2.50 times that of OpenVINO, "
        "1.25 times that of compile + freezing"
    )
    assert report.behind(rows[:1] + rows[3:]).count("times") == 0


def test_plots_are_drawn_from_the_file(report, tmp_path):
    (tmp_path / "layers.csv").write_text(COLUMNS + ROWS)
    sys.modules["plots"].draw(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"layers.png", "roofline.png"}
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_the_chart_has_every_bar(report, tmp_path):
    """Ours and the others', faster ones too, and a word where there is no figure. Opaque, for pages may be dark."""
    plots = sys.modules["plots"]
    for file, mode, _ in plots.CHART_ROWS:
        rows = ROWS.replace(",forward,", f",{mode},").replace("timm compiled", "timm frozen")
        rows = rows.replace("authors' form", "timm").replace("ours cpu", "timm accelerated cpu")
        (tmp_path / file).write_text(COLUMNS + rows)
    figure = plots._chart(tmp_path)
    assert len(figure.axes) == 6
    for panel, shown in zip(figure.axes, [["2", "2", "3"], ["2", "no figure", "2"]] * 3, strict=True):
        assert [text.get_text() for text in panel.texts] == shown
        assert [bar.get_width() > 0 for bar in panel.patches] == [text != "no figure" for text in shown]
    assert figure.get_facecolor() == (1, 1, 1, 1)
    plots.draw(tmp_path)
    assert (tmp_path / plots.CHART).stat().st_size > 5000 and plots.CHART in plots.names(tmp_path)
