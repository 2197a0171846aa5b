"""focal_block: both branches in one call; on a GPU, in inference, with a launch less."""

import importlib
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import focalnet_kernels as fk
from focalnet_kernels.bench.layers import published_layers
from focalnet_kernels.functional import focal_block
from focalnet_kernels.models.variants import VARIANTS
from focalnet_kernels.ops.focal_block import around
from focalnet_kernels.ops.focal_modulation import native as layer
from focalnet_kernels.ops.token_rows import CUDA
from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import (
    LAYOUTS,
    assert_op_accurate,
    branch_tensors,
    make_focal_branch_inputs,
    make_mlp_branch_inputs,
    named_tensors,
)
from ops.strategies import DTYPES, dtype_name

ALL = {"norm": True, "gamma": True, "drop_path": True}


def block(x, **inputs):
    focal = {name: value for name, value in inputs.items() if not name.startswith("mlp_")}
    mlp = {name.removeprefix("mlp_"): value for name, value in inputs.items() if name.startswith("mlp_")}
    of_layer = ("f_weight", "f_bias", "focal_weights", "h_weight", "h_bias", "proj_weight", "proj_bias")
    of_mlp = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    arguments = [
        (tuple(named.pop(name) for name in names), named) for names, named in ((of_layer, focal), (of_mlp, mlp))
    ]
    return focal_block(x, *arguments)


def make_inputs(shape, hidden, kernels, seed, **options):
    mlp = make_mlp_branch_inputs(shape, hidden, seed=seed + 7, **options)
    del mlp["x"]
    return make_focal_branch_inputs(shape, kernels, seed=seed, **options) | {f"mlp_{n}": v for n, v in mlp.items()}


@pytest.fixture
def fused(monkeypatch):
    """The calls that go to a raw op of both branches."""
    module, called = importlib.import_module("focalnet_kernels.ops.focal_block.op"), []
    whole = module._chosen_by_both

    def chosen(*arguments):
        found = whole(*arguments)
        called.extend([found] if found else [])
        return found

    monkeypatch.setattr(module, "_chosen_by_both", chosen)
    return called


