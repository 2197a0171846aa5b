"""Bytes and FLOPs of the bounds, against tensors that were made and operations that were counted."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import focalnet_kernels as fk
from focalnet_kernels.bench.cases import Case, cases
from focalnet_kernels.bench.layers import PublishedLayer
from focalnet_kernels.bench.providers import providers
from focalnet_kernels.bench.roofline import Ceilings, Work, ceilings, work
from focalnet_kernels.bench.steps import calls

LAYERS = [
    PublishedLayer(8, 9, 3, 2, width=11),
    PublishedLayer(12, 6, 5, 1, use_postln_in_modulation=True),
    PublishedLayer(8, 5, 3, 2, frames=3),
]


def small(level, what, layer):
    return Case(level, what, "small", 1, layer, (), 2, torch.float32, "cpu")


def convolution_backward(grad_out, x, weight, *_args, out_shape=None, **_kwargs):
    """Two products for each of the forward's; torch's own count takes a depthwise weight gradient for a dense one."""
    mask = _args[-1]
    return sum(mask[:2]) * conv_flop_count(x, weight, grad_out)


def counted(subject, mode):
    step = calls(subject, "backward")
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    ) as counter:
        y = step.prepare()
        if mode == "forward":
            return counter.get_total_flops()
    with counter:
        step.call(y)
    return counter.get_total_flops()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "x".join(map(str, layer.spatial)))
@pytest.mark.parametrize("what", ["focal_context", "modulate", "layer", "block"])
def test_flops_and_bytes(what, layer):
    if what == "block" and layer.frames:
        return
    case = small("op" if what in ("focal_context", "modulate") else what, what, layer)
    subject = providers(case)[0].build(case, False)
    assert work(case, "forward").flops == counted(subject, "forward")
    assert work(case, "backward").flops == counted(subject, "backward")
    assert work(case, "forward+backward") == work(case, "forward") + work(case, "backward")

    leaves = sum(leaf.numel() for leaf in subject.leaves().values())
    output = subject().numel()
    assert work(case, "forward").elements == leaves + output
    assert work(case, "backward").elements == output + 2 * leaves


@pytest.mark.parametrize("target", ["focalnet_tiny_srf", "focalnet_tiny_iso"])
def test_a_models_flops(target):
    (case,) = cases(["model"], [target], batch=1, size=(64, 64), dtypes=[torch.float32], device="cpu")
    subject = providers(case)[0].build(case, False)
    assert work(case, "forward").flops == counted(subject, "forward")
    assert work(case, "backward").flops == counted(subject, "backward")


def test_every_published_case_has_a_bound():
    found = list(
        cases(
            ["op", "layer", "block", "model"],
            fk.list_models(),
            batch=1,
            size=None,
            dtypes=[torch.float16],
            device="cpu",
        )
    )
    assert len(found) > 15
    for case, mode in itertools.product(found, ("forward", "backward", "forward+backward")):
        least = work(case, mode)
        assert least.elements > 0 and least.flops > 0


def test_the_bound_is_the_slower_of_the_two():
    limits = Ceilings(copy=4e9, product={torch.float32: 1e9})
    assert limits.bound_ms(Work(elements=10**6, flops=10**5), torch.float32) == pytest.approx(1.0)
    assert limits.bound_ms(Work(elements=10**6, flops=10**7), torch.float32) == pytest.approx(10.0)


def test_ceilings_are_the_best_attempt():
    reached, rows = ceilings([torch.float32], "cpu", 3, small=True)
    best = max(row["gflop_per_s"] for row in rows if row["case"] == "product")
    assert reached.product[torch.float32] / 1e9 == pytest.approx(best, rel=0.01)
    assert {row["provider"] for row in rows} >= {"torch"}
    assert reached.copy > 0
