"""The Triton kernels beside what every backend is tested for: launches, plans, machine code, GELU."""

import contextlib
import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import focalnet_kernels as fk
from focalnet_kernels.bench.layers import DETECTION, PublishedLayer, published_layers
from focalnet_kernels.cli.check import layer_launches
from focalnet_kernels.models.variants import VARIANTS
from focalnet_kernels.ops.triton.launch import INTERPRETED, recorded_launches
from focalnet_kernels.testing import assert_op_accurate, make_context_inputs, make_layer_inputs, map_tensors

LAYERS = list(dict.fromkeys(layer for name in VARIANTS for layer in published_layers(name))) + list(DETECTION)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402

from focalnet_kernels.ops.triton.functions import gelu, gelu_slope  # noqa: E402

# aten's views and allocations, which launch nothing
FREE = {
    "as_strided", "t", "view", "_unsafe_view", "empty", "new_empty", "empty_like", "split_with_sizes", "select",
    "permute", "transpose", "empty_strided", "unbind", "detach", "slice", "alias", "_reshape_alias", "unsqueeze",
}  # fmt: skip


class CountLaunches(TorchDispatchMode):
    """What torch would launch beside our own kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("channels_first, forward, backward", [(False, 5, 12), (True, 7, 15)], ids=["last", "first"])
def test_launches_per_layer(channels_first, forward, backward, batch, dtype):
    from focalnet_kernels.ops.focal_modulation.triton_launch import (
        focal_modulation_bwd_impl,
        focal_modulation_fwd_impl,
    )

    for layer in LAYERS:
        empty = partial(torch.empty, dtype=dtype, device="meta")
        parameters = layer.parameters(empty)
        x = empty(batch, layer.size, layer.size, layer.dim)
        if channels_first:
            x = empty(batch, layer.dim, layer.size, layer.size).permute(0, 2, 3, 1)
        with recorded_launches() as ours, CountLaunches() as torch_ops:
            y, saved = focal_modulation_fwd_impl(x, parameters, False, 1e-5, True)
        assert len(ours) + len(torch_ops.names) <= forward, (layer, [k.kernel.__name__ for k in ours], torch_ops.names)
        with recorded_launches() as ours, CountLaunches() as torch_ops:
            focal_modulation_bwd_impl(y, x, parameters, *saved, False, 1e-5, -1)
        count = len(ours) + len(torch_ops.names)
        assert count <= backward, (layer, [k.kernel.__name__ for k in ours], torch_ops.names)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_default_tiles_spill_nothing(backward):
    from focalnet_kernels.ops.triton.resources import compile_launch

    name = "context_bwd_kernel" if backward else "context_fwd_kernel"
    (launch,) = [
        launch
        for launch in layer_launches(PublishedLayer(96, 14, 3, 2), 128, torch.bfloat16)
        if launch.kernel.__name__ == name
    ]
    found = compile_launch(launch, "sm_90")
    assert found.stack == 0
    assert found.tensor_core > 0
    assert found.shared <= 48 * 1024


def test_shapes_share_machine_code():
    from focalnet_kernels.ops.triton.resources import specialization

    layers = PublishedLayer(96, 56, 3, 2), PublishedLayer(192, 28, 3, 2)
    chain = [
        (launch.kernel.__name__, repr(specialization(launch)))
        for layer, batch in itertools.product(layers, (1, 8, 128))
        for launch in layer_launches(layer, batch, torch.bfloat16)
        if launch.kernel.__name__ in ("context_fwd_kernel", "context_bwd_kernel")
    ]
    assert len(chain) == 12
    assert len(set(chain)) == 2


@given(
    shape=st.tuples(*[st.sampled_from((1, 2, 3, 4))] * 4),
    layouts=st.lists(st.tuples(st.permutations(range(4)), st.sampled_from((0, 1))), min_size=1, max_size=3),
)
def test_token_axes_reach_every_token(shape, layouts):
    """However maps of (B, T, M, W) lie in memory: their axes in any order, with gaps or without."""
    from focalnet_kernels.ops.triton.geometry import token_axes

    maps = []
    for order, gap in layouts:
        step, strides = 1, [0] * 4
        for dim in order:
            strides[dim], step = step, step * (shape[dim] + gap)
        maps.append(torch.arange(step).as_strided(shape, strides))  # of every token its own offset
    (T, M, W), all_strides = token_axes(*(m.unsqueeze(1) for m in maps))
    i = torch.arange(maps[0].numel())
    for offsets, (b, _, t, m, w) in zip(maps, all_strides, strict=True):
        found = i // (T * M * W) * b + i % (T * M * W) // (W * M) * t + i // W % M * m + i % W * w
        assert torch.equal(found, offsets.flatten())


@pytest.mark.parametrize(
    "layer", [PublishedLayer(96, 56, 2, 1), PublishedLayer(384, 14, 3, 2)], ids=["planes", "tokens"]
)
def test_a_layer_s_tokens_are_one_axis(layer):
    """Where the kernels' index arithmetic and narrow loads would otherwise cost more than the work."""
    found = {launch.kernel.__name__: launch for launch in layer_launches(layer, 128, torch.bfloat16)}
    for name in ("modulate_fwd_kernel", "linear_planes_kernel")[: 2 if layer.dim < 256 else 1]:
        assert (1, 1, 1) in found[name].args


