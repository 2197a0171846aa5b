"""What every Triton launch does before the kernel runs, seen without a GPU: its device, and tiles that fit it."""

import inspect
from importlib import import_module

import pytest
import torch

from focalnet_kernels.bench.layers import DETECTION, published_layers
from focalnet_kernels.cli.check import layer_launches
from focalnet_kernels.models import list_models
from focalnet_kernels.ops.modulate import triton_launch
from focalnet_kernels.ops.triton import launch as launching
from focalnet_kernels.testing import layer_tensors, make_context_inputs, make_layer_inputs

pytest.importorskip("triton", reason="its kernels are compiled here")

from absent_gpu import absent_gpu

LAYERS = [*dict.fromkeys(layer for name in list_models() for layer in published_layers(name)), *DETECTION]


def test_runs_under_the_device_of_its_tensors(monkeypatch):
    """Whatever the current one: a kernel launched elsewhere reads another GPU's memory."""
    events = []

    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            events.append(f"enter {self.device}")

        def __exit__(self, *exc_info):
            events.append("leave")

    class Kernel:
        pre_run_hooks = ()
        arg_names = ("argument",)

        def __getitem__(self, grid):
            def run(*args, **options):
                events.append((grid, args))
                return Kernel()

            return run

    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(launching, "_built", {})
    launching.launch(Kernel(), 7, torch.device("cuda", 1), "argument")
    assert events == ["enter cuda:1", ((7,), ("argument",)), "leave"]
    launching.launch(Kernel(), 0, torch.device("cuda", 1))  # a grid of nothing is an error in CUDA
    assert len(events) == 3


def test_every_launch_names_the_device_of_its_tensors(monkeypatch):
    """Recorded on "meta", which stands for a GPU that is not the current one."""
    devices = []
    record = launching.launch
    for module in ("focal_context", "modulate", "focal_modulation"):

        def launch(kernel, programs, device, *args, **constants):
            devices.append(device)
            record(kernel, programs, device, *args, **constants)

        monkeypatch.setattr(import_module(f"focalnet_kernels.ops.{module}.triton_launch"), "launch", launch)
    for layer in LAYERS[:3]:
        launches = layer_launches(layer, 2, torch.bfloat16)
    assert len(devices) >= 3 * len(launches) > 0 and {device.type for device in devices} == {"meta"}


# bytes that one program can have: T4, and RTX cards
@pytest.mark.parametrize("limit, target", [(65536, "sm_75"), (101376, "sm_86")])
def test_tiles_fit_small_shared_memories(limit, target, monkeypatch):
    """By the compiler's count. The chain kernels need a few KiB whatever the map, and minutes to compile."""
    from focalnet_kernels.ops.triton.resources import compile_launch

    monkeypatch.setattr(triton_launch, "shared_memory", lambda device: limit)
    distinct = {}
    for layer in LAYERS:
        for launch in layer_launches(layer, 8, torch.float16):
            if launch.kernel.__name__ in ("modulate_fwd_kernel", "linear_planes_kernel", "rows_bwd_kernel"):
                distinct.setdefault((launch.kernel.__name__, *launch.constants.values()), launch)
    assert len({name for name, *_ in distinct}) == 3
    for key, launch in distinct.items():
        assert compile_launch(launch, target).shared <= limit, key


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.data_ptr() % 16
    return tuple(plain(v) for v in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("C, dtype", [(32, torch.bfloat16), (32, torch.float32), (272, torch.float16)])
def test_a_second_launch_is_handed_what_the_first_was(C, dtype, seed):
    """Without Triton's look at every argument, by what it compiled for the same ones."""
    from focalnet_kernels.ops.focal_modulation import triton_launch as layer

    x, parameters = layer_tensors(make_layer_inputs((3, 7, 9, C), (3, 5), postln=True, dtype=dtype, seed=seed))
    grad_y = torch.ones_like(x)
    forward = inspect.unwrap(layer.focal_modulation_fwd_impl)  # which would replay its own launches

    def work():
        y, saved = forward(x, parameters, True, 1e-5, True)
        layer.focal_modulation_bwd_impl(grad_y, x, parameters, *saved, True, 1e-5, (1 << 1 + len(parameters)) - 1)

    launched: list = []
    with absent_gpu(launched):
        work()
        first, built = list(launched), len(launching._built)
        launched.clear()
        work()
        second, built_then = launched, len(launching._built)
    assert built_then == built == len({h.kernel for h in first})
    assert [h.kernel for h in first] == [h.kernel for h in second] and len(first) >= 4
    for one, other in zip(first, second, strict=True):
        assert one.grid == other.grid
        assert plain(one.args) == plain(other.args), one.kernel


def test_what_triton_compiles_for_is_told_apart(seed):
    """Another size, an address that is no multiple of 16, another type: each has a kernel of its own."""
    from focalnet_kernels.ops.focal_context import triton_launch as context

    def call(dtype=torch.bfloat16, width=16, offset=0, normalize=False):
        inputs = make_context_inputs((2, 8, 5, width), (3, 5), dtype=dtype, seed=seed)
        flat = torch.empty(inputs["ctx"].numel() + 8, dtype=dtype)
        ctx = flat[offset : offset + inputs["ctx"].numel()].view_as(inputs["ctx"])
        context.context_fwd(ctx, inputs["gates"], inputs["weights"], normalize, torch.empty_like(ctx))

    launched: list = []
    with absent_gpu(launched):
        for i, options in enumerate(({}, {"width": 15}, {"offset": 1}, {"dtype": torch.float16}, {"normalize": True})):
            call(**options)
            call(**options)
            assert len(launching._built) == i + 1, options
    assert len(launched) == 10
    x = torch.zeros(4)
    assert launching._specialized((x.half(),)) != launching._specialized((x.bfloat16(),))


def test_a_hook_of_somebody_s_is_called_for_every_launch(seed):
    from focalnet_kernels.ops.focal_context.triton_fwd import context_fwd_kernel
    from focalnet_kernels.ops.focal_context.triton_launch import context_fwd

    inputs = make_context_inputs((2, 8, 5, 16), (3,), seed=seed)
    seen = []
    context_fwd_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append(args))
    try:
        with absent_gpu():
            for _ in range(3):
                context_fwd(*inputs.values(), False, torch.empty_like(inputs["ctx"]))
            assert not launching._built
            context_fwd_kernel.pre_run_hooks.clear()
            context_fwd(*inputs.values(), False, torch.empty_like(inputs["ctx"]))
            context_fwd_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append(args))
            context_fwd(*inputs.values(), False, torch.empty_like(inputs["ctx"]))  # added after it was compiled
    finally:
        context_fwd_kernel.pre_run_hooks.clear()
    assert len(seen) == 4
