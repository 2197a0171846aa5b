"""The CUDA kernels on a CPU: the shim that runs them, and what every backend's tests do not ask of them."""

import itertools
import math

import cuda_shim
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves, tree_map_only

import focalnet_kernels as fk
from focalnet_kernels.ops import token_rows
from focalnet_kernels.ops.focal_modulation.native import by_tokens as by_tokens_of_layer
from focalnet_kernels.testing import (
    assert_op_accurate,
    layer_tensors,
    make_context_inputs,
    make_layer_inputs,
    make_mlp_branch_inputs,
    named_tensors,
    run,
)
from ops.strategies import DTYPES, dtype_name


@pytest.fixture
def checks(cuda_on_cpu):
    return cuda_shim.load_checks()


# ------------------------------------------------------------------------------------- the shim, by itself

LANES = np.arange(32)


def pairs(matrices):
    """Per lane and matrix, the two elements (lane / 4, 2 * (lane % 4)) and next: PTX's fragment of 8 x 8."""
    rows, columns = LANES // 4, LANES % 4 * 2
    return np.stack([np.stack([m[rows, columns], m[rows, columns + 1]], -1) for m in matrices], 1)


def packed(bits):
    """Registers of two 16-bit elements each, the first in the lower half."""
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0]


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
def test_ldmatrix(checks, transposed, seed):
    matrices = np.random.default_rng(seed).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    expected = pairs(matrices.transpose(0, 2, 1) if transposed else matrices)
    np.testing.assert_array_equal(checks.load(matrices.reshape(32, 8), transposed, 0), packed(expected))


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
def test_ldmatrix_wants_aligned_rows(checks, transposed):
    with pytest.raises(RuntimeError, match="16-byte aligned"):
        checks.load(np.zeros((32, 8), np.uint16), transposed, 8)


def test_movmatrix(checks, seed):
    matrix = np.random.default_rng(seed).integers(0, 2**16, (8, 8), dtype=np.uint16)
    registers = [np.ascontiguousarray(packed(pairs([m]))[:, 0]) for m in (matrix, matrix.T)]
    np.testing.assert_array_equal(checks.transpose(registers[0]), registers[1])


def sixteen_bits(values, bfloat16):
    """(bits, what they stand for)."""
    if bfloat16:
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(float)
    return values.astype(np.float16).view(np.uint16), values.astype(np.float16).astype(float)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_mma(checks, bfloat16, seed):
    """d + a b, with a and b in registers as ldmatrix leaves them, which is as PTX has them."""
    generator = np.random.default_rng(seed)
    a_bits, a = sixteen_bits(generator.normal(size=(16, 16)), bfloat16)
    b_bits, b = sixteen_bits(generator.normal(size=(16, 8)), bfloat16)
    d = generator.normal(size=(16, 8)).astype(np.float32)
    quarters = [a_bits[:8, :8], a_bits[8:, :8], a_bits[:8, 8:], a_bits[8:, 8:]]
    a_registers = checks.load(np.concatenate(quarters), False, 0)
    np.testing.assert_array_equal(a_registers, packed(pairs(quarters)))
    b_registers = checks.load(np.concatenate([b_bits, b_bits]), True, 0)[:, :2]
    np.testing.assert_array_equal(b_registers, packed(pairs([b_bits[:8].T, b_bits[8:].T])))
    d_registers = pairs([d[:8], d[8:]]).reshape(32, 4)
    result = checks.multiply(a_registers, np.ascontiguousarray(b_registers), d_registers, bfloat16)
    exact = d + a @ b
    np.testing.assert_allclose(result, pairs([exact[:8], exact[8:]]).reshape(32, 4), atol=1e-5)


