"""The modules: the authors' numbers, keys and random initialisation; timm's and transformers' layers as witnesses."""

import copy
import pickle

import pytest
import torch
from ops import golden
from ops.golden import relative_error

import focalnet_kernels as fk

MODULES = {1: fk.FocalModulation1d, 2: fk.FocalModulation, 3: fk.FocalModulation3d}

# dim, focal_window, focal_level and the flags that all implementations share
LAYERS = {
    "tiny": (24, 3, 2, {}),
    "normalized": (17, 3, 4, {"normalize_modulator": True}),
    "postln": (16, 5, 3, {"use_postln_in_modulation": True}),
    "no-bias": (10, 3, 2, {"bias": False}),
    "all-flags": (18, 3, 2, {"bias": False, "use_postln_in_modulation": True, "normalize_modulator": True}),
    "factor-4": (8, 3, 3, {"focal_factor": 4}),
    "no-level": (12, 3, 0, {}),
    "window-1": (12, 1, 3, {}),
}
for_every_layer = pytest.mark.parametrize("dim, window, level, flags", LAYERS.values(), ids=LAYERS)


def assert_same_gradients(ours, theirs, key_of):
    """After both backwards: every parameter's gradient, matched by `key_of`."""
    expected = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert {key_of(key) for key in found} == set(expected)
    for key, parameter in found.items():
        gradient = expected[key_of(key)].grad
        assert relative_error(parameter.grad, gradient.view_as(parameter)) <= 1e-12, key


@pytest.mark.parametrize("path", golden.FILES, ids=golden.NAMES)
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_authors_numbers(backend, path, dtype, limit):
    if backend != "reference" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    config, tensors = golden.load(path)
    layer = fk.FocalModulation(**config).to(dtype)
    layer.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("param.")})
    x = tensors["input"].to(dtype).requires_grad_()
    with fk.use_backend(backend):
        y = layer(x)
        y.backward(tensors["grad_output"].to(dtype))
        with_gates = layer(x, return_gates=True) if backend == "reference" else ()
    assert relative_error(y, tensors["output"]) <= limit
    assert relative_error(x.grad, tensors["grad_input"]) <= limit
    for key, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, tensors[f"grad.{key}"]) <= limit, key
    for result, name in zip(with_gates, ("output", "gates", "modulator"), strict=False):
        assert relative_error(result, tensors[name]) <= limit, name


@for_every_layer
def test_timm_layer(dim, window, level, flags, seed):
    timm_focalnet = pytest.importorskip("timm.models.focalnet")
    torch.manual_seed(seed)
    options = {("use_post_norm" if k == "use_postln_in_modulation" else k): v for k, v in flags.items()}
    theirs = timm_focalnet.FocalModulation(dim, window, level, **options).double()
    ours = fk.FocalModulation(dim, window, level, **flags).double()
    timm_key = {"ln.weight": "norm.weight", "ln.bias": "norm.bias"}
    state = {k: theirs.state_dict()[timm_key.get(k, k)].view_as(v) for k, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    # LayerNorm2d of timm has another epsilon
    if hasattr(ours, "ln"):
        ours.ln.eps = theirs.norm.eps
    x = torch.randn(2, 7, 6, dim, dtype=torch.float64, requires_grad=True)
    their_x = x.detach().movedim(-1, 1).requires_grad_()
    grad_output = torch.randn_like(x)
    y, their_y = ours(x), theirs(their_x).movedim(1, -1)
    assert relative_error(y, their_y) <= 1e-12
    y.backward(grad_output)
    their_y.backward(grad_output)
    assert relative_error(x.grad, their_x.grad.movedim(1, -1)) <= 1e-12
    assert_same_gradients(ours, theirs, lambda key: timm_key.get(key, key))


@for_every_layer
def test_transformers_layer(dim, window, level, flags, seed):
    transformers = pytest.importorskip("transformers")
    from transformers.models.focalnet.modeling_focalnet import FocalNetModulation

    config = transformers.FocalNetConfig(
        focal_windows=[window],
        focal_levels=[level],
        normalize_modulator=flags.get("normalize_modulator", False),
        use_post_layernorm_in_modulation=flags.get("use_postln_in_modulation", False),
        layer_norm_eps=1e-5,
    )
    options = {k: v for k, v in flags.items() if k in ("bias", "focal_factor")}
    torch.manual_seed(seed)
    theirs = FocalNetModulation(config, 0, dim, **options).double()
    torch.manual_seed(seed)
    ours = fk.FocalModulation(dim, window, level, **flags).double()
    names = {"f": "projection_in", "h": "projection_context", "proj": "projection_out", "ln": "layernorm"}

    def key_of(key):
        module, rest = key.split(".", 1)
        return f"{names.get(module, module)}.{rest}"

    # they create their parameters in the authors' order as well, so a seed gives the same ones
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key_of(key)]), key
    x = torch.randn(2, 7, 6, dim, dtype=torch.float64, requires_grad=True)
    their_x = x.detach().requires_grad_()
    grad_output = torch.randn_like(x)
    y, their_y = ours(x), theirs(their_x)
    assert relative_error(y, their_y) <= 1e-12
    y.backward(grad_output)
    their_y.backward(grad_output)
    assert relative_error(x.grad, their_x.grad) <= 1e-12
    assert_same_gradients(ours, theirs, key_of)


