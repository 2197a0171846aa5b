"""The authors' own numbers (tests/data/README.md)."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

FILES = sorted((Path(__file__).parents[1] / "data").glob("modulation_*.safetensors"))
NAMES = [path.stem.removeprefix("modulation_") for path in FILES]


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The constructor's arguments, and the tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}


def layer_inputs(config: dict, tensors: dict[str, Tensor]) -> dict:
    """Arguments of `focal_modulation`."""
    names = {"ln.weight": "ln_weight", "ln.bias": "ln_bias"}
    names |= {f"{m}.{p}": f"{m}_{p}" for m in ("f", "h", "proj") for p in ("weight", "bias")}
    return {
        "x": tensors["input"],
        "focal_weights": [tensors[f"param.focal_layers.{level}.0.weight"] for level in range(config["focal_level"])],
        "normalize": config.get("normalize_modulator", False),
    } | {argument: tensors.get(f"param.{key}") for key, argument in names.items()}


def layer_gradients(config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `testing.run` calls "grad <input>", by that name."""
    found = {"grad x": tensors["grad_input"]}
    for key, gradient in tensors.items():
        if key.startswith("grad.focal_layers."):
            found[f"grad focal_weights[{key.split('.')[2]}]"] = gradient
        elif key.startswith("grad."):
            found["grad " + key.removeprefix("grad.").replace(".", "_")] = gradient
    return found


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The largest error over the largest value."""
    assert result.shape == exact.shape
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()
