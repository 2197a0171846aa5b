"""Activation checkpointing: what is recomputed is what was computed, down to the saved tensors."""

import copy

import pytest
import torch
from models.foreign import huggingface_model, small_config, timm_model
from torch.utils.checkpoint import checkpoint

import focalnet_kernels as fk


def signature(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_recomputation_saves_the_same_tensors(backend, autocast, seed):
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(16, 3, 2), torch.randn(2, 6, 7, 16, requires_grad=True)
    runs = []

    def observed(x):
        runs.append([])
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: runs[-1].append(t) or t, lambda t: t)
        with hooks:
            return layer(x)

    with fk.use_backend(backend):
        autocasting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with autocasting:
            y = checkpoint(observed, x, use_reentrant=True)
        y.float().sum().backward()
        # a reentrant checkpoint computes under no_grad first, which saves nothing
        assert runs[0] == [] and len(runs) == 2
        with autocasting:
            observed(x)
    assert list(map(signature, runs[1])) == list(map(signature, runs[2]))
    assert all(map(torch.equal, runs[1], runs[2]))
    assert runs[1]


def timm_checkpointed(model):
    model.set_grad_checkpointing()


def transformers_checkpointed(reentrant):
    def enable(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return enable


MODELS = {
    "timm": (timm_model, timm_checkpointed),
    "transformers": (huggingface_model, transformers_checkpointed(False)),
    "transformers-reentrant": (huggingface_model, transformers_checkpointed(True)),
}


@pytest.mark.parametrize("build, enable", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_models_with_their_own_switch(build, enable, autocast, backend, seed):
    torch.manual_seed(seed)
    model = build(small_config(img_size=32)).float().train()
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    fk.accelerate(model, backend)

    def gradients():
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = twin(x)
        getattr(y, "logits", y).float().square().sum().backward()
        return [p.grad for p in twin.parameters()]

    expected, calls = gradients(), []
    enable(model)
    block = next(m for m in model.modules() if "modulation" in m._modules and "forward" in vars(m))
    # before its forward: what is computed again stops as soon as all that was saved is there
    block.register_forward_pre_hook(lambda *args: calls.append(args))
    assert all(map(torch.equal, gradients(), expected))
    assert len(calls) == 2, "the switch did nothing: this test cannot fail"
