"""Names of a FocalNet's parameters: the authors', timm's and Hugging Face's, and the way from each to each.

One table per layout, read in both directions; the authors' names stand in the middle. `<i>` and `<j>` are
numbers, `<i+1>` is the next one, `<*>` is the rest. The first rule that matches holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from torch import Tensor

Rules = tuple[tuple[str, str], ...]

_TIMM: Rules = (
    ("patch_embed.<*>", "stem.<*>"),
    # timm downsamples at the start of a stage, not at the end of the one before
    ("layers.<i>.downsample.<*>", "layers.<i+1>.downsample.<*>"),
    ("layers.<i>.blocks.<j>.modulation.ln.<*>", "layers.<i>.blocks.<j>.modulation.norm.<*>"),
    ("layers.<i>.blocks.<j>.gamma_1", "layers.<i>.blocks.<j>.ls1.gamma"),
    ("layers.<i>.blocks.<j>.gamma_2", "layers.<i>.blocks.<j>.ls2.gamma"),
    ("head.<*>", "head.fc.<*>"),
)
_TIMM_POSTLN: Rules = (
    ("layers.<i>.blocks.<j>.norm1.<*>", "layers.<i>.blocks.<j>.norm1_post.<*>"),
    ("layers.<i>.blocks.<j>.norm2.<*>", "layers.<i>.blocks.<j>.norm2_post.<*>"),
)
_TIMM_AS_AUTHORS: Rules = (
    ("layers.<i>.blocks.<j>.<*>", "layers.<i>.blocks.<j>.<*>"),
    ("norm.<*>", "norm.<*>"),
)


def _features(rules: Rules) -> Rules:
    """timm's names in a model made with `features_only`, which has no final norm and no head."""
    return tuple((a, b.replace("layers.", "layers_")) for a, b in rules if not a.startswith(("norm.", "head.")))


_MODEL: Rules = (
    ("patch_embed.proj.<*>", "embeddings.patch_embeddings.projection.<*>"),
    ("patch_embed.norm.<*>", "embeddings.norm.<*>"),
    ("layers.<i>.downsample.proj.<*>", "encoder.stages.<i>.downsample.projection.<*>"),
    ("layers.<i>.downsample.norm.<*>", "encoder.stages.<i>.downsample.norm.<*>"),
    ("layers.<i>.blocks.<j>.modulation.f.<*>", "encoder.stages.<i>.layers.<j>.modulation.projection_in.<*>"),
    (
        "layers.<i>.blocks.<j>.modulation.h.<*>",
        "encoder.stages.<i>.layers.<j>.modulation.projection_context.<*>",
    ),
    (
        "layers.<i>.blocks.<j>.modulation.proj.<*>",
        "encoder.stages.<i>.layers.<j>.modulation.projection_out.<*>",
    ),
    ("layers.<i>.blocks.<j>.modulation.ln.<*>", "encoder.stages.<i>.layers.<j>.modulation.layernorm.<*>"),
    ("layers.<i>.blocks.<j>.<*>", "encoder.stages.<i>.layers.<j>.<*>"),
    ("norm.<*>", "layernorm.<*>"),
)
_HEAD: Rules = (("head.<*>", "classifier.<*>"),)
_BACKBONE = ("patch_embed.<*>", "layers.<*>", "norm<i>.<*>")

_RULES: dict[str, Rules] = {
    "authors": (("<*>", "<*>"),),
    "detection": tuple((a, f"backbone.{a}") for a in _BACKBONE),
    "detr": tuple((a, f"backbone.0.{a}") for a in _BACKBONE),
    "timm": _TIMM + _TIMM_AS_AUTHORS,
    "timm_postln": _TIMM + _TIMM_POSTLN + _TIMM_AS_AUTHORS,
    "timm_features": _features(_TIMM + _TIMM_AS_AUTHORS),
    "timm_features_postln": _features(_TIMM + _TIMM_POSTLN + _TIMM_AS_AUTHORS),
    "huggingface": tuple((a, f"focalnet.{b}") for a, b in _MODEL) + _HEAD,
    "huggingface_bare": _MODEL + _HEAD,
}
# detection: the backbone of a detector or segmenter. It has a norm for each stage's map, norm0 and so on, and no
# final norm or head; by itself, without the detector's prefix, it goes as "authors". Mind that the authors pad
# the overlapping stem (`use_conv_embed`) of their detection and segmentation by 3, and of classification by 2.
# detr: the same where a DETR has joined it with its position embedding, as FocalNet-DINO does.
# timm_postln: timm's names in a model with `use_postln`; timm names norms by where they stand.
# timm_features: as flattened for `features_only`.
# huggingface_bare: a `FocalNetModel` without the classifier around it.
LAYOUTS = tuple(_RULES)
DETECTORS = ("detection", "detr")  # files of these hold more than the backbone

