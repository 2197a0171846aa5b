"""Foreign patch embeddings: which module plays which role, and their forward through our op.

Only inference on a CPU gains by the op; anything else is left to the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch
from .._parts import Module, why_call
from .._patches import PatchParts
from ..ops._autograd import needs_grad
from .adapter import why_not_only
from .blocks import in_other_axes


class EmbeddingAdapter:
    """One foreign form of a patch embedding, a map (B, C, H, W) cut by a convolution: timm's unless a subclass says
    otherwise, which answers with a map (B, N, H', W').

    Its memory is channels last: the order in which a class with a norm leaves it, and, where there is none, the one
    that the norm or block to come would make of it.
    """

    form = "timm's patch embedding"
    proj, norm = "proj", "norm"
    attributes: tuple[str, ...] = ()  # what its class has beside them
    storable: tuple[str, ...] = ()
    in_autocast = True  # see `Adapter`

    def missing(self, module: Module) -> list[str]:
        """The members of this form that `module` lacks: none where it looks like the form."""
        names = [] if self.proj in module._modules else [self.proj]
        return names + [name for name in (self.norm, *self.attributes) if not hasattr(module, name)]

    def parts(self, module: Module) -> PatchParts:
        """The inner modules as they are now."""
        norm = module._modules.get(self.norm)
        if norm is None:
            norm = getattr(module, self.norm, None)  # called also where somebody put no module there
        is_idle = type(norm) is nn.Identity and why_call(norm) is None
        return PatchParts(module._modules[self.proj], None if is_idle else norm)

    def channels(self, module: Module) -> int:
        return module._modules[self.proj].in_channels

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        """Maps to try it with: of whole strides, which nobody pads, and of others. No two axes alike."""
        conv = module._modules[self.proj]
        whole = [(-(-k // s) + n) * s for k, s, n in zip(conv.kernel_size, conv.stride, (2, 1), strict=True)]
        return [((2, C, H, W),) for H, W in (whole, (whole[0] + conv.stride[0] // 2, whole[1] + conv.stride[1] - 1))]

    def silence(self, module: Module) -> None:
        """Nothing in it is random."""

    def arguments(self, module: Module, xs: list[Tensor]) -> tuple:
        """A call of the class's forward with these tensors."""
        return tuple(xs)

    def inputs(self, module: Module, args: tuple) -> tuple[Tensor] | None:
        """The map of a call that our op may be faster with; None for one that is left to the class."""
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or x.ndim != 4 or x.device.type != "cpu" or self.missing(module):
            return None
        if needs_grad([x, *module.parameters()]) or dispatch.why_plain(exports=True) is not None:
            return None
        return (x,)

    def may_run(self, parts: PatchParts, x: Tensor) -> bool:
        """Whether the op does with this map what the class would do, refusals in the class's words included."""
        conv: Any = parts.proj
        sizes = zip(x.shape[2:], conv.padding, conv.kernel_size, strict=True)
        fits = x.shape[1] == conv.in_channels and all([n + 2 * padding >= k for n, padding, k in sizes])
        return fits and parts.takes(x)

    def forward(
        self, module: Module, parts: PatchParts, x: Tensor, *, stores: tuple[str, ...] = (), backend: str | None = None
    ) -> Any:
        """The embedding's forward through our op."""
        return self.as_original(parts.run(self.padded(module, x), backend))

    def padded(self, module: Module, x: Tensor) -> Tensor:
        """The map as the class hands it to the convolution."""
        return x

    def as_original(self, y: Tensor) -> Any:
        """(B, H', W', N) as the class answers."""
        return in_other_axes(y, lambda y: y.permute(0, 3, 1, 2))

    def norms(self, module: Module) -> dict[type, Callable]:
        """The class of its norm with its forward: see `bypassed`."""
        norm = self.parts(module).norm
        return {type(norm): type(norm).forward} if isinstance(norm, nn.LayerNorm) else {}

    def bypassed(self, parts: PatchParts, norms: Mapping[type, Callable]) -> str | None:
        """What an accelerated forward would pass by: see `Adapter.bypassed`."""
        norm = parts.norm
        if norm is not None and type(norm) not in norms:  # even a plain LayerNorm is of another axis in timm's
            return f"norm is a {type(norm).__name__}, which was not there"
        return parts.why_call(norms)

    def why_not(self, module: Module) -> str | None:
        """Why these members are not a patch embedding in this form; None where they are."""
        parts = self.parts(module)
        reason = self.bypassed(parts, self.norms(module))
        return reason or why_not_only(module, [part for part in parts if part is not None])


class AuthorsEmbedding(EmbeddingAdapter):
    """Of classification: tokens, H' and W'."""

    form = "authors' patch embedding"

    def as_original(self, y: Tensor) -> tuple[Tensor, int, int]:
        _, H, W, _ = y.shape
        return in_other_axes(y, lambda y: y.flatten(1, 2)), H, W


class DetectionEmbedding(EmbeddingAdapter):
    """Of detection and segmentation: a map, of an input filled up to whole patches."""

    form = "authors' patch embedding of detection and segmentation"
    attributes: tuple[str, ...] = ("patch_size",)

    def padded(self, module: Module, x: Tensor) -> Tensor:
        return to_whole_patches(x, module.patch_size)


class TransformersEmbedding(DetectionEmbedding):
    """Tokens and the pair of H' and W', of an input filled up likewise."""

    form = "transformers' patch embedding"
    proj = "projection"
    attributes = ("patch_size", "num_channels")

    def inputs(self, module: Module, args: tuple) -> tuple[Tensor] | None:
        inputs = super().inputs(module, args)
        return inputs if inputs is not None and inputs[0].shape[1] == module.num_channels else None

    def as_original(self, y: Tensor) -> Any:
        _, H, W, _ = y.shape
        return in_other_axes(y, lambda y: y.flatten(1, 2)), (H, W)


def to_whole_patches(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """x with zeros at its end, up to a multiple of the patches' size."""
    height, width = -x.shape[2] % patch_size[0], -x.shape[3] % patch_size[1]
    return F.pad(x, (0, width, 0, height)) if height or width else x


# numbers tell apart what shares its members; first the forms that explain most of them, as padding need not show
EMBEDDINGS: tuple[EmbeddingAdapter, ...] = (
    TransformersEmbedding(),
    DetectionEmbedding(),
    AuthorsEmbedding(),
    EmbeddingAdapter(),
)
