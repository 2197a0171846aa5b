"""From results to the table to the backend that runs."""

import csv
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import focalnet_kernels as fk
from focalnet_kernels import dispatch, measured
from focalnet_kernels._calls import forget
from focalnet_kernels._prepare import prepare_focal_context, prepare_focal_modulation, prepare_modulate
from focalnet_kernels.bench.records import read
from focalnet_kernels.dispatch import Implementation, explain_call, select
from focalnet_kernels.ops._autograd import needs_grad
from focalnet_kernels.testing import make_context_inputs, make_layer_inputs, make_modulate_inputs

ROOT = Path(__file__).parents[1]
GPU = "nvidia-h200"
OURS = {"triton": "ours triton", "cuda": "ours cuda", "reference": "authors' form", "cpu": "ours cpu"}


def load_generator():
    spec = importlib.util.spec_from_file_location("dispatch_table", ROOT / "benchmarks/dispatch_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.fixture(autouse=True)
def forgotten():
    """No test sees another's table."""

    measured._rows.cache_clear()
    forget()
    yield
    measured._rows.cache_clear()
    forget()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Takes rows of results, makes the table of them, puts it into force. Returns its rows."""

    def install(*rows, device=GPU):
        folder = tmp_path / "results" / device
        folder.mkdir(parents=True)
        with (folder / "layers.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        monkeypatch.setattr(measured, "FILE", tmp_path / "measured.csv")
        generator.main(["--results", str(folder.parent), "--output", str(measured.FILE)], standalone_mode=False)
        return read(measured.FILE)

    return install


@pytest.fixture
def gpu(monkeypatch):
    """Every backend can run, and every device is this GPU."""
    everybody = [Implementation(b, lambda *args: None, len) for b in ("triton", "cpu", "cuda", "reference")]
    for op in dispatch._implementations:
        monkeypatch.setitem(dispatch._implementations, op, tuple(everybody))
    monkeypatch.setattr(measured, "device_class", lambda device: GPU)
    return everybody


def results(level="layer", case="focalnet_tiny_lrf stage 1 k=3,5", shape="128x8x8x16", mode="forward",
            dtype="float32", machine=GPU, spread=0.01, **times):  # fmt: skip
    """Rows of benchmarks/results/ for milliseconds by backend."""
    common = {"machine": machine, "level": level, "case": case, "shape": shape, "dtype": dtype, "mode": mode}
    return [
        common | {"provider": OURS[b], "p20_ms": t * (1 - spread), "p50_ms": t, "p80_ms": t * (1 + spread)}
        for b, t in times.items()
    ]


def layer_call(shape=(128, 8, 8, 16), kernels=(3, 5), training=False, **options):
    """A call, and whether it trains."""
    inputs = make_layer_inputs(shape, kernels, **options)
    inputs["x"].requires_grad_(training)
    call, tensors = prepare_focal_modulation(**inputs)
    return call, needs_grad(tensors)


@pytest.mark.parametrize(
    "times, expected",
    [
        ({"triton": 1.0, "cuda": 2.0, "reference": 5.0}, "triton cuda reference"),
        ({"triton": 2.0, "cuda": 1.0, "reference": 5.0}, "cuda triton reference"),
        ({"triton": 2.0, "cuda": 1.0, "reference": 1.5}, "cuda reference"),
        ({"triton": 2.0, "cuda": 2.5, "reference": 1.5}, "reference"),
        ({"triton": 1.009, "cuda": 1.0, "reference": 5.0}, "triton cuda reference"),  # noise
        ({"triton": 1.02, "reference": 1.0}, "triton reference"),
        ({"triton": 1.04, "reference": 1.0}, "reference"),
        ({"triton": 1.04, "cuda": 1.03, "reference": 1.0}, "cuda reference"),
        ({"reference": 1.0}, "reference"),
    ],
)
def test_ranked(times, expected):
    figures = {b: {"p20_ms": t * 0.99, "p50_ms": t, "p80_ms": t * 1.01} for b, t in times.items()}
    assert " ".join(generator.ranked(figures)) == expected


def test_the_fastest_backend_runs(table, gpu):
    rows = table(
        *results(triton=2.0, cuda=1.0, reference=5.0),
        *results(triton=2.0, cuda=3.0, reference=1.0, mode="forward+backward"),
    )
    assert [(r["mode"], r["backends"]) for r in rows] == [
        ("forward", "cuda triton reference"), ("forward+backward", "reference"),
    ]  # fmt: skip
    assert select(*layer_call()).backend == "cuda"
    assert select(*layer_call(training=True)).backend == "reference"
    with torch.no_grad():
        assert select(*layer_call(training=True)).backend == "cuda"


def test_explanations(table, gpu):
    table(
        *results(triton=2.0, cuda=1.0, reference=5.0), *results(triton=3.0, cuda=1.0, reference=2.0, shape="8x8x8x16")
    )
    found = explain_call(*layer_call())
    assert found.backend == "cuda"
    said = "'cuda' was measured faster on this device"
    assert found.reasons == {"triton": said, "reference": said, "cpu": said}
    found = explain_call(*layer_call((1, 1, 1, 16)))
    assert found.backend == "triton"
    assert set(found.reasons.values()) == {"'triton' is preferred"}


def test_eager_where_it_is_faster(table, gpu):
    table(*results(triton=3.0, cuda=2.5, reference=2.0))
    found = explain_call(*layer_call())
    assert found.backend == "reference"
    assert found.reasons["triton"] == found.reasons["cuda"] == "eager was measured faster on this device"


def test_the_next_where_the_fastest_cannot_run(table, gpu, monkeypatch):
    table(
        *results(triton=3.0, cuda=1.0, reference=2.0), *results(triton=1.5, cuda=1.0, reference=2.0, shape="1x8x8x16")
    )
    cannot = [Implementation(i.backend, lambda *a: "not built", len) if i.backend == "cuda" else i for i in gpu]
    monkeypatch.setitem(dispatch._implementations, "focal_modulation", tuple(cannot))
    assert select(*layer_call()).backend == "reference", "triton is slower than eager"
    assert select(*layer_call((1, 8, 8, 16))).backend == "triton"
    assert explain_call(*layer_call()).reasons["cuda"] == "not built"


@pytest.mark.parametrize("name", ["reference", "triton", "cuda"])
def test_a_named_backend_wins(table, gpu, name):
    table(*results(triton=2.0, cuda=1.0, reference=1.5))
    with fk.use_backend(name):
        assert select(*layer_call()).backend == explain_call(*layer_call()).backend == name


@pytest.mark.parametrize(
    "call, backend",
    [
        (layer_call((64, 8, 8, 16)), "cuda"),  # a factor of 2 away
        (layer_call((128, 8, 16, 16)), "cuda"),
        (layer_call((256, 8, 4, 16)), "triton"),  # twice a factor of 2
        (layer_call((16, 8, 8, 16)), "reference"),  # the other row
        (layer_call((1, 8, 8, 16)), "triton"),
        (layer_call((128, 8, 8, 24)), "triton"),
        (layer_call(kernels=(3,)), "triton"),
        (layer_call((128, 64, 16)), "triton"),  # kernels of one axis
        (layer_call(dtype=torch.bfloat16), "triton"),
        (layer_call((0, 8, 8, 16)), "triton"),
    ],
    ids=lambda value: None if isinstance(value, str) else "x".join(map(str, (*value[0].shape, value[0].channels))),
)
def test_the_nearest_shape_counts(table, gpu, call, backend):
    table(
        *results(triton=2.0, cuda=1.0, reference=5.0), *results(triton=2.0, cuda=3.0, reference=1.0, shape="16x8x8x16")
    )
    assert select(*call).backend == backend


def test_ops_have_rows_of_their_own(table, gpu):
    op = {"level": "op", "shape": "4x16x8x8"}
    table(
        *results(triton=2.0, cuda=1.0, reference=5.0, case="focal_context focalnet_tiny_lrf stage 1 k=3,5", **op),
        *results(triton=2.0, cuda=3.0, reference=1.0, case="modulate focalnet_tiny_lrf stage 1", **op),
        *results(level="block", triton=2.0, reference=1.0), *results(level="model", triton=2.0, reference=1.0),
    )  # fmt: skip
    context, _ = prepare_focal_context(*make_context_inputs((4, 16, 8, 8), (3, 5)).values())
    modulate, _ = prepare_modulate(*make_modulate_inputs((4, 16, 8, 8)).values())
    assert select(context, False).backend == "cuda"
    assert select(modulate, False).backend == "reference"
    assert select(*layer_call()).backend == "triton"


def test_what_keeps_the_order_has_no_rows(table):
    assert (
        table(
            *results(triton=1.0, cuda=1.1, reference=2.0), *results("layer", mode="backward", triton=2.0, reference=1.0)
        )
        == []
    )


def test_a_shape_that_keeps_the_order_stands_beside_one_that_does_not(table):
    rows = table(*results(triton=1.0, reference=2.0), *results(triton=2.0, reference=1.0, shape="32x8x8x16"))
    assert [(r["batch"], r["backends"]) for r in rows] == [("32", "reference"), ("128", "triton reference")]


def test_an_unknown_device_keeps_the_order(table, gpu, monkeypatch):
    table(*results(triton=2.0, cuda=1.0, reference=5.0))
    monkeypatch.setattr(measured, "device_class", lambda device: "nvidia-tomorrow")
    assert select(*layer_call()).backend == "triton"


HEADER = ",".join(measured.COLUMNS)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "device,op\nnvidia-h200,focal_modulation\n",
        f"{HEADER}\nnvidia-h200,focal_modulation,float32,forward,16,3x3 5x5,128,8x8,cuda\n",
        f"{HEADER}\nnvidia-h200,focal_modulation,float32,forward,many,3x3 5x5,128,8x8,reference\n",
        f"{HEADER}\nnvidia-h200,focal_modulation\n",
        b"\xff\xfe\x00",
    ],
    ids=["missing", "columns", "without reference", "number", "truncated", "binary"],
)
def test_a_broken_table_is_said_once_and_left(tmp_path, monkeypatch, gpu, text):
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.csv")
    if text is not None:
        measured.FILE.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(RuntimeWarning, match=r"chooses backends without measured\.csv") as said:
        for _ in range(2):
            assert select(*layer_call()).backend == "triton"
    assert len(said) == 1


def test_the_committed_table_is_what_the_results_say():
    assert read(measured.FILE) == generator.table(generator.RESULTS), "run benchmarks/dispatch_table.py"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured._rows()


@pytest.fixture
def eager_on_this_cpu(table):
    """Eager was faster here: layers of 8 channels, 2 x 6 x 5 tokens and near that."""
    cpu = measured.device_class(torch.device("cpu"))
    row = {"machine": cpu, "shape": "2x6x5x8"}
    table(*results(**row, cpu=2.0, reference=1.0), *results(**row, cpu=2.0, reference=1.0, mode="forward+backward"))


def test_the_real_layer(eager_on_this_cpu, cpu_kernels, seed):
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(8, 3, 2), torch.randn(2, 6, 5, 8)
    assert fk.explain(layer, x).backend == "reference"
    assert fk.explain(layer, x).reasons["cpu"] == "eager was measured faster on this device"
    y = layer(x)
    with fk.use_backend("reference"):
        assert torch.equal(y, layer(x))
    assert fk.explain(layer, torch.randn(2, 20, 20, 8)).backend == "cpu"


def convolutions(counter):
    """Of PyTorch's own, in every graph: the eager form's."""
    return [sum(node.target is torch.conv2d for node in graph.graph.nodes) for graph in counter.graphs]


@pytest.mark.parametrize("mark", [False, True], ids=["automatic", "marked"])
def test_compiled(eager_on_this_cpu, cpu_kernels, mark, seed):
    """In one graph, which asks for a size that it knows only: a graph for every batch keeps dispatch's own order."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    layer, counter = fk.FocalModulation(8, 3, 2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for B in (2, 3, 5, 7):
        x = torch.randn(B, 6, 5, 8)
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, layer(x))
    assert convolutions(counter) == ([0] if mark else [2, 0])
