"""mlp_branch: every backend against float64, for any shape, dtype and memory layout."""

import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.testing import LAYOUTS, assert_op_accurate, draw, make_mlp_branch_inputs
from ops.strategies import DTYPES, SWEPT_DTYPES, dtype_name

ALL = {"norm": True, "gamma": True, "drop_path": True}


def check(backend, shape, hidden, seed, grad_layout="contiguous", mean=0.0, keep_hidden=False, **options):
    if shape[-1] == 1:  # of which a norm leaves nothing: all tokens are alike, and in gamma's one gradient they cancel
        options["gamma"] = False
    inputs = make_mlp_branch_inputs(shape, hidden, seed=seed, mean=mean, **options) | {"keep_hidden": keep_hidden}
    generator = torch.Generator().manual_seed(seed + 1)
    grad_output = draw(shape, grad_layout, generator, dtype=inputs["x"].dtype, mean=mean)
    wanted = [name for name, t in inputs.items() if isinstance(t, torch.Tensor) and name != "drop_path"]
    return assert_op_accurate(fk.mlp_branch, inputs, backend, grad_output, wanted)


SHAPES = {
    "map": ((2, 7, 9, 96), 384),
    "sequence": ((2, 17, 19), 40),
    "volume": ((1, 3, 4, 5, 17), 68),
    "odd": ((3, 5, 6, 33), 71),
    "one-channel": ((2, 3, 5, 1), 4),
    "one-pixel": ((5, 1, 1, 16), 64),
    "one-token": ((1, 1, 1, 40), 24),
    "empty-batch": ((0, 5, 5, 16), 64),
    "wide": ((1, 5, 7, 200), 800),
    "many": ((2, 15, 17, 24), 96),
    "long-sums": ((1, 4, 6, 64), 1200),
}


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, hidden", SHAPES.values(), ids=SHAPES)
def test_shapes(backend, shape, hidden, dtype, post, seed):
    check(backend, shape, hidden, seed, dtype=dtype, post_norm=post, **ALL)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, hidden", SHAPES.values(), ids=SHAPES)