@pytest.mark.parametrize("ndim", [1, 3])
def test_other_dimensions_agree_with_a_flat_map(backend, ndim, seed):
    """A sequence is a map of one row; a volume of one slice is a map."""
    torch.manual_seed(seed)
    layer = MODULES[ndim](16, 3, 3)
    flat = fk.FocalModulation(16, 3, 3)
    state = layer.state_dict()
    for key in state:
        if key.startswith("focal_layers"):
            state[key] = state[key][:, :, None] if ndim == 1 else state[key][:, :, state[key].shape[2] // 2]
            if ndim == 1:  # the other rows of the kernel only ever see padding
                k = state[key].shape[-1]
                state[key] = torch.nn.functional.pad(state[key], (0, 0, k // 2, k // 2), value=7.0)
        elif key == "h.weight":
            state[key] = state[key].view(16, 16, 1, 1)
    flat.load_state_dict(state)
    x = torch.randn(2, *(5,) * (ndim == 3), 9, 16)
    x = x if ndim == 1 else x[:, None]
    as_map = x[:, None] if ndim == 1 else x[:, 0]
    with fk.use_backend(backend):
        y, expected = layer(x), flat(as_map)
    torch.testing.assert_close(y.view_as(expected), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", MODULES.values())
def test_copies_and_pickles_after_training(backend, module, seed):
    """Nothing is left on the module: the authors' own layer keeps a part of the graph and cannot be copied."""
    torch.manual_seed(seed)
    layer = module(8, 3, 2)
    before = set(vars(layer))
    x = torch.randn(2, *(4,) * layer.ndim, 8)
    with fk.use_backend(backend):
        y = layer(x)
        y.sum().backward()
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), y)
    assert set(vars(layer)) == before


def test_state_dict_is_the_authors():
    layer = fk.FocalModulation(8, 3, 2, use_postln_in_modulation=True)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "f.weight": (19, 8),
        "f.bias": (19,),
        "h.weight": (8, 8, 1, 1),
        "h.bias": (8,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
        "focal_layers.0.0.weight": (8, 1, 3, 3),
        "focal_layers.1.0.weight": (8, 1, 5, 5),
        "ln.weight": (8,),
        "ln.bias": (8,),
    }


def test_gates_come_only_when_asked_for(seed):
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(8, 3, 2), torch.randn(2, 4, 5, 8)
    y, gates, modulator = layer(x, return_gates=True)
    assert gates.shape == (2, 3, 4, 5) and modulator.shape == (2, 8, 4, 5)
    torch.testing.assert_close(layer(x), y)


def test_dropout_only_in_training(backend, seed):
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(16, 3, 2, proj_drop=0.5), torch.randn(2, 8, 8, 16)
    with fk.use_backend(backend):
        assert 0.3 < (layer(x) == 0).float().mean() < 0.7
        layer.eval()
        assert (layer(x) != 0).all()


@pytest.mark.parametrize("window, factor, size", [(2, 2, 2), (3, 1, 4), (0, 2, 0), (-1, 2, -1)])
def test_even_kernels_are_refused(window, factor, size):
    with pytest.raises(ValueError, match=f"focal_window, focal_factor: expected odd kernel sizes, got {size} "):
        fk.FocalModulation(8, window, 3, focal_factor=factor)


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 4, 8), (2, 4, 4, 4, 8), (4, 4, 9), (8,)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, H, W, C=8\), got "):
        fk.FocalModulation(8, 3, 2)(torch.zeros(shape))


def test_says_what_it_is():
    assert "dim=8, kernel_sizes=[3, 5]" in repr(fk.FocalModulation(8, 3, 2))