class AbsentGpu(DriverBase):
    """As much of a driver as Triton needs to bind arguments and compile."""

    def __init__(self):
        pass

    is_active = classmethod(lambda cls: True)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return None

    def map_python_to_cpp_type(self, name):
        return name


def test_launches_bind_their_arguments():
    """Through Triton's own launcher, which knows the tuples, options and constants that kernels are called with."""
    triton.runtime.driver.set_active(AbsentGpu())
    try:
        for launch in layer_launches(PublishedLayer(32, 14, 3, 1, use_postln_in_modulation=True), 1, torch.bfloat16):
            arguments = map_tensors(lambda t: torch.empty(16, dtype=t.dtype), launch.args)
            options = launch.constants | {"enable_fp_fusion": True}
            assert launch.kernel.warmup(*arguments, **options, grid=(1,)).metadata.num_warps in (4, 8)
    finally:
        with contextlib.suppress(RuntimeError):  # there is none to go back to
            triton.runtime.driver.reset_active()


def test_every_grid_fits():
    for layer, dtype in itertools.product(LAYERS, (torch.bfloat16, torch.float32)):
        for launch in layer_launches(layer, 65_537, dtype):
            assert 0 < launch.programs < 2**31, launch.kernel.__name__


def test_an_interpreter_that_numpy_outran(monkeypatch):
    from focalnet_kernels.ops.triton import launch

    versions = {"triton": (3, 6), "numpy": (2, 4)}
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "_version", versions.get)
    assert "needs numpy before 2.4" in launch._missing()
    for right in ({"triton": (3, 7)}, {"numpy": (2, 3)}):
        monkeypatch.setattr(launch, "_version", (versions | right).get)
        assert launch._missing() is None


def test_what_it_leaves_to_others():
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    reasons = fk.explain(fk.FocalModulation(8, 3, 1).double(), x).reasons
    assert "float64 is left to the reference" in reasons["triton"]
    if not INTERPRETED:
        assert "not on a GPU" in fk.explain(fk.FocalModulation(8, 3, 1), x.float()).reasons["triton"]
    huge = torch.empty(1, 1, 2**28).expand(4, 8, -1) if INTERPRETED else None
    if huge is not None:
        weights = [torch.empty(8, 1, 3)]
        gates = torch.empty(1).expand(4, 2, 2**28)
        assert "too large" in fk.explain(fk.focal_context, huge, gates, weights).reasons["triton"]


