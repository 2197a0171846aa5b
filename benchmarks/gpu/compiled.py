"""Times beside torch.compile: FocalNet-T and its peers, and its layers, each compiled in a process of its own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import torch
from turns import Turns

import focalnet_kernels as fk
from focalnet_kernels.bench.cases import PEERS, Case, cases
from focalnet_kernels.bench.layers import PublishedLayer
from focalnet_kernels.bench.providers import AUTHORS, providers
from focalnet_kernels.bench.steps import calls

TARGET = "focalnet_tiny_lrf"
MODES = ("forward", "forward+backward")
BATCH = 128
ROUNDS = 7


class Compiled:
    """What compiles from here on, and its rows later: other parts of a report may check meanwhile, but not time.

    Args:
        what: "networks" or "layers".
    """

    def __init__(self, what: str, device: str, tiny: bool):
        groups = [_networks(device, tiny)] if what == "networks" else _layers(device, tiny)
        self._tasks = [{(*labels.values(), *key): task for key, task in tasks.items()} for labels, tasks in groups]
        self._labels = [labels for labels, _ in groups]
        self._turns = Turns(_build, {key: task for tasks in self._tasks for key, task in tasks.items()}, device)
        self._rounds = 2 if tiny else ROUNDS

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *exc_info) -> None:
        self._turns.__exit__(*exc_info)

    def rows(self, until: float) -> Iterator[dict]:
        for labels, tasks in zip(self._labels, self._tasks, strict=True):
            images = int(labels["shape"].partition("x")[0])
            for (*_, name, mode), _, found in self._turns.measure(list(tasks), self._rounds, until):
                row = labels | {"mode": mode, "provider": name}
                if isinstance(found, dict):
                    yield row | found | {"images_per_s": round(1e3 * images / found["p50_ms"], 1)}
                else:
                    yield row | {"skipped": found or "it was not prepared in time"}


def _networks(device: str, tiny: bool) -> tuple[dict, dict]:
    """Labels, and by provider and mode what `_build` takes."""
    shape = "2x3x32x32" if tiny else f"{BATCH}x3x224x224"
    compiled = [(TARGET, False, True)] + [(peer, False, True) for peer in ([] if tiny else PEERS[TARGET])]
    found = {}
    for name, accelerated, compiles in [(TARGET, False, False), (TARGET, True, False), *compiled]:
        provider = name + " accelerated" * accelerated + " compiled" * compiles
        for mode in MODES:
            found[provider, mode] = "network", name, accelerated, compiles, shape, mode
    return {"case": TARGET, "shape": shape, "dtype": "float32" if tiny else "bfloat16"}, found


def _layers(device: str, tiny: bool) -> list[tuple[dict, dict]]:
    """The same of each stage's."""
    if tiny:
        found = [Case("layer", "layer", "tiny", 1, PublishedLayer(8, 7, 3, 3), (), 2, torch.float16, device)]
    else:
        found = cases(["layer"], [TARGET], batch=BATCH, size=None, dtypes=[torch.bfloat16], device=device)
    names = [AUTHORS, f"{AUTHORS} compiled", f"{AUTHORS} compiled max-autotune", *([] if tiny else ["ours cuda"])]
    return [
        (case.labels(), {(name, mode): ("layer", case, name, mode) for name in names for mode in MODES})
        for case in found
    ]


def _build(kind: str, *task) -> dict:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # the other cores have processes of their own
    mode, call = (_network_call if kind == "network" else _layer_call)(*task)
    return {mode: call}


def _layer_call(case: Case, name: str, mode: str, device: str) -> tuple:
    provider = next(p for p in providers(case, ("default", "max-autotune")) if p.name == name)
    return mode, calls(provider.build(case, False), mode)


def _network_call(name: str, accelerated: bool, compiled: bool, shape: str, mode: str, device: str) -> tuple:
    torch.manual_seed(0)
    images = torch.randn([int(n) for n in shape.split("x")], device=device)
    images = images if device == "cpu" else images.bfloat16()
    options = {"img_size": images.shape[-1]} if "swin" in name else {}
    model = importlib.import_module("timm").create_model(name, drop_path_rate=0.2, **options).to(images)
    if accelerated:
        fk.accelerate(model, level="block")
    call = torch.compile(model) if compiled else model
    model.train(mode != "forward")

    def infer():
        with torch.inference_mode():
            call(images)

    def step():
        torch.autograd.grad(call(images).float().square().mean(), list(model.parameters()))

    return mode, infer if mode == "forward" else step
