"""Time the sequence form, fused, against the pseudo-code's literal one: `python benchmarks/similarity.py`.

The two take turns in one process, so that drift hits both alike; figures are medians in milliseconds. "affine" is
what the fused form collapses: the 2L linear layers of the modulator, and scale * query + bias. "layer" is everything,
with the context windows, which are the same in both, and the attention.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import focalnet_kernels as fk
from focalnet_kernels.forms.reference import scale_and_shift_reference, similarity_focal_modulation_reference
from focalnet_kernels.forms.similarity import scale_and_shift

FUSED, LITERAL = "fused", "literal"


def make_cases(B: int, N: int, C: int, L: int, dtype: torch.dtype) -> dict[str, tuple[dict[str, Callable], list]]:
    """{part: ({form: function of nothing}, leaves)}, the two forms on the same tensors."""
    module = fk.SimilarityFocalModulation(C, L, scale_factor=C**-0.5).to(dtype)
    query, target, modulator = (torch.randn(B, N, C, dtype=dtype, requires_grad=True) for _ in range(3))
    contexts, scales, biases = (
        [(layer.weight, layer.bias) for layer in layers] for layers in (module.contexts, module.scales, module.biases)
    )
    affine = (query, modulator, scales, biases)
    layer = (query, target, contexts, scales, biases)
    factor = module.scale_factor
    return {
        "affine": (
            {FUSED: lambda: scale_and_shift(*affine), LITERAL: lambda: scale_and_shift_reference(*affine)},
            [query, modulator, *module.scales.parameters(), *module.biases.parameters()],
        ),
        "layer": (
            {
                FUSED: lambda: fk.similarity_focal_modulation(*layer, scale_factor=factor),
                LITERAL: lambda: similarity_focal_modulation_reference(*layer, scale_factor=factor),
            },
            [query, target, *module.parameters()],
        ),
    }


def runners(function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The function alone, and with the gradient of every leaf."""
    grad_output = torch.randn_like(function())

    def forward():
        with torch.inference_mode():
            function()

    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(function(), leaves, grad_output),
    }


def medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, one after the other in every round, after a warm-up round."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=784, help="of the query, and of the target")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    a = parser.parse_args()
    torch.manual_seed(0)
    print(f"B={a.batch} N={a.tokens} C={a.dim} L={a.contexts}", end=", ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'dtype':10}{'part':8}{'mode':18}{LITERAL:>10}{FUSED:>10}{'ratio':>8}")
    for name in a.dtype:
        dtype = getattr(torch, name)
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        for part, (forms, leaves) in make_cases(a.batch, a.tokens, a.dim, a.contexts, dtype).items():
            torch.testing.assert_close(forms[FUSED](), forms[LITERAL](), **tolerance)
            by_form = {form: runners(function, leaves) for form, function in forms.items()}
            for mode in ("forward", "forward+backward"):
                found = medians({form: runs[mode] for form, runs in by_form.items()}, a.rounds)
                ratio = found[LITERAL] / found[FUSED]
                print(f"{name:10}{part:8}{mode:18}{found[LITERAL]:10.2f}{found[FUSED]:10.2f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
