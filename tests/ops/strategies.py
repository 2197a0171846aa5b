"""What the random tests of the ops draw from."""

import pytest
import torch
from hypothesis import strategies as st

from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import LAYOUTS

# Triton's interpreter computes bfloat16 wrongly
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
# for sweeps: compiled kernels run in float16 in tests/ptx, and here where nothing is swept
SWEPT_DTYPES = [pytest.param(d, marks=pytest.mark.slow_interpreted if d == torch.float16 else ()) for d in DTYPES]


def skip_what_cannot_run(backend, dtype):
    """Skips a test of a dtype that the backend leaves to others."""
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    if dtype == torch.bfloat16 and INTERPRETED:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")


seeds = st.integers(0, 2**32 - 1)
_layouts = st.sampled_from(LAYOUTS)
# an interpreter needs milliseconds for each operation of each tile
_channels = st.sampled_from([1, 3, 8, 17] if INTERPRETED else [1, 2, 3, 5, 8, 16, 17, 24, 33])
_batches = st.sampled_from([0, 1, 2, 3])
_largest_map = {1: 40, 2: 12, 3: 6}
_largest_kernel = {1: 13, 2: 7, 3: 3} if INTERPRETED else {1: 13, 2: 13, 3: 7}


def dtype_name(value):
    """For `ids=`: "float32"; None, the default, for other values."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def by_name(cases, slow_interpreted=()):
    """Named cases for `parametrize`; those in `slow_interpreted` take long in Triton's interpreter."""
    return [
        pytest.param(*case, id=name, marks=pytest.mark.slow_interpreted if name in slow_interpreted else ())
        for name, case in cases.items()
    ]


@st.composite
def _spatial(draw):
    ndim = draw(st.integers(1, 3))
    return draw(st.tuples(*[st.integers(1, _largest_map[ndim])] * ndim))


@st.composite
def _kernels(draw, ndim):
    odd = st.integers(0, _largest_kernel[ndim] // 2).map(lambda half: 2 * half + 1)
    return draw(st.lists(st.one_of(odd, st.tuples(*[odd] * ndim)), max_size=4))


@st.composite
def _common(draw):
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(_layouts),
        "grad_layout": draw(_layouts),
        "mean": draw(st.sampled_from([0.0, 1.0])),
    }


@st.composite
def context_cases(draw):
    """Keyword arguments of a focal_context test."""
    spatial = draw(_spatial())
    return draw(_common()) | {
        "shape": (draw(_batches), draw(_channels), *spatial),
        "kernels": draw(_kernels(len(spatial))),
        "normalize": draw(st.booleans()),
    }


@st.composite
def modulate_cases(draw):
    """Keyword arguments of a modulate test."""
    return draw(_common()) | {
        "shape": (draw(_batches), draw(_channels), *draw(_spatial())),
        "bias": draw(st.booleans()),
    }


@st.composite
def layer_cases(draw):
    """Keyword arguments of a focal_modulation test."""
    case = draw(context_cases())
    B, C, *spatial = case["shape"]
    # LayerNorm over few channels amplifies rounding without bound: no baseline there
    postln = draw(st.booleans()) and C >= 8
    return case | {"shape": (B, *spatial, C), "bias": draw(st.booleans()), "postln": postln}