def test_shuffles(checks, seed):
    values = np.random.default_rng(seed).normal(size=96).astype(np.float32)
    for mask, source in ((1, 0), (2, 7), (16, 31), (31, 12)):
        crossed, sent = checks.shuffle(values, mask, source)
        warps = values.reshape(3, 32)
        np.testing.assert_array_equal(crossed, warps[:, LANES ^ mask].ravel())
        np.testing.assert_array_equal(sent, np.repeat(warps[:, source], 32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_shared_memory_is_poisoned(checks, dtype):
    """In every block anew, whatever the one before left there."""
    assert np.isnan(checks.poison(3, 4096).view(dtype)).all()


def test_limits_of_a_block(checks, monkeypatch):
    monkeypatch.setenv("FOCALNET_SHIM_SHARED", "4096")
    checks.ask_for_shared_memory(4096)
    with pytest.raises(RuntimeError, match="shared memory"):
        checks.ask_for_shared_memory(4097)


@pytest.mark.parametrize(
    "fault, message",
    list(enumerate(["that others never reach", "that others never reach", "at different barriers"])),
    ids=["warp-in-block", "half-a-shuffle", "two-places"],
)
def test_lost_barriers(checks, fault, message):
    with pytest.raises(RuntimeError, match=message):
        checks.lose_barrier(fault)


@pytest.mark.parametrize("before, after", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("by_warp", [False, True], ids=["block", "warp"])
def test_planted_races(checks, by_warp, before, after, seed):
    """Values handed to a neighbour, over and over: wrong as soon as either barrier is missing, in any order but one."""
    values = np.random.default_rng(seed).normal(size=96).astype(np.float32)
    rounds, ring, right = 3, 32 if by_warp else 96, 0
    expected = np.roll(values.reshape(-1, ring), -rounds, axis=1).ravel()
    for order in range(seed, seed + 100):
        checks.seed(order)
        right += np.array_equal(checks.pass_on(values, rounds, ring, by_warp, before, after), expected)
    assert right == (100 if before and after else 0)


def test_planted_races_between_warps(checks, seed):
    """A warp's barriers where the block's are needed: some warp gets ahead of its neighbour."""
    values = np.random.default_rng(seed).normal(size=96).astype(np.float32)
    rounds, right = 8, 0
    for order in range(seed, seed + 100):
        checks.seed(order)
        right += np.array_equal(checks.pass_on(values, rounds, 96, True, True, True), np.roll(values, -rounds))
    assert right < 10


# -------------------------------------------------------------------------------------------- the kernels


def depthwise(ctx, weights):
    """Zero-padded depthwise correlation of (B, C, H, W) with (C, 1, k, k)."""
    k, (H, W) = weights.shape[-1], ctx.shape[2:]
    padded = np.pad(ctx, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    return sum(weights[:, 0, i, j, None, None] * padded[:, :, i : i + H, j : j + W] for i in range(k) for j in range(k))


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float16, 5e-3)], ids=["float32", "float16"])
def test_against_numpy(cuda_on_cpu, dtype, limit, seed):
    """The formula once more, without PyTorch: what other tests compare with cannot share its faults."""
    generator = np.random.default_rng(seed)
    ctx, gates = generator.normal(size=(2, 3, 6, 11)).astype(dtype), generator.normal(size=(2, 3, 6, 11)).astype(dtype)
    weights = [generator.normal(size=(3, 1, k, k)).astype(dtype) / dtype(k) for k in (3, 5)]
    level, expected = ctx.astype(float), 0
    for i, w in enumerate(weights):
        level = gelu(depthwise(level, w.astype(float)))
        expected = expected + gates[:, i : i + 1] * level
    expected = expected + gates[:, 2:] * gelu(level.mean((2, 3), keepdims=True))
    with fk.use_backend("cuda"):
        result = fk.focal_context(torch.tensor(ctx), torch.tensor(gates), [torch.tensor(w) for w in weights])
    assert np.abs(result.numpy() - expected).max() <= limit * np.abs(expected).max()


# (shape, kernels, bytes of shared memory, of scratch): what plans treat in their own ways. Several images in a warp, a
# block for a row, strips of rows, windows of 32 columns, tasks one after the other; passes of the backward over a few
# images at a time; planes of floats (float32, volumes, tall kernels), in global memory where the shared one is small
PLANS = {
    "groups": ((5, 3, 7, 6), [3, 5]),
    "three-levels": ((2, 3, 9, 13), [3, 5, 7]),
    "window-of-32": ((2, 2, 9, 17), [3, 11]),
    "wide": ((1, 2, 5, 140), [3, 5]),
    "strips": ((1, 2, 90, 56), [3, 5]),
    "wide-strips": ((1, 1, 40, 140), [3]),
    "four-levels": ((2, 3, 12, 12), [3, 5, 7, 9]),
    "eight-levels": ((3, 2, 5, 7), [3, 3, 5, 3, 7, 9, 1, 3]),
    "detection": ((1, 2, 23, 151), [9, 11, 13]),
    "images-in-turn": ((13, 20, 4, 100), [3]),
    "channels-in-turn": ((1, 97, 5, 6), [3, 5]),
    "passes-in-strips": ((1, 1, 90, 56), [3, 9]),
    "wide-passes-in-strips": ((1, 1, 90, 140), [3, 9]),
    "chunks": ((9, 3, 9, 30), [3, 11], None, 45000),
    "chunks-of-runs": ((17, 40, 5, 60), [3], None, 300000),
    "one-warp-to-a-block": ((2, 5, 20, 60), [9, 13], 40000),
    "volume": ((1, 3, 4, 5, 6), [3, 5]),
    "tall-kernel": ((2, 3, 17, 5), [3, (15, 3)]),
    "scratch": ((2, 3, 21, 19), [3, 5], 4096),
    "scratch-volume": ((2, 2, 7, 6, 9), [3], 4096),
    "little-scratch": ((5, 7, 21, 19), [3, 5], 4096, 30000),
}


@pytest.fixture(params=PLANS.values(), ids=list(PLANS))
def plan(request, monkeypatch):
    """A shape and kernels, on a device that has them cut as the plan's name says."""
    shape, kernels, *limits = request.param
    for name, limit in zip(("SHARED", "SCRATCH"), limits, strict=False):
        if limit:
            monkeypatch.setenv(f"FOCALNET_SHIM_{name}", str(limit))
    return shape, kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_plans(cuda_on_cpu, plan, dtype, seed):
    shape, kernels = plan
    inputs = make_context_inputs(shape, kernels, dtype=dtype, seed=seed)
    assert_op_accurate(fk.focal_context, inputs, "cuda", torch.randn(shape).to(dtype))


# (shape, kernels, bytes of scratch), with channels adjacent: one tile of channels and a part of one, few lanes on small
# maps, several blocks to an image, chunks of images and a rest, several parts of the weights' gradients
TOKENS = {
    "small-maps": ((5, 36, 7, 7), [3, 5, 7]),
    "blocks-of-an-image": ((2, 8, 20, 37), [3, 5]),
    "wide-kernels": ((1, 4, 9, 30), [9, 11, 13]),
    "chunks": ((7, 12, 6, 9), [3, 5], 60_000),
    "eight-levels": ((1, 4, 5, 8), [3, 3, 5, 3, 7, 9, 3, 3]),
    "sequence": ((2, 8, 70), [3, 5]),
    "volume": ((1, 8, 4, 5, 6), [3, (1, 3, 5)]),
    "uneven-kernels": ((2, 8, 12, 7), [(3, 5), (15, 3)]),
}


@pytest.fixture(params=TOKENS.values(), ids=list(TOKENS))
def by_tokens(request, monkeypatch):
    """(shape, kernels) of maps over tokens."""
    shape, kernels, *scratch = request.param
    if scratch:
        monkeypatch.setenv("FOCALNET_SHIM_SCRATCH", str(*scratch))
    return shape, kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_tokens(cuda_on_cpu, by_tokens, dtype, seed):
    shape, kernels = by_tokens
    inputs = make_context_inputs(shape, kernels, dtype=dtype, layout="channels_last", seed=seed, mean=0.5)
    grad_output = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1).to(dtype)
    assert_op_accurate(fk.focal_context, inputs, "cuda", grad_output)
    for wanted in (["ctx"], ["gates"], ["weights[0]"]):
        assert_op_accurate(fk.focal_context, inputs, "cuda", grad_output, wanted=wanted)


