"""What leaves the process runs without this package: torch.export, AOTInductor, ONNX, TorchScript."""

import subprocess
import sys

import pytest
import torch
from models.foreign import small_config, timm_model
from torch import nn

import focalnet_kernels as fk


def timm_layer() -> nn.Module:
    import timm.models.focalnet

    return timm.models.focalnet.FocalModulation(8, 3, 2, use_post_norm=True)


# models of ours and of other people's accelerated layers: (builder, input)
MODELS = {
    "ours": (lambda: fk.FocalModulation(8, 3, 2, use_postln_in_modulation=True), (2, 6, 5, 8)),
    "sequence": (lambda: fk.FocalModulation1d(8, 3, 2, normalize_modulator=True), (2, 9, 8)),
    "volume": (lambda: fk.FocalModulation3d(8, 3, 1), (2, 4, 6, 5, 8)),
    "timm layer": (timm_layer, (2, 8, 6, 5)),
    "timm model": (lambda: timm_model(small_config(img_size=32)).float(), (2, 3, 32, 32)),
}
for_every_model = pytest.mark.parametrize("build, shape", MODELS.values(), ids=MODELS)
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


def accelerated(build):
    model = build().eval()
    if not type(model).__module__.startswith("focalnet_kernels"):
        assert fk.accelerate(model).replaced
    return model


def batches(shape):
    return [torch.randn(B, *shape[1:]) for B in (2, 1, 5)]


def assert_same(function, model, shape, **tolerances):
    for x in batches(shape):
        with torch.no_grad():
            torch.testing.assert_close(function(x), model(x), **({"rtol": 1e-4, "atol": 1e-5} | tolerances))


@for_every_model
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(build, shape, strict, seed, tmp_path):
    torch.manual_seed(seed)
    model = accelerated(build)
    program = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=BATCH, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    assert "focalnet_kernels" not in str(program.graph)
    assert_same(torch.export.load(tmp_path / "program.pt2").module(), model, shape)


def test_a_named_backend_is_exported(cpu_kernels, seed):
    """The user's own choice: such a program runs where this package is imported."""
    torch.manual_seed(seed)
    layer, shape = fk.FocalModulation(8, 3, 2), (2, 6, 5, 8)
    with fk.use_backend("cpu"):
        program = torch.export.export(layer, (torch.randn(shape),), dynamic_shapes=BATCH)
    assert "focalnet_kernels.focal_modulation_fwd" in str(program.graph)
    assert_same(program.module(), layer, shape)


RUN_ALONE = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, y in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
assert "focalnet_kernels" not in sys.modules
"""


def packaged(model, shape, path):
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=BATCH)
        return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def test_aot_inductor(seed, tmp_path):
    """A compiled model in a process that has never heard of this package."""
    torch.manual_seed(seed)
    build, shape = MODELS["timm layer"]
    model = nn.Sequential(accelerated(build))
    package = packaged(model, shape, tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save([(x, model(x)) for x in batches(shape)], tmp_path / "expected.pt")
    arguments = [sys.executable, "-c", RUN_ALONE, package, str(tmp_path / "expected.pt")]
    ran = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_aot_inductor_with_kernels(cpu_kernels, seed, tmp_path):
    torch.manual_seed(seed)
    layer, shape = fk.FocalModulation(8, 3, 2).eval(), (2, 6, 5, 8)
    with fk.use_backend("cpu"):
        package = packaged(layer, shape, tmp_path / "model.pt2")
    assert_same(torch._inductor.aoti_load_package(package), layer, shape)


@for_every_model
def test_onnx(build, shape, seed, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `test` brings it")
    torch.manual_seed(seed)
    model, path = accelerated(build), tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(shape),), path, dynamo=True, dynamic_shapes=BATCH, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    assert_same(lambda x: torch.from_numpy(session.run(None, {argument.name: x.numpy()})[0]), model, shape)


@for_every_model
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_traces(build, shape, seed, tmp_path):
    torch.manual_seed(seed)
    model = accelerated(build)
    traced = torch.jit.trace(model, torch.randn(shape))
    assert "focalnet_kernels::" not in str(traced.inlined_graph)
    traced.save(tmp_path / "traced.pt")
    assert_same(torch.jit.load(tmp_path / "traced.pt"), model, shape)


@pytest.mark.parametrize("build", [fk.FocalModulation, fk.FocalModulation1d, fk.CrossFocalModulation])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_does_not_compile_ours(build):
    """And says what does, wherever in a model the layer stands."""
    for model in (build(8, 3, 2), nn.Sequential(nn.Linear(8, 8), build(8, 3, 2))):
        with pytest.raises(TypeError, match=f"found a {build.__name__}; torch.jit.trace, torch.export and torch.comp"):
            torch.jit.script(model)


FIRST_CALL = """
import io, sys, torch, focalnet_kernels as fk
layer, x = fk.FocalModulation(8, 3, 2).eval(), torch.randn(1, 6, 5, 8)
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    "call",
    [
        "torch.jit.trace(layer, x)",
        "torch.onnx.export(layer, (x,), io.BytesIO(), dynamo=False)",
        "torch.export.export(layer, (x,))",
        "torch.vmap(layer)(x[None])",
        "torch.compile(layer, backend='aot_eager', fullgraph=True)(x)",
    ],
)
def test_a_process_begins_with_it(call):
    """What is looked up in a first call must not become part of what is traced."""
    ran = subprocess.run([sys.executable, "-c", FIRST_CALL, call], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
