"""The least that an op must move and multiply, and how fast this machine can do either.

Bytes are the inputs and the results, each once, as if nothing between them ever left the chip. FLOPs are those of
matrix products and convolutions, two per multiply-add; GELUs, gates, norms and means are not counted, nor is what a
backward computes anew instead of keeping it. So a bound is below what can be reached, and a share of 1 is not to be
had, with one exception: data that stay in a cache can pass the copy, which goes through memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from .. import dispatch
from ..functional import modulate
from ..models.variants import VARIANTS
from ..nn.patch_embed import PatchEmbed
from .cases import Case
from .layers import published_layers
from .timing import interleaved

MLP_RATIO = 4


@dataclass(frozen=True)
class Work:
    """Elements that must move and FLOPs that must be done."""

    elements: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.elements + other.elements, self.flops + other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.elements * times, self.flops * times)


def work(case: Case, mode: str) -> Work | None:
    """The least work of a case in "forward", "backward" or both; None for peers, whose formulas are not ours."""
    if case.level == "peers":
        return None
    forward, backward = _model(case) if case.level == "model" else _passes(case)
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[mode]


def _passes(case: Case) -> tuple[Work, Work]:
    """Forward and backward of an op, layer or block.

    A backward reads the output's gradient and the inputs, and writes a gradient for each input: what forward kept
    could have been computed anew. Its products are two for each of the forward's, one for either factor.
    """
    layer, tokens = case.layer, case.batch * prod(case.layer.spatial)
    C, L = layer.dim, layer.focal_level
    taps = sum(k ** len(layer.spatial) for k in layer.kernels)
    x, square = tokens * C, C * C
    if case.what == "focal_context":
        inputs, outputs, flops = x + tokens * (L + 1) + taps * C, x, 2 * tokens * C * taps
    elif case.what == "modulate":
        inputs, outputs, flops = 2 * x + square + C, x, 2 * tokens * square
    else:
        f_out = 2 * C + L + 1
        parameters = f_out * (C + 1) + 2 * (square + C) + taps * C + 2 * C * layer.use_postln_in_modulation
        products = C * f_out + 2 * square
        if case.what == "block":
            config = VARIANTS.get(case.target, {})
            products += 2 * MLP_RATIO * square
            parameters += 2 * MLP_RATIO * square + (MLP_RATIO + 1) * C + 4 * C  # the MLP and two norms
            parameters += 2 * C * config.get("use_layerscale", False)
        inputs, outputs, flops = x + parameters, x, 2 * tokens * (products + C * taps)
    return Work(inputs + outputs, flops), Work(outputs + 2 * inputs, 2 * flops)


def _model(case: Case) -> tuple[Work, Work]:
    """A model as its parts one after the other: stem, blocks, steps between the stages, final norm and head."""
    config = VARIANTS[case.target]
    B, forward, backward = case.batch, Work(), Work()
    size, C_in = case.image, 3
    for stage, depth in enumerate(config["depths"]):
        C = config["embed_dim"] * 2**stage
        with torch.device("meta"):
            embed = PatchEmbed(
                2 if stage else config.get("patch_size", 4), C_in, C, config.get("use_conv_embed", False),
                is_stem=stage == 0,
            )  # fmt: skip
        before, size = size, embed.output_size(size)
        inputs, outputs = B * C_in * prod(before), B * C * prod(size)
        parameters = embed.proj.weight.numel() + 3 * C  # and its bias and norm
        flops = 2 * outputs * embed.proj.weight[0].numel()
        forward += Work(inputs + parameters + outputs, flops)
        # nobody asks for the gradient of an image
        backward += Work(outputs + (2 if stage else 1) * inputs + 2 * parameters, (2 if stage else 1) * flops)
        block = _block_of(case, stage, size)
        forward, backward = (total + one * depth for total, one in zip((forward, backward), block, strict=True))
        C_in = C
    classes = config["num_classes"]
    tokens = B * C_in * prod(size)
    parameters, flops = classes * (C_in + 1) + 2 * C_in, 2 * B * C_in * classes
    forward += Work(tokens + parameters + B * classes, flops)
    backward += Work(B * classes + 2 * (tokens + parameters), 2 * flops)
    return forward, backward


def _block_of(case: Case, stage: int, size: tuple[int, ...]) -> tuple[Work, Work]:
    layer = replace(list(published_layers(case.target))[stage], size=size[0], width=size[1])
    return _passes(replace(case, level="block", what="block", layer=layer))


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best.

    Args:
        copy: bytes read and written per second.
        product: FLOPs per second of a matrix product, by dtype.
    """

    copy: float
    product: dict[torch.dtype, float]

    def bound_ms(self, work: Work, dtype: torch.dtype) -> float:
        """No call can take less."""
        return 1e3 * max(work.elements * dtype.itemsize / self.copy, work.flops / self.product[dtype])


def ceilings(dtypes: Iterable[torch.dtype], device: str, rounds: int, small: bool = False) -> tuple[Ceilings, list]:
    """The ceilings, and a row for each attempt at one: a product may be faster here by our kernels than by torch's.

    Args:
        small: for a test that only wants to see it run.
    """
    side, elements = (64, 1 << 12) if small else (8192, 1 << 29) if device.startswith("cuda") else (2048, 1 << 26)
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    attempts = {("copy", torch.float32, "torch"): lambda: target.copy_(source)}
    for dtype in dtypes:
        x = torch.randn(side, side, device=device).to(dtype)
        attempts["product", dtype, "torch"] = partial(torch.matmul, x, x)
        one = x[:, 0].contiguous()
        for backend in dispatch.BACKENDS[2:]:
            attempts["product", dtype, f"ours {backend}"] = partial(_product, backend, x, one)
    with torch.inference_mode():
        for key, attempt in list(attempts.items()):
            try:
                attempt()
            except Exception:  # cases say why; without an attempt the ceiling is torch's
                del attempts[key]
        times = interleaved(attempts, rounds, device)
    rates, rows = {}, []
    for (what, dtype, provider), found in times.items():
        done = 2 * elements * 4 if what == "copy" else 2 * side**3
        rate = done / (1e-3 * found["p50_ms"])
        rates[what, dtype] = max(rate, rates.get((what, dtype), 0))
        labels = {"level": "ceiling", "case": what, "dtype": str(dtype).removeprefix("torch."), "provider": provider}
        shape = f"{elements}" if what == "copy" else f"{side}x{side}x{side}"
        unit = "gbyte_per_s" if what == "copy" else "gflop_per_s"
        rows.append(labels | {"shape": shape} | found | {unit: float(f"{rate / 1e9:.4g}")})
    product = {dtype: rate for (what, dtype), rate in rates.items() if what == "product"}
    return Ceilings(rates["copy", torch.float32], product), rows


def _product(backend: str, x: Tensor, bias: Tensor) -> Tensor:
    """x (side, side) times itself by the one product that our kernels offer: channels-last tokens, as in a layer."""
    tokens = x.t()[None]
    with dispatch.use_backend(backend):
        return modulate(tokens, tokens, x, bias)