# (shape, kernels, bytes of shared memory), with pixels adjacent: whole units and others, an odd number of them, one to
# four levels, pixels read one and four at a time, several images at a time and one after the other with a rest, blocks
# that do not share a multiprocessor, few channels at a time, rows as long as may be, those of one unit
IMAGES = {
    "whole-units": ((2, 8, 16, 8), [3, 5, 7]),
    "odd-units": ((1, 8, 24, 8), [3, 5]),
    "small-maps": ((9, 16, 7, 7), [3, 5, 7]),
    "pairs": ((5, 8, 6, 14), [3, 5]),
    "one-level": ((3, 8, 9, 12), [9]),
    "four-levels": ((2, 8, 12, 12), [3, 5, 7, 9]),
    "one-after-the-other": ((5, 16, 9, 11), [3, 5], 56_000),
    "a-rest": ((70, 8, 3, 4), [3]),
    "two-channels-at-a-time": ((3, 16, 9, 40), [3, 5, 7], 90_000),
    "column": ((2, 8, 9, 1), [3, 5]),
    "row": ((2, 8, 1, 20), [3]),
    "wide": ((1, 8, 3, 56), [3, 7]),
    "odd-rows": ((20, 8, 7, 7), [3, 5, 7]),  # read by fours where images follow one another, as a layer has them
    "twos": ((3, 8, 3, 6), [3, 5]),
    "narrow": ((3, 8, 10, 5), [3, 5, 7, 9]),
    "units": ((3, 8, 5, 8), [9]),
    "any-order": ((2, 8, 9, 12), [7, 9, 3]),
    "most-images": ((40, 8, 2, 3), [3]),
    # too many to list all of their places
    "periods-of-four": ((36, 8, 7, 7), [3, 5, 7], 150_000),
    "periods-of-one": ((9, 8, 14, 14), [3, 5, 7], 150_000),
}


