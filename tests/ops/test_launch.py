"""What every Triton launch does before the kernel runs, seen without a GPU: its device, and tiles that fit it."""

from importlib import import_module

import pytest
import torch

from focalnet_kernels.bench.layers import DETECTION, published_layers
from focalnet_kernels.cli.check import layer_launches
from focalnet_kernels.models import list_models
from focalnet_kernels.ops.modulate import triton_launch
from focalnet_kernels.ops.triton import launch as launching

pytest.importorskip("triton", reason="its kernels are compiled here")

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
        def __getitem__(self, grid):
            return lambda *args, **options: events.append((grid, args))

    monkeypatch.setattr(torch.cuda, "device", Entered)
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