def test_kept_hidden_values(backend, shape, hidden, dtype, post, seed):
    check(backend, shape, hidden, seed, dtype=dtype, post_norm=post, mean=0.5, keep_hidden=True, **ALL)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_keeps_what_was_asked_for(backend, post, seed):
    """And a second backward finds it as it was."""
    if backend == "reference":
        pytest.skip("the reference leaves this to PyTorch")
    inputs = make_mlp_branch_inputs((2, 6, 7, 24), 96, post_norm=post, seed=seed)
    x, kept = inputs["x"].requires_grad_(), {}
    for keep_hidden in (False, True):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: packed.append(t) or t, lambda t: t):
            y = fk.mlp_branch(**inputs, keep_hidden=keep_hidden, backend=backend)
        own = {id(t) for t in inputs.values()}
        kept[keep_hidden] = sorted(t.numel() // (2 * 6 * 7) for t in packed if id(t) not in own)
        first, second = (torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
    assert kept == {False: [24] * post, True: [24] * post + [96]}


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, hidden", [*SHAPES.values(), ((3, 16, 12, 33), 71)], ids=[*SHAPES, "more-than-few"])
def test_inference(backend, one_thread, shape, hidden, dtype, post, seed):
    inputs = make_mlp_branch_inputs(shape, hidden, seed=seed, dtype=dtype, post_norm=post, mean=0.5, **ALL)
    assert_op_accurate(fk.mlp_branch, inputs, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_in_any_layout(backend, layout, seed):
    inputs = make_mlp_branch_inputs((2, 6, 7, 34), 100, seed=seed, layout=layout, **ALL)
    assert_op_accurate(fk.mlp_branch, inputs, backend)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_instruction_sets(isa, dtype, post, seed):
    for shape, hidden in SHAPES.values():
        check("cpu", shape, hidden, seed, dtype=dtype, post_norm=post, **ALL)
        check("cpu", shape, hidden, seed, dtype=dtype, post_norm=post, keep_hidden=True, **ALL)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("absent", [(), ("norm",), ("gamma",), ("drop_path",), tuple(ALL)], ids=str)
def test_parts(backend, bias, post, absent, seed):
    parts = {name: name not in absent for name in ALL}
    check(backend, (3, 5, 6, 24), 96, seed, bias=bias, post_norm=post, mean=1.0, **parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layouts(backend, dtype, layout, seed):
    check(backend, (2, 6, 7, 34), 100, seed, dtype=dtype, layout=layout, grad_layout=layout, **ALL)


MIXED = {"float32-residual": {"residual_dtype": torch.float32}, "float32-norm": {"norm_dtype": torch.float32}}


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("parts", [ALL, {"norm": False}, {"norm": True}], ids=["all", "none", "norm"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_mixed_dtypes(backend, mixed, dtype, parts, post, seed):
    options = {"dtype": dtype, "post_norm": post, **mixed, **parts}
    check(backend, (2, 6, 7, 40), 160, seed, **options)
    for layout in ("contiguous", "channels_last", "slice"):
        # which 16 bits would round before the norm
        mean = 100 if "residual_dtype" in mixed and parts["norm"] and not post else 0
        inputs = make_mlp_branch_inputs((2, 6, 7, 40), 160, seed=seed, layout=layout, mean=mean, **options)
        assert_op_accurate(fk.mlp_branch, inputs, backend)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_instruction_sets_of_a_float32_residual(isa, dtype, post, seed):
    for shape, hidden in SHAPES.values():
        check("cpu", shape, hidden, seed, residual_dtype=torch.float32, dtype=dtype, post_norm=post, **ALL)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_second_order(backend, post, seed):
    inputs = make_mlp_branch_inputs((2, 3, 4, 6), 8, seed=seed, post_norm=post, **ALL)
    leaves = [t.requires_grad_() for name, t in inputs.items() if isinstance(t, torch.Tensor) and name != "drop_path"]

    def second():
        y = fk.mlp_branch(**inputs)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with fk.use_backend(backend):
        found = second()
    with fk.use_backend("reference"):
        expected = second()
    for ours, value in zip(found, expected, strict=True):
        # of norms over few channels: one of them may be all but constant, and what follows 1000 times the others
        assert (ours - value).norm() <= 2e-3 * value.norm()


def test_refuses_what_does_not_fit():
    inputs = make_mlp_branch_inputs((2, 3, 4, 6), 8, **ALL)

    def with_(**changed):
        return fk.mlp_branch(**(inputs | changed))

    with pytest.raises(ValueError, match=r"^fc2_weight: expected shape \(6, 8\) or a 1x1 convolution's, got \(8, 6\)"):
        with_(fc2_weight=torch.zeros(8, 6))
    with pytest.raises(ValueError, match="^norm_weight, norm_bias: give both or neither"):
        with_(norm_bias=None)
    with pytest.raises(ValueError, match=r"^drop_path: expected shape \(2,\) = \(B,\), got \(3,\)"):
        with_(drop_path=torch.ones(3))
    with pytest.raises(ValueError, match="^drop_path: expected factors that require no gradient"):
        with_(drop_path=torch.ones(2, requires_grad=True))
    with pytest.raises(TypeError, match="^gamma: expected x's dtype torch.float32, got torch.float64"):
        with_(gamma=torch.ones(6, dtype=torch.float64))
    with pytest.raises(
        TypeError, match="^fc1_weight: expected torch.float32 or 16 bits on cpu as x, got torch.float64"
    ):
        with_(fc1_weight=inputs["fc1_weight"].double())


def test_keeps_the_memory_order(backend, seed):
    inputs = make_mlp_branch_inputs((2, 6, 7, 24), 96, layout="channels_last", seed=seed)
    with fk.use_backend(backend):
        y = fk.mlp_branch(**inputs)
    if backend != "reference":
        assert y.stride() == inputs["x"].stride()


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_threads_change_no_bit(isa, dtype, post, seed):
    """Of few rows: with one thread products are cut by columns, with many by rows. x is float32 around any body, which
    shows what 16 bits would round away."""
    inputs = make_mlp_branch_inputs((2, 5, 7, 60), 200, dtype=dtype, post_norm=post, seed=seed, **ALL)
    inputs |= {name: inputs[name].float() for name in ("x", "norm_weight", "norm_bias", "gamma", "drop_path")}
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(fk.mlp_branch(**inputs, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
