"""Layers of other people, retold in short: the forms that we know, and small instances of them."""

import torch
from timm.models.focalnet import FocalModulation as TimmModulation
from torch import nn
from transformers import FocalNetConfig
from transformers.models.focalnet.modeling_focalnet import FocalNetModulation


class AuthorsBase(nn.Module):
    """Members and formula of the authors' two classes; look-alikes override a step of it."""

    Conv = nn.Conv2d

    def __init__(self, dim, focal_window, focal_level, focal_factor, bias, proj_drop, postln):
        super().__init__()
        self.dim, self.focal_level = dim, focal_level
        self.f = nn.Linear(dim, 2 * dim + focal_level + 1, bias=bias)
        self.h = self.Conv(dim, dim, 1, bias=bias)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        kernels = [focal_window + focal_factor * level for level in range(focal_level)]
        self.focal_layers = nn.ModuleList(self.level(dim, k) for k in kernels)
        if postln:
            self.ln = nn.LayerNorm(dim)

    def level(self, dim, k):
        return nn.Sequential(self.Conv(dim, dim, k, padding=k // 2, groups=dim, bias=False), nn.GELU())

    def gate(self, gates):
        return gates

    def modulator_of(self, ctx, gates, normalize):
        gates, total = self.gate(gates), 0
        for level, layer in enumerate(self.focal_layers):
            ctx = layer(ctx)
            total = total + ctx * gates[:, level : level + 1]
        spatial = tuple(range(2, ctx.ndim))
        total = total + self.act(ctx.mean(spatial, keepdim=True)) * gates[:, self.focal_level :]
        return self.h(total / (self.focal_level + 1) if normalize else total)

    def finish(self, y, postln):
        y = y.movedim(1, -1).contiguous()
        return self.proj_drop(self.proj(self.ln(y) if postln else y))

    def run(self, x, postln, normalize):
        """The output, the gates and the modulator."""
        q, ctx, gates = self.f(x).movedim(-1, 1).contiguous().split((self.dim, self.dim, self.focal_level + 1), 1)
        modulator = self.modulator_of(ctx, gates, normalize)
        return self.finish(q * modulator, postln), gates, modulator


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


class DetrexLayer(AuthorsDetection):
    """Of detection, with the options of classification; `use_postln` is taken and not used."""

    def __init__(
        self,
        dim,
        proj_drop=0.0,
        focal_level=2,
        focal_window=7,
        focal_factor=2,
        use_postln=False,
        use_postln_in_modulation=False,
        normalize_modulator=False,
    ):
        super().__init__(dim, proj_drop, focal_level, focal_window, focal_factor, use_postln_in_modulation)
        del self.use_postln
        self.use_postln_in_modulation = use_postln_in_modulation
        self.normalize_modulator = normalize_modulator

    def forward(self, x):
        return self.run(x, self.use_postln_in_modulation, self.normalize_modulator)[0]


class ScaledLayer(AuthorsDetection):
    """Of SEEM, X-Decoder and OpenSeeD: `normalize_modulator` by another name."""

    def __init__(
        self, dim, focal_level, focal_window, use_postln_in_modulation=False, scaling_modulator=False, **options
    ):
        super().__init__(
            dim, focal_level=focal_level, focal_window=focal_window, use_postln=use_postln_in_modulation, **options
        )
        del self.use_postln
        self.use_postln_in_modulation, self.scaling_modulator = use_postln_in_modulation, scaling_modulator

    def forward(self, x):
        return self.run(x, self.use_postln_in_modulation, self.scaling_modulator)[0]


class VolumeLayer(AuthorsClassification):
    Conv = nn.Conv3d


class YoloLayer(AuthorsClassification):
    """Channels first; its post norm, if on, takes the width for the channels."""

    def __init__(self, dim, focal_window=3, focal_level=2, **options):
        super().__init__(dim, focal_window, focal_level, **options)
        self.f_linear = nn.Conv2d(*reversed(self.f.weight.shape), 1, bias=self.f.bias is not None)
        self.proj = nn.Conv2d(dim, dim, 1)
        del self.f

    def forward(self, x):
        q, ctx, gates = self.f_linear(x).contiguous().split((self.dim, self.dim, self.focal_level + 1), 1)
        y = (q * self.modulator_of(ctx, gates, self.normalize_modulator)).contiguous()
        return self.proj_drop(self.proj(self.ln(y) if self.use_postln_in_modulation else y))


class SpatioTemporalLayer(AuthorsClassification):
    """Frames (B*T, H, W, C). Time has f, h and levels of its own, whose convolutions are dense."""

    def __init__(self, dim, focal_window, focal_level, *, num_frames=8, bias=True, **options):
        super().__init__(dim, focal_window, focal_level, bias=bias, **options)
        self.num_frames = num_frames
        self.f_temporal = nn.Linear(dim, dim + focal_level + 1, bias=bias)
        self.h_temporal = nn.Conv1d(dim, dim, 1, bias=bias)
        kernels = [conv.kernel_size[0] for conv, _ in self.focal_layers]
        self.focal_layers_temporal = nn.ModuleList(
            nn.Sequential(nn.Conv1d(dim, dim, k, padding=k // 2, bias=False), nn.GELU()) for k in kernels
        )

    def forward(self, x):
        (frames, H, W, C), T, L = x.shape, self.num_frames, self.focal_level
        tokens = x.reshape(frames // T, T, H, W, C).permute(0, 2, 3, 1, 4).reshape(-1, T, C)
        ctx, self.gates_temporal = self.f_temporal(tokens).mT.contiguous().split((C, L + 1), 1)
        total = 0
        for level, layer in enumerate(self.focal_layers_temporal):
            ctx = layer(ctx)
            total = total + ctx * self.gates_temporal[:, level : level + 1]
        total = total + self.act(ctx.mean(2, keepdim=True)) * self.gates_temporal[:, L:]
        over_time = self.h_temporal(total / (L + 1) if self.normalize_modulator else total)
        over_time = over_time.reshape(frames // T, H, W, C, T).permute(0, 4, 3, 1, 2).reshape(frames, C, H, W)
        self.modulator_temporal = over_time

        q, ctx, self.gates = self.f(x).movedim(-1, 1).contiguous().split((C, C, L + 1), 1)
        self.modulator = self.modulator_of(ctx, self.gates, self.normalize_modulator)
        return self.finish(q * self.modulator * self.modulator_temporal, self.use_postln_in_modulation)


class QueryContextLayer(AuthorsDetection):
    """Channels first; q from x, context and gates from v. Only the gates are kept."""

    def __init__(self, dim, focal_window, focal_level, bias=True, **options):
        super().__init__(dim, focal_window=focal_window, focal_level=focal_level, **options)
        self.q = nn.Linear(dim, dim, bias=bias)
        self.f = nn.Linear(dim, dim + focal_level + 1, bias=bias)

    def forward(self, x, v=None):
        q = self.q(x.movedim(1, -1)).movedim(-1, 1)
        projected = self.f((x if v is None else v).movedim(1, -1)).movedim(-1, 1).contiguous()
        ctx, self.gates = projected.split((self.dim, self.focal_level + 1), 1)
        return self.finish(q * self.modulator_of(ctx, self.gates, False), self.use_postln).movedim(-1, 1)


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


def _detrex(C, levels, options):
    return DetrexLayer(C, focal_level=levels, focal_window=3, **options)


def _scaled(C, levels, options):
    options = {"scaling_modulator" if name == "normalize_modulator" else name: value for name, value in options.items()}
    return ScaledLayer(C, levels, 3, **options)


def _volume(C, levels, options):
    return VolumeLayer(C, 3, levels, **options)


def _yolo(C, levels, options):
    return YoloLayer(C, 3, levels, **options)


def _video(C, levels, options):
    return SpatioTemporalLayer(C, 3, levels, **{"num_frames": 3} | options)


def _query_context(C, levels, options):
    return QueryContextLayer(C, 3, levels, **options)


BUILD = {
    "authors": _authors,
    "detection": _detection,
    "detrex": _detrex,
    "scaled": _scaled,
    "timm": _timm,
    "transformers": _transformers,
    "volume": _volume,
    "yolo": _yolo,
    "video": _video,
    "query_context": _query_context,
}
FORMS = {
    "authors": "authors' classification",
    "detection": "authors' detection and segmentation",
    "detrex": "authors' classification",
    "scaled": "authors' classification",
    "timm": "timm",
    "transformers": "transformers",
    "volume": "3-D volumes",
    "yolo": "YOLO forks",
    "video": "Video-FocalNets' spatio-temporal",
    "query_context": "query and context apart",
}
POSTLN = {
    "authors": "use_postln_in_modulation",
    "detection": "use_postln",
    "detrex": "use_postln_in_modulation",
    "scaled": "use_postln_in_modulation",
    "timm": "use_post_norm",
    "transformers": "use_post_layernorm_in_modulation",
    "volume": "use_postln_in_modulation",
    "yolo": "use_postln_in_modulation",
    "video": "use_postln_in_modulation",
    "query_context": "use_postln",
}
CHANNELS_FIRST = ("timm", "yolo", "query_context")
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
    shapes = {"volume": (B, H, 4, W, C), "video": (3 * B, H, W, C)}
    return torch.randn(shapes.get(form, (B, C, H, W) if form in CHANNELS_FIRST else (B, H, W, C)), dtype=dtype)
