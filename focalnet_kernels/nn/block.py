"""The block of a FocalNet: focal modulation and an MLP, each with a norm and a residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import BlockParts, BranchParts
from .._parts import why_call, why_call_all, why_call_any
from .drop_path import DropPath
from .focal_modulation import FocalModulation


def pointwise(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`, where x may be a channels-last map: (B, H, W, C) -> (B, H, W, out_features).

    In float32 on a CPU a plain Linear runs as a 1x1 convolution without moving data: oneDNN's took 0.5 to 0.8 of the
    time of MKL's product on an AMD EPYC (forward, the MLPs of FocalNet-T).
    """
    as_map = x.ndim == 4 and x.device.type == "cpu" and x.dtype == torch.float32
    if not as_map or type(linear) is not nn.Linear or why_call_all() is not None or why_call(linear) is not None:
        return linear(x)
    return F.conv2d(x.permute(0, 3, 1, 2), linear.weight[:, :, None, None], linear.bias).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Two linear layers with an activation between them: (..., in_features) -> (..., in_features)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(pointwise(self.fc2, self.drop(self.act(pointwise(self.fc1, x)))))


class FocalNetBlock(nn.Module):
    """One block of a FocalNet (paper, figure 2 and section 3.3), with the authors' state_dict keys.

    x = x + drop_path(gamma_1 * modulation(norm1(x)));  x = x + drop_path(gamma_2 * mlp(norm2(x)))
    With `use_postln` the norms follow the modulation and the MLP instead.

    Args:
        dim: channels C.
        mlp_ratio: hidden width of the MLP over C.
        drop: dropout after the modulation's proj and in the MLP.
        drop_path: stochastic depth rate of both branches.
        act_layer: the MLP's activation.
        norm_layer: called with C.
        focal_level, focal_window: see `FocalModulation`.
        use_layerscale, layerscale_value: learnt factors gamma per channel, and their initial value.
        use_postln: norm after each branch, not before.
        use_postln_in_modulation, normalize_modulator: see `FocalModulation`.
        keep_hidden: keep the MLP's hidden values for a faster backward: see `mlp_branch`.

    Shape:
        (B, H, W, C) -> (B, H, W, C). Sizes are read off x; nothing is kept on the module.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        focal_level: int = 1,
        focal_window: int = 3,
        use_layerscale: bool = False,
        layerscale_value: float = 1e-4,
        use_postln: bool = False,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
        keep_hidden: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.use_postln = use_postln
        self.keep_hidden = keep_hidden
        self.norm1 = norm_layer(dim)
        self.modulation = FocalModulation(
            dim,
            focal_window,
            focal_level,
            proj_drop=drop,
            use_postln_in_modulation=use_postln_in_modulation,
            normalize_modulator=normalize_modulator,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop)
        for name in ("gamma_1", "gamma_2"):
            gamma = nn.Parameter(torch.full((dim,), layerscale_value)) if use_layerscale else None
            self.register_parameter(name, gamma)

    def parts(self) -> BlockParts:
        """The inner modules as they are now."""
        layer, mlp = self.modulation, self.mlp

        def branch(norm: nn.Module, gamma: str) -> BranchParts:
            return BranchParts(
                norm, self.use_postln, None if getattr(self, gamma) is None else (self, gamma), self.drop_path
            )

        return BlockParts(
            layer, layer.parts(), mlp, mlp.fc1, mlp.act, mlp.fc2, branch(self.norm1, "gamma_1"),
            branch(self.norm2, "gamma_2"), (layer.proj_drop, mlp.drop),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.why_by_modules(x) is None:
            self.modulation.check_input("x", x)
            return self.parts().run(x, self.modulation.normalize_modulator, self.keep_hidden)
        if self.use_postln:
            x = x + self._branch(self.norm1(self.modulation(x)), self.gamma_1)
            return x + self._branch(self.norm2(self.mlp(x)), self.gamma_2)
        x = x + self._branch(self.modulation(self.norm1(x)), self.gamma_1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2)

    def why_by_modules(self, x: Tensor) -> str | None:
        """Which inner module must be called, and why; None where both branches run as ops."""
        modules = self._modules
        if type(modules.get("modulation")) is not FocalModulation or type(modules.get("mlp")) is not Mlp:
            return "modulation or mlp is of another class"
        parts = self.parts()
        if parts.drops():
            return "dropout acts within a branch"
        reason = why_call_any(self, parts, self._why_call)
        return "its tensors are of several kinds" if reason is None and not parts.takes(x) else reason

    def _why_call(self, parts: BlockParts) -> str | None:
        reason = parts.why_call(self.dim, nn.Linear, _FORWARDS)
        return reason if reason is not None else self.modulation._why_call(self.modulation.parts())

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        return self.drop_path(x if gamma is None else gamma * x)


_FORWARDS: dict[type, Callable] = {cls: cls.forward for cls in (FocalModulation, Mlp, DropPath)}
