"""The focal modulation layer, with the authors' arguments, keys and layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._parts import Parts, dropped, why_call_all, why_call_any, why_call_levels, why_call_norm, why_call_projection
from ..functional import focal_context, focal_modulation, resample
from ..ops.focal_context.reference import mix_levels

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class FocalModulationNd(nn.Module):
    """The parameters of focal modulation over `ndim` spatial axes, and its forward.

    The fused form reads the weights of the inner modules. Where one of these is no plain module (see `_parts.py`) the
    layer calls them instead, one after the other.
    """

    ndim: int
    functional: Callable = staticmethod(focal_modulation)

    def __init__(
        self,
        dim: int,
        focal_window: int,
        focal_level: int,
        focal_factor: int = 2,
        bias: bool = True,
        proj_drop: float = 0.0,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.focal_window = focal_window
        self.focal_level = focal_level
        self.focal_factor = focal_factor
        self.use_postln_in_modulation = use_postln_in_modulation
        self.normalize_modulator = normalize_modulator
        self.kernel_sizes = [focal_factor * level + focal_window for level in range(focal_level)]
        for level, k in enumerate(self.kernel_sizes):
            if k < 1 or k % 2 == 0:
                raise ValueError(
                    f"focal_window, focal_factor: expected odd kernel sizes, got {k} at level {level + 1} "
                    f"(focal_window={focal_window} + {level} * focal_factor={focal_factor}); "
                    "an even one would change the map's size"
                )

        # created in the authors' order, so that a seed gives the weights that their class would draw
        Conv = _CONV[self.ndim]
        self.f = nn.Linear(dim, 2 * dim + focal_level + 1, bias=bias)
        self.h = Conv(dim, dim, kernel_size=1, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(Conv(dim, dim, k, padding=k // 2, groups=dim, bias=False), nn.GELU())
            for k in self.kernel_sizes
        )
        if use_postln_in_modulation:
            self.ln = nn.LayerNorm(dim)

    def parts(self) -> Parts:
        """The inner modules as they are now."""
        inner: Any = self._modules
        ln = inner["ln"] if "ln" in inner else vars(self).get("ln")  # somebody may have put a function there
        return Parts(inner["f"], inner["h"], inner["proj"], inner["focal_layers"], ln)

    def functional_arguments(self, x: Tensor) -> tuple[tuple, dict]:
        """What `forward` hands to `functional`."""
        args, kwargs = self.parts().weights()
        kwargs["normalize"] = self.normalize_modulator
        return (x, *args), kwargs

    def forward(self, x: Tensor, return_gates: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        self.check_input("x", x)
        if self.why_by_parts() is not None:
            y, gates, modulator = self.by_parts(x)
        else:
            args, kwargs = self.functional_arguments(x)
            if not return_gates:
                result: Any = focal_modulation(*args, **kwargs)
                return dropped(self.proj_drop, result)
            y, gates, modulator = focal_modulation(*args, **kwargs, return_gates=True)
        y = self.proj_drop(y)
        return (y, gates, modulator) if return_gates else y

    def why_by_parts(self) -> str | None:
        """Which inner module must be called, and why; None where the fused form may read all of their weights."""
        return why_call_any(self, self.parts(), self._why_call)

    def _why_call(self, parts: Parts) -> str | None:
        C, L, conv = self.dim, len(parts.focal_layers._modules), _CONV[self.ndim]
        for name, part, kind, rows in (
            ("f", parts.f, nn.Linear, 2 * C + L + 1),
            ("h", parts.h, conv, C),
            ("proj", parts.proj, nn.Linear, C),
        ):
            reason = why_call_projection(part, kind, (rows, C))
            if reason is not None:
                return f"{name} {reason}"
        reason = None if parts.norm is None else why_call_norm(parts.norm, C)
        return why_call_levels(parts.focal_layers, conv, C) if reason is None else f"ln {reason}"

    def by_parts(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output before dropout, gates and modulator, by calling the inner modules; plain levels are still one op."""
        q, ctx, gates = self.project(*inputs)
        if why_call_all() is None and why_call_levels(self.focal_layers, _CONV[self.ndim], ctx.shape[1]) is None:
            weights, biases = self.parts().levels()
            ctx_all = focal_context(ctx, gates, weights, biases=biases, normalize=self.normalize_modulator)
        else:
            ctx_all = mix_levels(ctx, gates, list(self.focal_layers), self.normalize_modulator)
        modulator = self.h(resample(ctx_all, q.shape[2:]))
        y = (q * modulator).movedim(1, -1)
        ln = getattr(self, "ln", None)
        return self.proj(y if ln is None else ln(y)), gates, modulator

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, ctx and gates, channels first, by calling f."""
        return self.f(x).movedim(-1, 1).split((self.dim, self.dim, len(self.focal_layers) + 1), 1)

    def check_input(self, name: str, x: Tensor) -> None:
        if x.ndim != self.ndim + 2 or x.shape[-1] != self.dim:
            axes = ("N", "H, W", "D, H, W")[self.ndim - 1]
            raise ValueError(f"{name}: expected shape (B, {axes}, C={self.dim}), got {tuple(x.shape)}")

    def __prepare_scriptable__(self):
        raise TypeError(
            f"torch.jit.script(model): expected modules that TorchScript can compile, found a {type(self).__name__}; "
            "torch.jit.trace, torch.export and torch.compile take it"
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_sizes={self.kernel_sizes}"


class FocalModulation(FocalModulationNd):
    """Focal modulation of a map (paper, section 3.2), with the authors' constructor and state_dict keys.

    Args:
        dim: channels C.
        focal_window: kernel size of the first level; level l has focal_window + focal_factor * (l - 1).
        focal_level: number of levels L, 0 or more.
        focal_factor: growth of the kernel size per level.
        bias: whether f and h have biases.
        proj_drop: dropout after proj.
        use_postln_in_modulation: a LayerNorm between q * modulator and proj.
        normalize_modulator: divide the gathered context by L + 1.

    Shape:
        (B, H, W, C) -> (B, H, W, C). `forward(x, return_gates=True)` also returns the gates (B, L+1, H, W) and the
        modulator (B, C, H, W); nothing is kept on the module.

    Raises:
        ValueError: a level's kernel size is even, or x has another shape.
    """

    ndim = 2


class FocalModulation1d(FocalModulationNd):
    """`FocalModulation` of a sequence: (B, N, C) -> (B, N, C), same arguments."""

    ndim = 1


class FocalModulation3d(FocalModulationNd):
    """`FocalModulation` of a volume or video: (B, D, H, W, C) -> (B, D, H, W, C), same arguments."""

    ndim = 3