@pytest.fixture(params=IMAGES.values(), ids=list(IMAGES))
def by_images(request, monkeypatch):
    """(shape, kernels) of whole images."""
    shape, kernels, *shared = request.param
    if shared:
        monkeypatch.setenv("FOCALNET_SHIM_SHARED", str(*shared))
    return shape, kernels


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_images(cuda_on_cpu, by_images, dtype, seed):
    shape, kernels = by_images
    inputs = make_context_inputs(shape, kernels, dtype=dtype, seed=seed, mean=0.5)
    inputs["normalize"] = dtype == torch.float16
    grad_output = torch.randn(shape).to(dtype)
    assert_op_accurate(fk.focal_context, inputs, "cuda", grad_output)
    for wanted in (["ctx"], ["gates"], ["weights[0]"]):
        assert_op_accurate(fk.focal_context, inputs, "cuda", grad_output, wanted=wanted)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 8, 6, 12), (3, 8, 5, 6)], ids=str)
def test_images_anywhere_in_memory(cuda_on_cpu, shape, offset, seed):
    """So many elements behind where accesses of 8 bytes may begin."""
    inputs = make_context_inputs(shape, [3, 5], dtype=torch.bfloat16, seed=seed, mean=0.5)
    grad_output = torch.randn(shape).bfloat16()
    for name in ("ctx", "gates"):
        inputs[name] = moved(inputs[name], offset)
    assert_op_accurate(fk.focal_context, inputs, "cuda", moved(grad_output, offset))


def moved(tensor, offset):
    behind = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view_as(tensor)
    return behind.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_layers_of_images(cuda_on_cpu, by_images, dtype, seed):
    """There biases are the kernels' to add."""
    (B, C, *spatial), kernels = by_images
    options = {"dtype": dtype, "postln": dtype == torch.float16, "seed": seed, "mean": 0.5}
    inputs = make_layer_inputs((B, *spatial, C), kernels, **options)
    grad_output = torch.randn(B, *spatial, C).to(dtype)
    assert_op_accurate(fk.focal_modulation, inputs, "cuda", grad_output)