# Linear layers that timm writes as 1x1 convolutions, by their authors' names
_POINTWISE = re.compile(r"layers\.\d+\.blocks\.\d+\.(modulation\.(f|proj)|mlp\.fc[12])\.weight")


def recognise_layout(keys: Iterable[str], what: str = "keys") -> str:
    """The layout of a state_dict, one of `LAYOUTS`, from its keys.

    Raises:
        ValueError: the keys are no FocalNet's, or have no focal modulation; the message begins with `what` and
            shows the first.
    """
    keys = list(keys)
    first = ", ".join(repr(key) for key in keys[:3]) or "none"
    refused = f"{what}: expected a FocalNet's keys (the authors', timm's or Hugging Face's), got {first}, ..."
    if not any(".modulation." in key for key in keys):  # Swin and others have its stem, stages and norms
        raise ValueError(f"{refused}, and none of focal modulation")
    if "patch_embed.proj.weight" in keys:
        return "authors"
    if "backbone.patch_embed.proj.weight" in keys:
        return "detection"
    if "backbone.0.patch_embed.proj.weight" in keys:
        return "detr"
    if "stem.proj.weight" in keys:
        layout = "timm_features" if any(key.startswith("layers_0.") for key in keys) else "timm"
        return f"{layout}_postln" if any(".norm1_post." in key for key in keys) else layout
    if "focalnet.embeddings.patch_embeddings.projection.weight" in keys:
        return "huggingface"
    if "embeddings.patch_embeddings.projection.weight" in keys:
        return "huggingface_bare"
    raise ValueError(refused)


def has_name(key: str, source: str, target: str) -> bool:
    """Whether layout `target` has the parameter that is called `key` in layout `source`."""
    try:
        rename_key(key, source, target)
    except ValueError:
        return False
    return True


def rename_key(key: str, source: str, target: str) -> str:
    """The name in layout `target` of the parameter called `key` in layout `source`.

    Raises:
        ValueError: one of the layouts has no such parameter.
    """
    if source == target:
        return key
    authors = _translate(key, [(theirs, authors) for authors, theirs in _RULES[source]])
    renamed = authors and _translate(authors, _RULES[target])
    if renamed is None:
        raise ValueError(f"{key!r}: no such parameter in the {source if authors is None else target} layout")
    return renamed


def convert_state_dict(state_dict: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """A state_dict of layout `source` in layout `target`: other names, and (O, I) <-> (O, I, 1, 1) for timm.

    Args:
        state_dict: tensors by name; not changed. The result shares their memory.
        source, target: one of `LAYOUTS`.

    Raises:
        ValueError: a key that one of the layouts does not have, or two keys that become one.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        renamed = rename_key(key, source, target)
        if renamed in converted:
            raise ValueError(f"{key!r}: a second parameter that is {renamed!r} in the {target} layout")
        if source != target and _POINTWISE.fullmatch(rename_key(key, source, "authors")):
            tensor = _pointwise(tensor, as_conv=target.startswith("timm"))
        converted[renamed] = tensor
    return converted


def _pointwise(weight: Tensor, as_conv: bool) -> Tensor:
    # any other shape is wrong in both layouts and stays, to be reported as it is
    if as_conv and weight.ndim == 2:
        return weight[:, :, None, None]
    if not as_conv and weight.ndim == 4 and weight.shape[2:] == (1, 1):
        return weight[:, :, 0, 0]
    return weight


_FIELDS = {"<i>": r"(?P<i>\d+)", "<i+1>": r"(?P<next>[1-9]\d*)", "<j>": r"(?P<j>\d+)", "<*>": r"(?P<rest>.+)"}


@cache
def _regex(template: str) -> re.Pattern:
    pattern = re.escape(template)
    for field, group in _FIELDS.items():
        pattern = pattern.replace(re.escape(field), group)
    return re.compile(pattern)


def _translate(key: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """`key` rewritten by the first rule whose left side matches; None where none does."""
    for template, other in rules:
        if match := _regex(template).fullmatch(key):
            found = match.groupdict()
            i = int(found["next"]) - 1 if found.get("next") else found.get("i")
            fields = {"<i>": i, "<i+1>": int(i or 0) + 1, "<j>": found.get("j"), "<*>": found.get("rest")}
            for field, value in fields.items():
                other = other.replace(field, str(value))
            return other
    return None
