"""Frozen inputs cost nothing: their gradients are not computed, not allocated, and nothing is kept for them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import focalnet_kernels as fk
from focalnet_kernels.testing import make_context_inputs, make_layer_inputs, make_modulate_inputs, named_tensors


class Recorded(TorchDispatchMode):
    """Every operation with its result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function.overloadpacket.__name__, result))
        return result

    def results(self, *names):
        return [result for name, result in self.calls if name in names]


def backward_of(op, inputs, backend, wanted):
    for name, tensor in named_tensors(inputs).items():
        tensor.requires_grad_(name in wanted)
    with fk.use_backend(backend):
        y = op(**inputs)
        with Recorded() as recorded:
            y.sum().backward()
    return recorded


CASES = {
    "focal_context": (fk.focal_context, lambda seed: make_context_inputs((2, 6, 5, 4), [3, 5], seed=seed)),
    "focal_modulation": (fk.focal_modulation, lambda seed: make_layer_inputs((2, 5, 4, 6), [3, 5], seed=seed)),
}


@pytest.mark.parametrize("op, make_inputs", CASES.values(), ids=CASES)
def test_frozen_gradients_are_not_computed(kernels, op, make_inputs, seed):
    inputs = make_inputs(seed)
    names = list(named_tensors(inputs))
    raw_ops = [f"{op.__name__}_bwd{suffix}" for suffix in ("", "_triton", "_cuda")]
    for wanted in ([names[0]], names[1:], names[-1:], names):
        (gradients,) = backward_of(op, inputs, kernels, wanted).results(*raw_ops)
        assert sum(g.numel() > 0 for g in gradients) == len(wanted)


def test_modulate_multiplies_only_for_what_is_wanted(kernels, seed):
    """The modulator again for q, one product for ctx_all and one for the weight."""
    inputs = make_modulate_inputs((2, 6, 5, 4), seed=seed)
    for wanted, products in ((["q"], 1), (["ctx_all"], 1), (["weight"], 1), (["bias"], 0), (["q", "weight"], 2)):
        recorded = backward_of(fk.modulate, inputs, kernels, wanted)
        assert len(recorded.results("mm", "bmm", "addmm", "matmul", "linear")) == products, wanted


def test_frozen_layers_before_the_trained_ones(backend, seed):
    """Fine-tuning a head: no backward, and nothing kept, below it."""
    torch.manual_seed(seed)
    backbone, head = fk.FocalModulation(8, 3, 2).requires_grad_(False), torch.nn.Linear(8, 3)
    saved = []
    with fk.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = backbone(torch.randn(2, 5, 4, 8))
        assert not saved and not y.requires_grad
        loss = head(y).sum()
    assert saved
    with Recorded() as recorded:
        loss.backward()
    assert not any("focal" in name for name, _ in recorded.calls)


def test_a_frozen_layer_passes_gradients_on(backend, seed):
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(8, 3, 2), torch.randn(2, 5, 4, 8, requires_grad=True)
    with fk.use_backend(backend):
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        layer.requires_grad_(False)
        layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in layer.parameters())