# too wide, of too large kernels or of too few channels to be taken as whole images; strips
ROWS = {
    "wide": ((2, 5, 60, 8), [3, 5]),
    "large-kernels": ((1, 9, 20, 12), [9, 11, 13]),
    "few-channels": ((2, 6, 7, 5), [3, 5]),
    "strips": ((1, 60, 58, 4), [3, 5, 7]),
    "as-wide-as-may-be": ((1, 4, 384, 4), [3, 5, 7, 9]),
}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("shape, kernels", ROWS.values(), ids=list(ROWS))
def test_layers_of_rows(cuda_on_cpu, shape, kernels, dtype, seed):
    inputs = make_layer_inputs(shape, kernels, dtype=dtype, seed=seed, mean=0.5)
    assert_op_accurate(fk.focal_modulation, inputs, "cuda", torch.randn(shape).to(dtype))


@pytest.mark.parametrize("channels", [8, 80], ids=["one-lane", "lanes"])
def test_sums_of_many_gates(cuda_on_cpu, channels, seed):
    """Added up four at a time, of two images where one has 49; by several lanes where channels leave many parts."""
    inputs = make_context_inputs((168, channels, 7, 7), [3], dtype=torch.bfloat16, seed=seed, mean=0.5)
    grad_output = torch.randn(inputs["ctx"].shape).bfloat16()
    assert_op_accurate(fk.focal_context, inputs, "cuda", grad_output, wanted=["gates"])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_order_of_threads_over_images(cuda_on_cpu, by_images, dtype, seed):
    shape, kernels = by_images
    inputs = make_context_inputs(shape, kernels, dtype=dtype, seed=seed)
    assert_order_does_not_matter(cuda_on_cpu, fk.focal_context, inputs, torch.randn(shape).to(dtype), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=["same", "around"])
def test_norm_of_rows(cuda_on_cpu, dtype, residual_dtype, seed):
    """Rows of few and many lanes, of a part of their accesses, and those left to PyTorch."""
    generator = torch.Generator().manual_seed(seed)
    for tokens, C in ((370, 8), (75, 96), (33, 192), (49, 136), (13, 1024), (90, 20), (12, 1536)):
        x = (torch.randn(tokens, C, generator=generator) + 3).to(residual_dtype or dtype)
        weight, bias = (torch.randn(C, generator=generator).to(residual_dtype or dtype) for _ in range(2))
        found = token_rows.CUDA.norm_fwd(x, weight, bias, 1e-5, dtype)
        exact = F.layer_norm(x.double(), (C,), weight.double(), bias.double(), 1e-5)
        eager = F.layer_norm(x, (C,), weight, bias, 1e-5).to(dtype)
        assert found.dtype == dtype
        assert (found - exact).norm() <= 2 * (eager - exact).norm() + 1e-7 * exact.norm()  # a float's rounding


@pytest.mark.parametrize("channels", [7, 250, 384, 700, 1030, 4100])  # lanes, each with three to six fours
@pytest.mark.parametrize("post_norm", [False, True], ids=["pre", "post"])
def test_backward_of_rows_of_any_length(cuda_on_cpu, channels, post_norm, seed):
    options = {"dtype": torch.bfloat16, "gamma": True, "drop_path": True, "post_norm": post_norm, "mean": 0.5}
    inputs = make_mlp_branch_inputs((3, 11, channels), 8, seed=seed, **options)
    grad = torch.randn(3, 11, channels, generator=torch.Generator().manual_seed(seed)).bfloat16()
    wanted = [name for name in named_tensors(inputs) if name != "drop_path"]
    assert_op_accurate(fk.mlp_branch, inputs, "cuda", grad, wanted)


