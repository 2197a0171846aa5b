"""A block of a FocalNet as its two residual branches, each one op, whoever's module it is.

As for a layer (`_parts.py`), weights are read where all parts are plain; who hooks, wraps or replaces one has the block
run as its class does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._arguments import autocast_dtype
from ._parts import Module, Parts, is_off, why_call, why_call_gelu, why_call_norm, why_call_projection
from ._snapshot import Snapshot
from .functional import focal_block, mlp_branch
from .ops.residual import Residual, residual_reference


class BranchParts(NamedTuple):
    """What a block has around the body of a branch.

    `post`: whether the norm follows it. `scale`: the module that has gamma, and its name there. `idle`: modules that
    must be Identities, as they are passed by.
    """

    norm: Module | None
    post: bool
    scale: tuple[Module, str] | None
    drop_path: Module
    idle: tuple[Module, ...] = ()

    def modules(self) -> list[Module]:
        return [self.drop_path, *self.idle, *([] if self.norm is None else [self.norm])]

    def gamma(self) -> Tensor | None:
        return None if self.scale is None else getattr(*self.scale, None)

    def why_call(self, C: int, forwards: Mapping[type, Callable]) -> str | None:
        """What sets its modules apart from plain ones, naming one."""
        for module in self.idle:
            reason = why_call(module) or (None if type(module) is nn.Identity else f"is a {type(module).__name__}")
            if reason is not None:
                return f"what is to be an Identity {reason}"
        reason = None if self.norm is None else why_call_norm(self.norm, C, forwards)
        if reason is not None:
            return f"norm {reason}"
        reason = why_call(self.drop_path, forwards)
        if reason is not None:
            return f"drop_path {reason}"
        if self.scale is None:
            return None
        gamma = self.gamma()
        if not isinstance(gamma, Tensor) or tuple(gamma.shape) != (C,):
            return f"{self.scale[1]} is {gamma!r}, expected {C} factors"
        return None


class BlockParts(NamedTuple):
    """The inner modules of a block, by role.

    `layer_parts`: None where the layer is called, for it is not plain focal modulation. `dropouts`: the layer's and the
    MLP's. `others`: further modules that are read or passed by, of the classes that the form was recognised with.
    """

    layer: Module
    layer_parts: Parts | None
    mlp: Module
    fc1: Module
    act: Module
    fc2: Module
    first: BranchParts
    second: BranchParts
    dropouts: tuple[Module, ...]
    others: tuple[Module, ...] = ()

    def snapshot(self) -> Snapshot:
        return Snapshot(self, [self.layer, self.mlp, *self.others, *self.first.modules(), *self.second.modules()])

    def why_call(
        self, C: int, projection: type[nn.Module], forwards: Mapping[type, Callable], bound: Any = None
    ) -> str | None:
        """What sets the block apart from plain parts, but for the layer's own. `bound`: the forward that the layer may
        have instead of its class's."""
        hidden = self.fc1._parameters["weight"].shape[0] if isinstance(self.fc1, projection) else 0
        reasons: dict[str, Callable[[], str | None]] = {
            "modulation": lambda: why_call(self.layer, forwards, bound),
            "mlp": lambda: why_call(self.mlp, forwards),
            "mlp.fc1": lambda: why_call_projection(self.fc1, projection, (hidden, C)),
            "mlp.fc2": lambda: why_call_projection(self.fc2, projection, (C, hidden)),
            "mlp.act": lambda: why_call_gelu(self.act, forwards),
            "first": lambda: self.first.why_call(C, forwards),
            "second": lambda: self.second.why_call(C, forwards),
        }
        for i, module in enumerate(self.others):
            known = f"is a {type(module).__name__}, which was not there" if type(module) not in forwards else None
            judge = partial(why_call, module, forwards)
            reasons[f"others[{i}]"] = judge if known is None else partial(str, known)
        for name, judge in reasons.items():
            reason = judge()
            if reason is not None:
                return f"{name} {reason}"
        return None

    def drops(self) -> bool:
        """Whether a dropout acts, which no op does."""
        return not all([is_off(dropout) for dropout in self.dropouts])

    def run(self, x: Tensor, normalize: bool, keep_hidden: bool = False, backend: str | None = None) -> Tensor:
        """The block's forward over maps (B, *spatial, C) through our ops, whose options the others are."""
        fc1, fc2 = self.fc1._parameters, self.fc2._parameters
        weights = fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"]
        around, of_mlp = _around(self.first, x), {"keep_hidden": keep_hidden}
        if self.layer_parts is not None:
            args, kwargs = self.layer_parts.weights()
            focal = args, kwargs | around | {"normalize": normalize}
            return focal_block(x, focal, (weights, of_mlp | _around(self.second, x)), backend=backend)
        residual = Residual(around["norm_weight"], around["norm_bias"], around["gamma"], around["drop_path"])
        y = residual_reference(x, self.layer, residual, around["norm_eps"], self.first.post)
        return mlp_branch(y, *weights, **of_mlp, **_around(self.second, y), backend=backend)

    def takes(self, x: Tensor) -> bool:
        """Whether the ops take these plain parts' numbers for `x`: all of one kind, but for what autocast casts, and
        for float32 norms beside 16 bits, which it leaves so."""
        branches = self.first, self.second
        gammas = [branch.gamma() for branch in branches if branch.scale is not None]
        fc1_weight: Any = self.fc1._parameters["weight"]
        for gamma in gammas:  # which no snapshot knows
            if not isinstance(gamma, Tensor) or tuple(gamma.shape) != (fc1_weight.shape[1],):
                return False
        bodies, alike = [fc1_weight], {x.dtype}
        if self.layer_parts is not None:
            bodies.append(self.layer_parts.f._parameters["weight"])
        norms: list[Any] = [branch.norm._parameters["weight"] for branch in branches if branch.norm is not None]
        autocast = autocast_dtype(x.device)
        if autocast is not None and x.dtype not in (torch.float32, autocast):
            return False
        # on a GPU autocast's layer_norm answers in float32, and so does a sum with it
        sums_widen = autocast is not None and x.device.type != "cpu" and x.dtype != torch.float32
        if sums_widen and any([branch.post and branch.norm is not None for branch in branches]):
            return False
        of_bodies = alike if autocast is None else alike | {torch.float32}
        of_norms = alike | {torch.float32} if x.dtype.itemsize == 2 else alike
        return all(
            [
                t.dtype in dtypes and t.device == x.device
                for tensors, dtypes in ((bodies, of_bodies), (norms, of_norms), (gammas, alike))
                for t in tensors
            ]
        )


def _around(branch: BranchParts, x: Tensor) -> dict[str, Any]:
    """The arguments of an op around its body."""
    norm: Any = branch.norm
    parameters = {"weight": None, "bias": None} if norm is None else norm._parameters
    return {
        "norm_weight": parameters["weight"],
        "norm_bias": parameters["bias"],
        "norm_eps": 1e-5 if norm is None else norm.eps,
        "post_norm": branch.post,
        "gamma": branch.gamma(),
        "drop_path": drawn(branch.drop_path, x),
    }


def drawn(drop_path: Module, x: Tensor) -> Tensor | None:
    """The factors (B,) by which `drop_path` multiplies the samples of a branch like x, None where it drops nothing. The
    module itself draws them: the numbers that it would draw for the branch."""
    if type(drop_path) is nn.Identity:
        return None
    ones = x.new_ones((x.shape[0],) + (1,) * (x.ndim - 1))
    factors = drop_path(ones)
    return None if factors is ones else factors.reshape(-1)
