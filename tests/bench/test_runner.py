"""Who is wrong or absent gets a reason and no figure; memory is what is kept and what is needed."""

from dataclasses import replace

import pytest
import torch

from focalnet_kernels import _libraries
from focalnet_kernels.bench import providers as module
from focalnet_kernels.bench.cases import Case, cases
from focalnet_kernels.bench.layers import PublishedLayer
from focalnet_kernels.bench.memory import HostMemory, saved_bytes
from focalnet_kernels.bench.providers import AUTHORS, Provider, providers
from focalnet_kernels.bench.roofline import Ceilings
from focalnet_kernels.bench.runner import run_case
from focalnet_kernels.bench.steps import MODES, calls

CASE = Case("layer", "layer", "small", 1, PublishedLayer(16, 9, 3, 2, width=7), (), 2, torch.float32, "cpu")
FIGURES = ("p20_ms", "p50_ms", "p80_ms", "images_per_s", "share_of_bound")


def eager_and(build, **options):
    eager = next(p for p in providers(CASE) if p.name == AUTHORS)
    return eager, replace(eager, name="other", build=build(eager.build), **options)


def rows_of(found, **options):
    return {(row["provider"], row["mode"]): row for row in run_case(CASE, found, rounds=3, **options)}


def test_inaccurate_providers_get_no_figure():
    def slightly_wrong(build):
        def built(case, exact):
            subject = build(case, exact)
            return replace(subject, call=lambda x, call=subject.call: call(x) * 1.001)

        return built

    rows = rows_of(eager_and(slightly_wrong), ceilings=Ceilings(1e9, {torch.float32: 1e9}))
    for mode in MODES:
        assert all(rows[AUTHORS, mode][key] > 0 for key in FIGURES)
        assert not any(key in rows["other", mode] for key in FIGURES)
        assert "output: error" in rows["other", mode]["skipped"]


def test_a_wrong_gradient_is_enough():
    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(fctx, y):
            return y.clone()

        @staticmethod
        def backward(fctx, grad):
            return grad * 1.001

    def wrong(build):
        def built(case, exact):
            subject = build(case, exact)
            return replace(subject, call=lambda x, call=subject.call: WrongBackward.apply(call(x)))

        return built

    rows = rows_of(eager_and(wrong))
    assert "grad x: error" in rows["other", "forward"]["skipped"]


@pytest.mark.parametrize("factor, right", [(1.0, True), (1.001, False)])
def test_one_alone_is_held_to_the_eager_form_all_the_same(factor, right):
    def scaled(case, exact):
        subject = eager.build(case, exact)
        return replace(subject, call=lambda x: subject.call(x) * factor)

    eager = providers(CASE)[0]
    row = next(run_case(CASE, [replace(eager, name="other", build=scaled)], modes=["forward"], rounds=3))
    assert ("p50_ms" in row) == right
    assert ("output: error" in row.get("skipped", "")) != right


def test_unavailable_providers_say_why(monkeypatch):
    def fails(build):
        def built(case, exact):
            raise RuntimeError("no such compiler")

        return built

    rows = rows_of(eager_and(fails))
    assert rows["other", "forward"]["skipped"] == "RuntimeError: no such compiler"
    found = [p for p in providers(CASE) if p.name in (AUTHORS, "timm", "ours cuda", "ours triton")]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    rows = rows_of(found)
    assert rows["timm", "forward"]["skipped"] == "timm is not installed"
    assert all(rows[AUTHORS, mode]["p50_ms"] > 0 for mode in MODES)


def test_backends_are_those_of_dispatch():
    names = {p.backend for p in providers(CASE)} - {None}
    assert names == set(module.dispatch.BACKENDS) - {"auto", "reference"}
    for provider in providers(CASE):
        if provider.backend == "cuda":
            assert provider.why_not(CASE)


