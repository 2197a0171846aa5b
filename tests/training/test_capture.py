"""CUDA graphs: nothing in a step may wait for a tensor's values."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import focalnet_kernels as fk
from focalnet_kernels.ops.focal_modulation import triton_launch
from focalnet_kernels.ops.triton.launch import recorded_launches
from focalnet_kernels.testing import layer_tensors, make_layer_inputs, map_tensors

# indexing may be by a mask, and we have no need of any
READING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "index"}


class Unread(TorchDispatchMode):
    """Refuses whatever brings values, or sizes that depend on them, to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in READING, f"{name} reads a tensor's values"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_the_guard_sees_readers(read):
    with pytest.raises(AssertionError, match="reads a tensor's values"), Unread():
        read(torch.randn(3, 4))


@pytest.mark.parametrize("postln", [False, True], ids=["plain", "postln"])
def test_training_steps_read_no_values(backend, postln, seed):
    torch.manual_seed(seed)
    layer = fk.FocalModulation(8, 3, 2, use_postln_in_modulation=postln)
    x = torch.randn(2, 6, 5, 8)
    with fk.use_backend(backend), Unread():
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            y.float().square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("postln", [False, True], ids=["plain", "postln"])
def test_triton_launches_read_no_values(dtype, postln, seed):
    """On the meta device there are no values to read: whatever asked for one would raise."""
    pytest.importorskip("triton", reason="its kernels are launched, on no device")
    inputs = make_layer_inputs((2, 14, 14, 64), [3, 5], postln=postln, dtype=dtype, seed=seed)
    x, parameters = layer_tensors(map_tensors(lambda t: t.to("meta"), inputs))
    with recorded_launches() as launches, Unread():
        y, saved = triton_launch.focal_modulation_fwd_impl(x, parameters, False, 1e-5, True)
        forward = len(launches)
        triton_launch.focal_modulation_bwd_impl(y, x, parameters, *saved, False, 1e-5, -1)
    assert 0 < forward < len(launches)