# what the plans treat in their own ways: strips of one image, groups of small images, more tasks than slots
PLANS = {
    "strips": ((1, 3, 60, 9), [3, 5]),
    "strips-of-volume": ((1, 2, 24, 3, 4), [3]),
    "groups": ((19, 4, 5, 6), [3, 5]),
    "half-a-group": ((5, 4, 3, 3), [3]),
    "tasks-in-turn": ((7, 33, 9, 9), [3]),
    "window-of-32": ((2, 3, 9, 17), [(3, 13), (1, 11)]),
    "beyond-windows": ((2, 3, 5, 30), [(3, 15)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape, kernels", PLANS.values(), ids=PLANS)
def test_plans(interpreted, shape, kernels, dtype, seed):
    inputs = make_context_inputs(shape, kernels, dtype=dtype, seed=seed)
    assert_op_accurate(fk.focal_context, inputs, "triton", torch.randn(shape).to(dtype))


@pytest.mark.parametrize("shape, kernels", [((2, 5, 9, 37), [3, 5]), ((1, 6, 3, 4, 5), [3])], ids=["map", "volume"])
def test_tap_by_tap(tiles_of_a_gpu, shape, kernels, seed):
    inputs = make_context_inputs(shape, kernels, seed=seed)
    assert_op_accurate(fk.focal_context, inputs, "triton", torch.randn(shape))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_what_lies_below_a_strip_stays_there(interpreted, k, seed):
    """The last strip's last tile has rows beyond the map, which belong to another strip's turn."""
    inputs = make_context_inputs((1, 12, 14, 8), [k], dtype=torch.float16, seed=seed)
    inputs["ctx"][0, 0, 8, 3] = torch.inf
    inputs["weights"][0].requires_grad_()
    with fk.use_backend("triton"):
        fk.focal_context(**inputs)[:, 1:].sum().backward()
    assert inputs["weights"][0].grad[1:].isfinite().all()


def test_plans_differ():
    from focalnet_kernels.ops.focal_context.triton_plan import make_plan
    from focalnet_kernels.ops.triton.geometry import padded_size

    def plan(shape, kernels):
        kernels = tuple(padded_size((k, k) if isinstance(k, int) else k) for k in kernels)
        size = (shape[2], 1, shape[3])
        return make_plan(shape[0], shape[1], size, kernels, torch.float16, torch.device("meta"))

    assert plan((1, 3, 60, 9), [3, 5]).strips > 1
    assert plan((19, 4, 5, 6), [3, 5]).images > 1
    assert plan((2, 3, 9, 17), [(3, 13)]).window == 32
    assert plan((2, 3, 5, 30), [(3, 15)]).window == 0
    assert plan((2, 3, 5, 30), [9]).window == 16


# products and LayerNorm in one tile, in two, and row by row
@pytest.mark.parametrize("postln", [False, True], ids=["plain", "postln"])
@pytest.mark.parametrize("C", [40, 130, 270])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_around_the_chain(interpreted, C, postln, dtype, seed):
    inputs = make_layer_inputs((1, 3, 4, C), [3] if C < 100 else [], postln=postln, dtype=dtype, seed=seed)
    assert_op_accurate(fk.focal_modulation, inputs, "triton", torch.randn(1, 3, 4, C).to(dtype))


@triton.jit
def both(x, y, slope, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    tl.store(y + i, gelu(value, False), mask=i < n)
    tl.store(slope + i, gelu_slope(value, False), mask=i < n)


def test_logistic_gelu(interpreted):
    """bfloat16's GELU and its derivative, which the interpreter can only run in float32."""
    x = torch.linspace(-30, 30, 4096)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    both[(1,)](x, y, slope, 4096, BLOCK=4096)
    exact = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    (derivative,) = torch.autograd.grad(expected.sum(), exact)
    assert (y - expected).abs().max() < 3e-5
    assert (slope - derivative).abs().max() < 1.5e-4