SHAPES = {
    "map": ((2, 7, 9, 24), 96, (3, 5)),
    "sequence": ((2, 17, 19), 40, (3,)),
    "volume": ((1, 3, 4, 5, 17), 68, (3, 3)),
    "wide": ((1, 3, 5, 200), 200, (3,)),
    "empty-batch": ((0, 5, 5, 16), 64, (3,)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, hidden, kernels_", SHAPES.values(), ids=SHAPES)
def test_inference(backend, fused, shape, hidden, kernels_, dtype, seed):
    inputs = make_inputs(shape, hidden, kernels_, seed, dtype=dtype, mean=0.5, **ALL)
    assert_op_accurate(block, inputs, backend)
    in_one_kernel = backend == "triton" and dtype != torch.float32 and shape[-1] <= 128
    assert set(fused) == ({backend} if backend in ("triton", "cuda") and not in_one_kernel else set())


@pytest.mark.parametrize("absent", [(), ("gamma",), ("drop_path",), ("gamma", "drop_path"), tuple(ALL)], ids=str)
@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_parts(backend, fused, post, absent, seed):
    parts = {name: name not in absent for name in ALL}
    assert_op_accurate(block, make_inputs((3, 5, 6, 24), 96, (3,), seed, post_norm=post, **parts), backend)
    assert bool(fused) == (backend in ("triton", "cuda") and not post and parts["norm"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, seed):
    assert_op_accurate(block, make_inputs((2, 6, 7, 24), 96, (3,), seed, layout=layout, **ALL), backend)


@pytest.mark.parametrize("mixed", [{"residual_dtype": torch.float32}, {"norm_dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_mixed_dtypes(backend, mixed, dtype, seed):
    assert_op_accurate(block, make_inputs((2, 6, 7, 136), 64, (3,), seed, dtype=dtype, **mixed, **ALL), backend)


def test_gradients(backend, fused, seed):
    inputs = make_inputs((2, 6, 7, 24), 96, (3,), seed, **ALL)
    wanted = [name for name in named_tensors(inputs) if not name.endswith("drop_path")]
    grad_output = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed))
    assert_op_accurate(block, inputs, backend, grad_output, wanted)
    assert not fused


class Called(TorchDispatchMode):
    """The operators that are called, but views and allocations."""

    FREE = frozenset("view as_strided t transpose permute detach empty new_empty empty_like _unsafe_view".split())

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.names += [name] if name not in self.FREE else []
        return function(*args, **(kwargs or {}))


def beyond_the_layer(kernels, layer_fwd, tensors):
    """The names of what a block's forward calls but its layer."""
    x, focal, mlp = tensors
    inside, outside = Called(), Called()

    def counted(*arguments):
        with inside:
            return layer_fwd(*arguments)

    with torch.no_grad(), outside:
        around.forward(kernels, counted, x, focal, mlp, False, 1e-5, 1e-5, 1e-5)
    for name in inside.names:
        outside.names.remove(name)
    return outside.names


def test_six_launches_beyond_the_layer_with_cuda(cuda_on_cpu, seed):
    inputs = make_inputs((2, 7, 7, 64), 256, (3, 5), seed, dtype=torch.bfloat16, norm=True)
    x, focal = branch_tensors({n: v for n, v in inputs.items() if not n.startswith("mlp_")})
    _, mlp = branch_tensors(
        {"x": x} | {n: v for n, v in inputs.items() if n.startswith("mlp_") and n != "mlp_post_norm"}
    )
    assert beyond_the_layer(CUDA, partial(layer.focal_modulation_fwd, "cuda"), (x, focal, mlp)) == [
        "norm_rows_fwd_cuda", "residual_norm_rows_fwd_cuda", "addmm", "gelu", "addmm", "residual_rows_fwd_cuda",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_six_launches_beyond_the_layer_with_triton(variant, interpreted):
    from focalnet_kernels.ops.focal_modulation.triton_launch import focal_modulation_fwd_impl
    from focalnet_kernels.ops.triton.launch import recorded_launches
    from focalnet_kernels.ops.triton.token_rows import TRITON

    assert INTERPRETED
    for of_stage in published_layers(variant):
        C, empty = of_stage.dim, partial(torch.empty, dtype=torch.bfloat16, device="meta")
        residual = (empty(C), empty(C), None, None)
        mlp = (empty(4 * C, C), empty(4 * C), empty(C, 4 * C), empty(C), *residual)
        x, of_layer = empty(2, *of_stage.spatial, C), Called()

        def counted(*arguments, of_layer=of_layer):
            with recorded_launches(), of_layer:  # whose launches the outer recorder does not see
                return focal_modulation_fwd_impl(*arguments)

        with torch.no_grad(), recorded_launches() as ours, Called() as by_torch:
            around.forward(TRITON, counted, x, [*of_stage.parameters(empty), *residual], mlp, False, 1e-5, 1e-5, 1e-5)
        for name in of_layer.names:
            by_torch.names.remove(name)
        assert [launch.kernel.__name__ for launch in ours] == ["residual_fwd_kernel"] * 2
        assert by_torch.names == ["native_layer_norm", "addmm", "gelu", "addmm"]


def test_the_op_is_the_two_in_turn(backend, seed):
    inputs = make_inputs((2, 6, 7, 24), 96, (3,), seed, **ALL)
    focal = {name: value for name, value in inputs.items() if not name.startswith("mlp_")}
    mlp = {name.removeprefix("mlp_"): value for name, value in inputs.items() if name.startswith("mlp_")}
    with fk.use_backend(backend):
        torch.testing.assert_close(block(**inputs), fk.mlp_branch(fk.focal_branch(**focal), **mlp))
