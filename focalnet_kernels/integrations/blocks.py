"""Foreign blocks: which module plays which role, and their forward through our ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import autocast_dtype
from .._blocks import BlockParts, BranchParts
from .._parts import Module
from .adapter import Adapter, BoundForward, normalizes, why_not_only


class BlockAdapter:
    """One foreign form of a block around a layer of a known form: the authors' unless a subclass says otherwise.

    Tokens (B, H * W, C), H and W kept on the block: classification, detection and segmentation, Video-FocalNets.
    """

    form = "authors' block"
    post_flag = "use_postln"  # detection has none
    mlp, fc1, act, fc2 = "mlp", "fc1", "act", "fc2"
    dropouts: tuple[str, ...] = ("drop",)  # the MLP's
    members: tuple[str, ...] = ("norm1", "modulation", "drop_path", "norm2", "mlp")
    storable: tuple[str, ...] = ()
    in_autocast = True  # see `Adapter`

    def __init__(self, layer: Adapter, keep_hidden: bool):
        self.layer = layer
        self.keep_hidden = keep_hidden

    @classmethod
    def missing(cls, module: Module) -> list[str]:
        """The members of this form that `module` lacks: none where it looks like the form."""
        names = [name for name in cls.members if name not in module._modules]
        mlp = module._modules.get(cls.mlp)
        inner = (cls.fc1, cls.act, cls.fc2, *cls.dropouts)
        return names + ([] if mlp is None else [f"{cls.mlp}.{name}" for name in inner if name not in mlp._modules])

    def parts(self, module: Module) -> BlockParts:
        """The inner modules as they are now."""
        inner, mlp = module._modules, module._modules[self.mlp]._modules
        layer = inner["modulation"]
        return BlockParts(
            layer,
            self.layer.parts(layer) if self.layer.is_plain() else None,
            inner[self.mlp],
            mlp[self.fc1],
            mlp[self.act],
            mlp[self.fc2],
            *self.branches(module),
            (getattr(layer, self.layer.drop), *[mlp[name] for name in self.dropouts]),
            self.others(module),
        )

    def others(self, module: Module) -> tuple[Module, ...]:
        """Modules that stand in no role of `BlockParts`, and are known to do nothing, or to be read."""
        return ()

    def branches(self, module: Module) -> tuple[BranchParts, BranchParts]:
        """What is around the two bodies."""
        inner, post = module._modules, bool(getattr(module, self.post_flag, False))

        def branch(number: int) -> BranchParts:
            gamma = f"gamma_{number}"
            scale = None if _is_one(getattr(module, gamma)) else (module, gamma)
            return BranchParts(inner[f"norm{number}"], post, scale, inner["drop_path"])

        return branch(1), branch(2)

    def channels(self, module: Module) -> int:
        return self.layer.channels(module.modulation)

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        """Calls to try the block with: see `Adapter.examples`."""
        ((batch, H, W, _),) = self.layer.examples(module.modulation, C)[0]
        module.H, module.W = H, W
        return [((batch, H * W, C),)]

    def silence(self, module: Module) -> None:
        """Take off what is random, but honoured by both forwards. Drop path stays: it is to draw the same."""
        for name in self.dropouts:
            setattr(getattr(module, self.mlp), name, nn.Dropout(0.0))
        setattr(module.modulation, self.layer.drop, nn.Dropout(0.0))
        for inner in module.modules():
            if getattr(inner, "drop_prob", None):
                inner.drop_prob = 0.5

    def arguments(self, module: Module, xs: list[Tensor]) -> tuple:
        """A call of the class's forward with these tensors."""
        return tuple(xs)

    def inputs(self, module: Module, args: tuple) -> tuple[Any, ...] | None:
        """The arguments of a call, for `forward`; None for one that is left to the class."""
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 3 or self.missing(module):
            return None
        H, W = module.H, module.W
        return (args[0], H, W) if isinstance(H, int) and isinstance(W, int) and args[0].shape[1] == H * W else None

    def forward(
        self, module: Module, parts: BlockParts, x: Tensor, *sizes, stores: tuple[str, ...] = (),
        backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        """The block's forward through our ops; `sizes`: of tokens, the map's."""
        if not sizes:
            return self.run(module, parts, x, backend)
        tokens = x.reshape(x.shape[0], *sizes, x.shape[-1])
        return in_other_axes(self.run(module, parts, tokens, backend), lambda y: y.flatten(1, 2), tokens.shape)

    def run(self, module: Module, parts: BlockParts, x: Tensor, backend: str | None) -> Tensor:
        """Over maps, channels last."""
        return parts.run(x, normalizes(parts.layer), self.keep_hidden, backend)

    def may_run(self, parts: BlockParts, x: Tensor) -> bool:
        """Whether the ops do what the block would now do with this input."""
        if not self.in_autocast and autocast_dtype(x.device) is not None:
            return False
        return not parts.drops() and parts.takes(x)

    def norms(self, module: Module) -> dict[type, Callable]:
        """The forwards with which the block was found to be right: of the norms, and of the classes in it."""
        parts = self.parts(module)
        known = [parts.layer, parts.mlp, parts.act, *parts.first.modules(), *parts.second.modules()]
        known += [part for part in parts.others if type(part) is not nn.Identity]
        known = [part for part in known if part is not module and type(part) is not nn.Identity]
        found: dict[type, Callable] = {type(part): type(part).forward for part in known}
        return found | self.layer.norms(parts.layer)

    def bypassed(self, parts: BlockParts, norms: Mapping[type, Callable]) -> str | None:
        """What an accelerated forward would pass by: see `Adapter.bypassed`."""
        bound = vars(parts.layer).get("forward")
        if bound is not None and not isinstance(bound, BoundForward):
            return f"modulation has a forward of its own ({bound!r})"
        of_layer = self.layer.parts(parts.layer)
        C: Any = of_layer.h.in_channels if isinstance(of_layer.h, self.layer.conv) else 0
        reason = parts.why_call(C, self.layer.projection, norms, bound)
        return self.layer.bypassed(of_layer, norms) if reason is None else reason

    def why_not(self, module: Module) -> str | None:
        """Why these members are not a block in this form; None where they are."""
        reason = self.bypassed(self.parts(module), self.norms(module))
        if reason is not None:
            return reason
        parts = self.parts(module)
        inner = [parts.layer, parts.mlp, parts.act, *parts.first.modules(), *parts.second.modules(), *parts.others]
        gammas = [branch.gamma() for branch in (parts.first, parts.second)]
        return why_not_only(module, [part for part in inner if part is not module], gammas)


class TransformersBlock(BlockAdapter):
    form = "transformers' block"
    post_flag = "use_post_layernorm"
    act = "activation"

    def arguments(self, module: Module, xs: list[Tensor]) -> tuple:
        return *xs, (module.H, module.W)

    def inputs(self, module: Module, args: tuple) -> tuple[Any, ...] | None:
        if len(args) != 2 or not isinstance(args[0], Tensor) or args[0].ndim != 3 or self.missing(module):
            return None
        try:
            H, W = map(int, args[1])
        except (TypeError, ValueError):
            return None
        return (args[0], H, W) if args[0].shape[1] == H * W else None


class TimmBlock(BlockAdapter):
    """Maps (B, C, H, W), a norm before and one after each body, layer scale as a module."""

    form = "timm's block"
    dropouts = ("drop1", "drop2")
    members = (
        "norm1", "modulation", "norm1_post", "ls1", "drop_path1", "norm2", "mlp", "norm2_post", "ls2", "drop_path2",
    )  # fmt: skip

    def branches(self, module: Module) -> tuple[BranchParts, BranchParts]:
        inner = module._modules

        def branch(number: int) -> BranchParts:
            before, after, scale = (inner[f"{name}"] for name in (f"norm{number}", f"norm{number}_post", f"ls{number}"))
            post = type(before) is nn.Identity and type(after) is not nn.Identity
            norm = after if post else before
            within = inner["mlp"]._modules.get("norm")
            passed_by = [before if post else after, scale if type(scale) is nn.Identity else None, within]
            idle = tuple([m for m in passed_by if m is not None])
            return BranchParts(
                None if type(norm) is nn.Identity else norm,
                post,
                None if type(scale) is nn.Identity else (scale, "gamma"),
                inner[f"drop_path{number}"],
                idle,
            )

        return branch(1), branch(2)

    def others(self, module: Module) -> tuple[Module, ...]:
        scales = [module._modules["ls1"], module._modules["ls2"]]
        return tuple([scale for scale in scales if type(scale) is not nn.Identity])

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        return self.layer.examples(module.modulation, C)

    def inputs(self, module: Module, args: tuple) -> tuple[Any, ...] | None:
        is_map = len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim == 4
        return args if is_map and not self.missing(module) else None

    def run(self, module: Module, parts: BlockParts, x: Tensor, backend: str | None) -> Tensor:
        y = super().run(module, parts, x.permute(0, 2, 3, 1), backend)
        return in_other_axes(y, lambda y: y.permute(0, 3, 1, 2), lambda grad: grad.permute(0, 2, 3, 1))


class FocalCodecBlock(BlockAdapter):
    """Of sequences (B, N, C): forward(x, left_contexts=None) -> (y, the layer's contexts to come)."""

    form = "FocalCodec's block"
    post_flag = "use_post_norm"
    mlp, fc1, act, fc2 = "feed_forward", "in_proj", "activation", "out_proj"
    dropouts = ("dropout",)
    members = ("modulation_norm", "modulation", "feed_forward_norm", "feed_forward")
    in_autocast = False  # the class adds in place, and so answers in autocast's dtype
    _no_drop_path = nn.Identity()

    def branches(self, module: Module) -> tuple[BranchParts, BranchParts]:
        post = bool(getattr(module, self.post_flag))

        def branch(name: str) -> BranchParts:
            scale = (module, f"{name}_gamma") if module.use_layerscale else None
            return BranchParts(module._modules[f"{name}_norm"], post, scale, self._no_drop_path)

        return branch("modulation"), branch("feed_forward")

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        return self.layer.examples(module.modulation, C)

    def inputs(self, module: Module, args: tuple) -> tuple[Any, ...] | None:
        return None if self.missing(module) else self.layer.inputs(module.modulation, args)

    def forward(
        self, module: Module, parts: BlockParts, x: Tensor, *sizes, stores: tuple[str, ...] = (),
        backend: str | None = None,
    ) -> Any:  # fmt: skip
        y, of_layer = self.run(module, parts, x, backend), parts.layer_parts
        assert of_layer is not None  # its form is plain
        return y, [None] * (len(of_layer.focal_layers) + 1)

    def may_run(self, parts: BlockParts, x: Tensor) -> bool:
        return x.device.type == "cpu" and super().may_run(parts, x)


class _InOtherAxes(torch.autograd.Function):
    @staticmethod
    def forward(fctx, y, there, back):
        fctx.back = back
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return there(y)

    @staticmethod
    def backward(fctx, grad):
        back = fctx.back
        return grad.reshape(back) if isinstance(back, torch.Size) else back(grad), None, None


def in_other_axes(y: Tensor, there: Callable[[Tensor], Tensor], back: Any = None) -> Tensor:
    """`there(y)`, which shares y's memory but is no view of it: classes answer with tensors of their own, and who wraps
    them (FSDP) warns of views. `back`: from its gradient to y's, or y's shape; None where nobody will ask for one."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return there(y)
    return _InOtherAxes.apply(y, there, back)


def _is_one(gamma: Any) -> bool:
    """Whether there is no layer scale."""
    return isinstance(gamma, float | int) and gamma == 1


BLOCKS: tuple[type[BlockAdapter], ...] = (TimmBlock, TransformersBlock, FocalCodecBlock, BlockAdapter)
