"""Times beside torch.compile: FocalNet-T and its peers, and its layers, each compiled in a process of its own."""

from __future__ import annotations

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
        what: "networks", "layers" or both.
        backends: of ours that the layers are timed on.
    """

    def __init__(self, what: tuple[str, ...], backends: list[str], device: str, tiny: bool):
        groups: dict[tuple, dict[str, tuple]] = {}
        if "networks" in what:
            groups["networks", TARGET] = _networks(tiny)
        if "layers" in what:
            groups |= {("layers", case): _layer(case, backends) for case in _layers(device, tiny)}
        self._tasks = {(*group, name): task for group, tasks in groups.items() for name, task in tasks.items()}
        self._groups = {group: [(*group, name) for name in tasks] for group, tasks in groups.items()}
        self._turns = Turns(_build, self._tasks, device)
        self._rounds = 2 if tiny else ROUNDS

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *exc_info) -> None:
        self._turns.__exit__(*exc_info)

    def rows(self, until: float) -> Iterator[dict]:
        for (level, of), names in self._groups.items():
            if level == "networks":
                labels = {"case": of, "shape": self._tasks[names[0]][-1], "dtype": "bfloat16"}
            else:
                labels = of.labels()
            for (*_, name), mode, found in self._turns.measure(names, self._rounds, until):
                row = labels | {"mode": mode, "provider": name}
                if isinstance(found, dict):
                    images = int(labels["shape"].partition("x")[0])
                    yield row | found | {"images_per_s": round(1e3 * images / found["p50_ms"], 1)}
                else:
                    yield row | {"skipped": found or "it was not prepared in time"}


def _networks(tiny: bool) -> dict[str, tuple]:
    """By provider, what `_build` takes."""
    shape = "2x3x32x32" if tiny else f"{BATCH}x3x224x224"
    found = {}
    for name in (TARGET,) if tiny else (TARGET, *PEERS[TARGET]):
        for compiled in (False, True):
            found[name + " compiled" * compiled] = "network", name, False, compiled, shape
    for compiled in (False, True):
        found[f"{TARGET} accelerated" + " compiled" * compiled] = "network", TARGET, True, compiled, shape
    return found


def _layers(device: str, tiny: bool) -> list[Case]:
    if tiny:
        return [Case("layer", "layer", "tiny", 1, PublishedLayer(8, 7, 3, 3), (), 2, torch.float16, device)]
    return list(cases(["layer"], [TARGET], batch=BATCH, size=None, dtypes=[torch.bfloat16], device=device))


def _layer(case: Case, backends: list[str]) -> dict[str, tuple]:
    names = [
        AUTHORS,
        *(f"{AUTHORS} compiled{mode}" for mode in ("", " max-autotune")),
        *(f"ours {b}" for b in backends),
    ]
    return {name: ("layer", case, name) for name in names}


def _build(kind: str, *task) -> dict:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the other cores have processes of their own
    return (_network_calls if kind == "network" else _layer_calls)(*task)


def _layer_calls(case: Case, name: str, device: str) -> dict:
    provider = next(p for p in providers(case, ("default", "max-autotune")) if p.name == name)
    return {mode: calls(provider.build(case, False), mode) for mode in MODES}


def _network_calls(name: str, accelerated: bool, compiled: bool, shape: str, device: str) -> dict:
    torch.manual_seed(0)
    images = torch.randn([int(n) for n in shape.split("x")], device=device)
    images = images if device == "cpu" else images.bfloat16()
    options = {"img_size": images.shape[-1]} if "swin" in name else {}
    model = __import__("timm").create_model(name, drop_path_rate=0.2, **options).to(images)
    if accelerated:
        fk.accelerate(model, level="block")
    call = torch.compile(model) if compiled else model

    def infer():
        model.eval()
        with torch.inference_mode():
            call(images)

    def step():
        model.train()
        torch.autograd.grad(call(images).float().square().mean(), list(model.parameters()))

    return dict(zip(MODES, (infer, step), strict=True))
