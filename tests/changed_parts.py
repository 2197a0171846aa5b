"""What people do to the inner modules of a layer: hooks, wrappers, other modules, other weights."""

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

C = 6
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OnTop(torch.Tensor):
    """A weight that means something else than its numbers, as a quantised one's do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return super().__torch_function__(function, types, args, kwargs or {})
        x, weight, bias = args
        return F.linear(x, 3 * weight.as_subclass(torch.Tensor), bias)


def level_with(**options):
    def change(layer):
        options_of_ours = {"padding": 1, "groups": C, "bias": False} | options
        layer.focal_layers[0][0] = CONV[layer.ndim](C, C, 3, **options_of_ours).double()

    return change


def replace(**parts):
    def change(layer):
        for name, build in parts.items():
            setattr(layer, name, build(layer).double())

    return change


def padded_in_place(layer):
    conv = layer.focal_layers[0][0]
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1] * 2 * layer.ndim


def bound_convolution(layer):
    conv = layer.focal_layers[1][0]
    old = conv._conv_forward
    conv._conv_forward = types.MethodType(lambda self, x, weight, bias: 3 * old(x, weight, bias), conv)


def bound_forward(part):
    def change(layer):
        module = layer.get_submodule(part)
        old = module.forward
        module.forward = lambda x: 2 * old(x)

    return change


def hooked(part):
    return lambda layer: layer.get_submodule(part).register_forward_hook(lambda module, args, y: 2 * y)


def plain_bias(layer):
    conv = layer.focal_layers[0][0]
    del conv.bias
    conv.bias = torch.ones(C, dtype=torch.float64)


def bound_call(part, name):
    def change(layer):
        module = layer.get_submodule(part)
        old = module._call_impl
        setattr(module, name, lambda *args, **kwargs: 2 * old(*args, **kwargs))

    return change


def another_level(layer):
    layer.focal_layers.append(nn.Tanh())
    layer.f, layer.focal_level = nn.Linear(C, 2 * C + 4).double(), layer.focal_level + 1


def function_for_norm(layer):
    del layer.ln
    layer.ln = torch.tanh


# of float64 layers of C channels and two levels with a post norm, in the authors' names; `layer.ndim` spatial axes
CHANGES = {
    "hook on f": hooked("f"),
    "hook on a level": hooked("focal_layers.0"),
    "hook on a convolution": hooked("focal_layers.1.0"),
    "hook on an activation": hooked("focal_layers.1.1"),
    "hook on ln": hooked("ln"),
    "pre-hook": lambda layer: layer.h.register_forward_pre_hook(
        lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
    ),
    "wrapped": replace(proj=lambda layer: nn.Sequential(layer.proj, nn.Tanh())),
    "wider": replace(proj=lambda layer: nn.Linear(C, 2 * C)),
    "subclass": replace(f=lambda layer: Doubled(C, 2 * C + 3)),
    "h sees neighbours": replace(h=lambda layer: CONV[layer.ndim](C, C, 3, padding=1)),
    "another norm": replace(ln=lambda layer: nn.RMSNorm(C)),
    "a function for a norm": function_for_norm,
    "norm without weights": replace(ln=lambda layer: nn.LayerNorm(C, elementwise_affine=False)),
    "a level more": another_level,
    "bare level": lambda layer: layer.focal_layers.__setitem__(1, layer.focal_layers[1][0]),
    "dense level": level_with(groups=1),
    "dilated": level_with(dilation=2, padding=2),
    "biased": level_with(bias=True),
    "bias that is no parameter": plain_bias,
    "circular": level_with(padding_mode="circular"),
    "circular in place": padded_in_place,
    "no activation": lambda layer: layer.focal_layers[1].__setitem__(1, nn.Identity()),
    "another activation": lambda layer: layer.focal_layers[1].__setitem__(1, nn.GELU("tanh")),
    "appended": lambda layer: layer.focal_layers[1].append(nn.Tanh()),
    "forward of f": bound_forward("f"),
    "forward of a convolution": bound_forward("focal_layers.0.0"),
    "forward of an activation": bound_forward("focal_layers.0.1"),
    "forward of a convolution within": bound_convolution,
    "call of f": bound_call("f", "_call_impl"),
    "compiled call of a convolution": bound_call("focal_layers.0.0", "_compiled_call_impl"),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer.h),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer.focal_layers[0][0]).eval(),
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer.f),
    "pruned": lambda layer: prune.l1_unstructured(layer.f, "weight", 0.5),
}
