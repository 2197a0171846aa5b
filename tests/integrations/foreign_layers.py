"""Layers of other people: the authors' forms in short, look-alikes with another formula, and small instances."""

import torch
from timm.models.focalnet import FocalModulation as TimmModulation
from torch import nn
from transformers import FocalNetConfig
from transformers.models.focalnet.modeling_focalnet import FocalNetModulation


class AuthorsBase(nn.Module):
    """Members and formula of the authors' two classes; look-alikes override a step of it."""

    def __init__(self, dim, focal_window, focal_level, focal_factor, bias, proj_drop, postln):
        super().__init__()
        self.dim, self.focal_level = dim, focal_level
        self.f = nn.Linear(dim, 2 * dim + focal_level + 1, bias=bias)
        self.h = nn.Conv2d(dim, dim, 1, bias=bias)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        kernels = [focal_window + focal_factor * level for level in range(focal_level)]
        self.focal_layers = nn.ModuleList(self.level(dim, k) for k in kernels)
        if postln:
            self.ln = nn.LayerNorm(dim)

    def level(self, dim, k):
        return nn.Sequential(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False), nn.GELU())

    def gate(self, gates):
        return gates

    def run(self, x, postln, normalize):
        """The output, the gates and the modulator."""
        q, ctx, gates = self.f(x).permute(0, 3, 1, 2).split((self.dim, self.dim, self.focal_level + 1), 1)
        gates, total = self.gate(gates), 0
        for level, layer in enumerate(self.focal_layers):
            ctx = layer(ctx)
            total = total + ctx * gates[:, level : level + 1]
        total = total + self.act(ctx.mean((2, 3), keepdim=True)) * gates[:, self.focal_level :]
        modulator = self.h(total / (self.focal_level + 1) if normalize else total)
        y = (q * modulator).permute(0, 2, 3, 1).contiguous()
        return self.proj_drop(self.proj(self.ln(y) if postln else y)), gates, modulator


class AuthorsClassification(AuthorsBase):
    def __init__(
        self,
        dim,
        focal_window,
        focal_level,
        focal_factor=2,
        bias=True,
        proj_drop=0.0,
        use_postln_in_modulation=False,
        normalize_modulator=False,
    ):
        super().__init__(dim, focal_window, focal_level, focal_factor, bias, proj_drop, use_postln_in_modulation)
        self.use_postln_in_modulation = use_postln_in_modulation
        self.normalize_modulator = normalize_modulator

    def forward(self, x):
        y, self.gates, self.modulator = self.run(x, self.use_postln_in_modulation, self.normalize_modulator)
        return y


class AuthorsDetection(AuthorsBase):
    def __init__(self, dim, proj_drop=0.0, focal_level=2, focal_window=7, focal_factor=2, use_postln=False):
        super().__init__(dim, focal_window, focal_level, focal_factor, True, proj_drop, use_postln)
        self.use_postln = use_postln

    def forward(self, x):
        return self.run(x, self.use_postln, False)[0]


class SigmoidGates(AuthorsDetection):
    def gate(self, gates):
        return gates.sigmoid()


class ParallelLevels(AuthorsDetection):
    def forward(self, x):
        q, ctx, gates = self.f(x).permute(0, 3, 1, 2).split((self.dim, self.dim, self.focal_level + 1), 1)
        total = gates[:, self.focal_level :] * self.act(ctx.mean((2, 3), keepdim=True))
        for level, layer in enumerate(self.focal_layers):
            total = total + layer(ctx) * gates[:, level : level + 1]
        return self.proj_drop(self.proj((q * self.h(total)).permute(0, 2, 3, 1)))


class BatchNormLevels(AuthorsDetection):
    def level(self, dim, k):
        return nn.Sequential(*super().level(dim, k)[:1], nn.BatchNorm2d(dim), nn.GELU())


class NoiseInTraining(AuthorsDetection):
    """The formula in evaluation, dropped gates in training."""

    def gate(self, gates):
        return nn.functional.dropout(gates, 0.1, self.training)


class FocalModulation(AuthorsDetection):
    """The authors' very name and members, but GELU's other approximation."""

    def forward(self, x):
        gelu, self.act.forward = self.act.forward, lambda t: nn.functional.gelu(t, approximate="tanh")
        try:
            return super().forward(x)
        finally:
            self.act.forward = gelu


def _authors(C, levels, options):
    return AuthorsClassification(C, 3, levels, **options)


def _detection(C, levels, options):
    return AuthorsDetection(C, focal_level=levels, focal_window=3, **options)


def _timm(C, levels, options):
    return TimmModulation(C, 3, levels, **options)


def _transformers(C, levels, options):
    dropout = options.pop("projection_dropout", 0.0)
    config = FocalNetConfig(focal_levels=[levels], focal_windows=[3], layer_norm_eps=1e-3, **options)
    return FocalNetModulation(config, 0, C, projection_dropout=dropout)


BUILD = {"authors": _authors, "detection": _detection, "timm": _timm, "transformers": _transformers}
FORMS = {
    "authors": "authors' classification",
    "detection": "authors' detection and segmentation",
    "timm": "timm",
    "transformers": "transformers",
}
POSTLN = {
    "authors": "use_postln_in_modulation",
    "detection": "use_postln",
    "timm": "use_post_norm",
    "transformers": "use_post_layernorm_in_modulation",
}
DROPOUT = {"transformers": "projection_dropout"}


def build(form, C=12, levels=2, *, postln=False, dropout=0.0, **options):
    """A layer of that form with no parameter at a value that hides mistakes."""
    options |= {POSTLN[form]: postln, DROPOUT.get(form, "proj_drop"): dropout}
    layer = BUILD[form](C, levels, options)
    with torch.no_grad():
        for parameter in layer.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return layer.eval()


def example(form, C=12, B=2, H=7, W=6, dtype=torch.float32):
    """An input in the form's layout."""
    return torch.randn((B, C, H, W) if form == "timm" else (B, H, W, C), dtype=dtype)
