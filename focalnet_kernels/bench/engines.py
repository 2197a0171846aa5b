"""Inference engines that people use instead: torch.compile with frozen weights, ONNX Runtime, OpenVINO.

Each runs timm's model on a CPU, with the threads that torch has.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case


def frozen(module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """Compiled for inference, its weights constants of the graph."""
    import torch._inductor.config as inductor

    compiled = torch.compile(module.eval(), dynamic=False)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad(), inductor.patch(freezing=True):
            return compiled(x)

    return call


def onnxruntime(case: Case, module: torch.nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    engine = importlib.import_module("onnxruntime")
    options = engine.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = engine.InferenceSession(_exported(module, x), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(case: Case, module: torch.nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """bfloat16 is its own choice of what to compute with; the graph is float32's."""
    engine = importlib.import_module("openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[case.dtype]
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(_exported(module, x))
        compiled = engine.Core().compile_model(path, "CPU", settings)
    return lambda x: torch.from_numpy(next(iter(compiled(x.float().numpy()).values()))).to(case.dtype)


def why_not(engine: str, case: Case) -> str | None:
    """Why it cannot run this case; None where it can."""
    if case.device != "cpu":
        return f"{engine} is compared on CPUs alone"
    known = {"onnxruntime": (torch.float32,), "openvino": (torch.float32, torch.bfloat16)}.get(engine)
    return None if known is None or case.dtype in known else f"{engine} has no {str(case.dtype)[6:]} on a CPU"


def _exported(module: torch.nn.Module, x: Tensor) -> bytes:
    """timm's model as ONNX, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        module = module.eval().float()
        torch.onnx.export(module, (x.float(),), path, dynamo=True, external_data=False, verbose=False)
        return path.read_bytes()