@pytest.mark.parametrize("level", ["layer", "block"])
def test_all_forms_are_the_same_function(level):
    case = replace(CASE, level=level, what=level, target="focalnet_huge_fl3")
    case = replace(case, layer=replace(case.layer, use_postln_in_modulation=True))
    rows = list(run_case(case, providers(case), modes=["forward"], rounds=3))
    timed = {row["provider"] for row in rows if "skipped" not in row}
    assert timed >= {AUTHORS, "timm", "timm channels_last", "transformers"}, rows
    if not _libraries.cpu_missing:
        assert "ours cpu" in timed


def test_a_volume_has_no_foreign_form():
    case = replace(CASE, layer=PublishedLayer(8, 6, 3, 2, frames=3))
    rows = list(run_case(case, providers(case), modes=["forward"], rounds=3))
    reasons = {row["provider"]: row.get("skipped") for row in rows}
    assert "no layer of volumes" in reasons["timm"]
    assert reasons[AUTHORS] is None


@pytest.mark.skipif(bool(_libraries.cpu_missing), reason=str(_libraries.cpu_missing))
def test_bytes_kept_for_backward():
    case = replace(CASE, layer=PublishedLayer(64, 16, 3, 3))
    kept = {}
    for provider in providers(case):
        if provider.name in (AUTHORS, "ours cpu"):
            subject = provider.build(case, False)
            calls(subject, "backward")
            kept[provider.name] = saved_bytes(subject) / (subject.inputs["x"].numel() * 4)
    assert kept["ours cpu"] < 3.2
    assert kept[AUTHORS] > 8


def test_peak_memory_on_a_cpu():
    case = replace(CASE, batch=4, layer=PublishedLayer(64, 64, 3, 2))
    x = case.batch * 64 * 64 * 64 * 4
    eager = providers(case)[0]
    with HostMemory() as memory:
        peaks = memory.peak_bytes(case, eager, ("forward", "forward+backward"))
    if not peaks:
        pytest.skip("this system does not tell")
    assert 2 * x < peaks["forward"] < peaks["forward+backward"] < 60 * x


def test_compiled_providers_come_with_every_eager_one():
    names = [p.name for p in providers(CASE, ["default", "max-autotune"])]
    for name in (AUTHORS, "timm", "transformers"):
        assert f"{name} compiled" in names
        assert f"{name} compiled max-autotune" in names
    assert len(names) == len(set(names))
    assert isinstance(providers(CASE)[0], Provider)


def test_what_infers_alone_has_no_backward():
    def alone(build):
        return lambda case, exact: replace(build(case, exact), infers_alone=True)

    rows = rows_of(eager_and(alone))
    assert rows["other", "forward"]["p50_ms"] > 0
    assert rows["other", "backward"]["skipped"] == rows["other", "forward+backward"]["skipped"] == "it infers alone"


def test_engines_say_what_they_cannot(monkeypatch):
    model = replace(CASE, level="model", what="model", target="focalnet_tiny_srf", layer=None)
    found = {p.name: p for p in providers(model) if p.engine is not None}
    assert list(found) == ["timm frozen", "timm accelerated cpu frozen", "ONNX Runtime", "OpenVINO"]
    assert not [p for p in providers(CASE) if p.engine is not None], "of whole models alone"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    of_bfloat16, of_gpu = replace(model, dtype=torch.bfloat16), replace(model, device="cuda")
    assert found["ONNX Runtime"].why_not(of_bfloat16) == "onnxruntime has no bfloat16 on a CPU"
    assert found["OpenVINO"].why_not(of_bfloat16) is None
    assert found["OpenVINO"].why_not(of_gpu) == "openvino is compared on CPUs alone"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["timm frozen", "timm accelerated cpu frozen", "ONNX Runtime", "OpenVINO"])
def test_engines_compute_the_same(engine):
    (case,) = cases(["model"], ["focalnet_tiny_srf"], batch=1, size=(64, 64), dtypes=[torch.float32], device="cpu")
    chosen = [p for p in providers(case) if p.name in (AUTHORS, engine)]
    if reason := chosen[1].why_not(case):
        pytest.skip(reason)
    rows = {row["provider"]: row for row in run_case(case, chosen, modes=["forward"], rounds=3)}
    assert "skipped" not in rows[engine], rows[engine]["skipped"]