def test_rows_that_are_too_long():
    x, weight = torch.empty(1, 1).expand(1, 6145), torch.empty(1).expand(6145, 6145)
    found = fk.explain(fk.mlp_branch, x.expand(2, 3, 6145), weight, None, weight, None, backend="cuda")
    assert "on cpu" in found.reasons["cuda"]
    with cuda_shim.emulated_ops():
        found = fk.explain(fk.mlp_branch, x.expand(2, 3, 6145), weight, None, weight, None, backend="cuda")
    assert "rows of 6145 channels are longer than its 6144" in found.reasons["cuda"]


def test_matrices_lie_as_dispatch_is_told(cuda_on_cpu):
    """What torch.compile is told of the layer's kept matrices, by tokens or by planes, is how they lie."""
    fwd = torch.ops.focalnet_kernels.focal_modulation_fwd_cuda
    few = (5, 4, 8)
    calls = [(few, [3], True), *((few, kernels, False) for kernels in ([3], [3, 5], [15], [(3, 5)], [3] * 5))]
    shapes = ((5, 4, 6), (5, 4, 12), (5, 48, 8), (5, 52, 8), (5, 56, 8), (5, 57, 8), (64, 52, 8), (9, 8), (3, 4, 5, 8))
    calls += [*((shape, [3], False) for shape in shapes), ((3, 1, 5, 8), [(3, 1, 3)], False)]
    calls += [((rows, columns, 8), [3], False) for rows, columns in ((4, 384), (4, 385), (3, 60), (4, 60))]
    calls += [(few, [11, 13], False), ((5, 60, 8), [3] * 5, False)]
    for (shape, kernels, postln), dtype in itertools.product(calls, DTYPES):
        inputs = make_layer_inputs((2, *shape), kernels, postln=postln, dtype=dtype)
        arguments = [*layer_tensors(inputs), False, 1e-5, True]
        real = fwd(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = fwd(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        assert [(t.shape, t.stride()) for t in tree_leaves(fake)] == [(t.shape, t.stride()) for t in tree_leaves(real)]


def test_a_dynamic_width_stays_so():
    """Whether a map is 56 columns wide decides nothing where rows are taken too: one compiled graph for many widths."""
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3 + [DimDynamic.STATIC])
    real = torch.empty(2, 20, 56, 8, dtype=torch.bfloat16)
    x = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(real, symbolic_context=dynamic)
    assert not by_tokens_of_layer(x, [torch.empty(8, 1, 3, 3)], None)
    assert all(size.node.maybe_as_int() is None for size in x.shape[:3])


def assert_order_does_not_matter(seed_threads, op, inputs, grad_output, seed):
    """A missing barrier makes results depend on the order in which threads run."""
    results = []
    for order in range(seed, seed + 3):
        seed_threads(order)
        with fk.use_backend("cuda"):
            results.append(run(op, inputs, grad_output))
    for other in results[1:]:
        for name, value in results[0].items():
            assert value.isfinite().all(), name
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_order_of_threads_in_focal_context(cuda_on_cpu, plan, dtype, seed):
    shape, kernels = plan
    inputs = make_context_inputs(shape, kernels, dtype=dtype, seed=seed)
    assert_order_does_not_matter(cuda_on_cpu, fk.focal_context, inputs, torch.randn(shape).to(dtype), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_order_of_threads_over_tokens(cuda_on_cpu, by_tokens, dtype, seed):
    shape, kernels = by_tokens
    inputs = make_context_inputs(shape, kernels, dtype=dtype, layout="channels_last", seed=seed)
    grad_output = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1).to(dtype)
    assert_order_does_not_matter(cuda_on_cpu, fk.focal_context, inputs, grad_output, seed)


@pytest.mark.parametrize("postln", [False, True], ids=["plain", "postln"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_order_of_threads_in_focal_modulation(cuda_on_cpu, postln, dtype, seed):
    for shape in ((2, 7, 6, 40), (3, 5, 9, 10)):
        inputs = make_layer_inputs(shape, [3, 5], postln=postln, dtype=dtype, seed=seed)
        assert_order_does_not_matter(cuda_on_cpu, fk.focal_modulation, inputs, torch.randn(shape).to(dtype), seed)
