"""The profile of an accelerated network walks its whole way, and loses no time."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from timm.models.focalnet import FocalNet

FILE = Path(__file__).parents[2] / "benchmarks/shares.py"


def test_parts_make_up_the_whole(cpu_kernels, monkeypatch):
    spec = importlib.util.spec_from_file_location("shares", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"depths": (1, 1), "embed_dim": 16, "focal_levels": (2, 2), "focal_windows": (3, 3), "num_classes": 5}
    monkeypatch.setattr(module, "timm", SimpleNamespace(create_model=lambda name: FocalNet(**small)))
    monkeypatch.setattr(module, "BATCH", 1)
    monkeypatch.setattr(module, "ROUNDS", 1)
    product = {torch.float32: 1e9, torch.bfloat16: 2e9}
    monkeypatch.setattr(module, "ceilings", lambda *_: (SimpleNamespace(product=product), []))
    rows = module.rows()
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "forward+backward"):
            found = {r["part"]: r for r in rows if (r["dtype"], r["direction"]) == (dtype, direction)}
            ours = {"focal_branch_fwd", "mlp_branch_fwd"}
            if direction != "forward":
                ours |= {"focal_branch_bwd", "mlp_branch_bwd"}
            assert ours <= set(found) and all(found[name]["gflop_per_s"] != "" for name in ours)
            assert math.isclose(sum(r["share"] for r in found.values()), 1, abs_tol=0.01)
            assert min(r["share"] for r in found.values()) >= 0, "something was counted twice"
