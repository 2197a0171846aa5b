"""Layers that share names, members or shapes with focal modulation and compute something else."""

import torch
from torch import nn

from integrations.foreign_layers import AuthorsClassification, AuthorsDetection, VolumeLayer


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


class KeepsItsSize(AuthorsDetection):
    """The formula, and numbers on the layer that somebody may read there."""

    def forward(self, x):
        self.height = x.shape[1]
        return super().forward(x)


class NoiseInTraining(AuthorsDetection):
    """The formula in evaluation, dropped gates in training."""

    def gate(self, gates):
        return nn.functional.dropout(gates, 0.1, self.training)


class FocalModulation(AuthorsDetection):
    """The authors' very name and members, but GELU's other approximation."""

    def forward(self, x):
        self.act.forward = lambda t: nn.functional.gelu(t, approximate="tanh")
        try:
            return super().forward(x)
        finally:
            del self.act.forward


class ParallelVolume(VolumeLayer):
    """Of video, channels first: every level sees the raw context, and so does the mean."""

    def forward(self, x):
        q, ctx, gates = self.f(x.movedim(1, -1)).movedim(-1, 1).split((self.dim, self.dim, self.focal_level + 1), 1)
        total = gates[:, self.focal_level :] * self.act(ctx.mean((2, 3, 4), keepdim=True))
        for level, layer in enumerate(self.focal_layers):
            total = total + layer(ctx) * gates[:, level : level + 1]
        return self.finish(q * self.h(total), self.use_postln_in_modulation).movedim(-1, 1)


class CausalSpeech(nn.Module):
    """Of sequences, causal: parallel levels, gates per head, a convolution for the mean."""

    def __init__(self, dim, heads=2, levels=2):
        super().__init__()
        self.heads, self.levels, self.dim = heads, levels, dim
        self.in_proj = nn.Linear(dim, 2 * dim + heads * (levels + 1))
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(dim, dim, 3 + 2 * level, groups=dim, bias=False), nn.GELU())
            for level in range(levels)
        )
        self.global_conv = nn.Conv1d(dim, dim, 7, groups=dim, bias=False)
        self.context_proj, self.out_proj = nn.Conv1d(dim, dim, 1), nn.Linear(dim, dim)
        self.act, self.dropout = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x):
        q, ctx, gates = self.in_proj(x).mT.split((self.dim, self.dim, self.heads * (self.levels + 1)), 1)
        gates = gates.unflatten(1, (self.heads, -1)).repeat_interleave(self.dim // self.heads, 1)
        total = 0
        for level, layer in enumerate([*self.focal_layers, nn.Sequential(self.global_conv, self.act)]):
            past = nn.functional.pad(ctx, (layer[0].kernel_size[0] - 1, 0), mode="replicate")
            total = total + layer(past) * gates[:, :, level]
        return self.dropout(self.out_proj((q * self.context_proj(total)).mT))


class FocalModulation1d(nn.Module):
    """Of genomes: query, value and gates from three Linears, kernels from a list, (B, C, N)."""

    def __init__(self, dim, focal_levels=(3, 5)):
        super().__init__()
        self.toquery, self.tovalue = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.togates, self.outprojection = nn.Linear(dim, len(focal_levels) + 1), nn.Linear(dim, dim)
        self.activation = nn.GELU()
        self.focal = nn.ModuleList(nn.Conv1d(dim, dim, k, groups=dim, padding=k // 2, bias=False) for k in focal_levels)

    def forward(self, x):
        x = x.mT
        q, ctx, gates = self.toquery(x), self.tovalue(x).mT, self.togates(x).mT
        total = 0
        for level, conv in enumerate(self.focal):
            ctx = self.activation(conv(ctx))
            total = total + ctx * gates[:, level : level + 1]
        total = total + self.activation(ctx.mean(2, keepdim=True)) * gates[:, -1:]
        return self.outprojection(q * total.mT).mT


class ScrambledSigmoid(AuthorsClassification):
    """Of change detection: channels first reinterpreted as last, sigmoid gates, another mixture."""

    def forward(self, x):
        B, C, H, W = x.shape
        q, ctx, gates = self.f(x.reshape(B, H, W, C)).movedim(-1, 1).split((C, C, self.focal_level + 1), 1)
        self.gates, total = gates.sigmoid(), 0
        for level, layer in enumerate(self.focal_layers):
            ctx = layer(ctx)
            total = total + ctx * self.gates[:, level : level + 1]
        last = self.gates[:, self.focal_level :]
        self.modulator = self.h((1 - last) * total + (1 + last) * self.act(ctx.mean((2, 3), keepdim=True)))
        return self.finish(q * self.modulator, self.use_postln_in_modulation).reshape(B, C, H, W)


class FocalNetModulation(nn.Module):
    """A retelling of the paper: batch norm in the levels, sigmoid gates, an activated modulator."""

    def __init__(self, dim, kernel_sizes=(3, 5)):
        super().__init__()
        self.proj_in, self.query_proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.gating, self.modulator_proj = nn.Conv2d(dim, len(kernel_sizes) + 1, 1), nn.Conv2d(dim, dim, 1)
        self.dw_convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False), nn.BatchNorm2d(dim), nn.GELU()
            )
            for k in kernel_sizes
        )
        self.act = nn.GELU()

    def forward(self, x):
        ctx, gates, total = self.proj_in(x), self.gating(x).sigmoid(), 0
        for level, layer in enumerate(self.dw_convs):
            ctx = layer(ctx)
            total = total + ctx * gates[:, level : level + 1]
        total = total + ctx.mean((2, 3), keepdim=True) * gates[:, -1:]
        return self.query_proj(x) * self.act(self.modulator_proj(total))


class FocalModulate(nn.Module):
    """Depthwise convolutions with biases, an activation that is passed in."""

    def __init__(self, dims, levels=2, nl=None):
        super().__init__()
        self.dims, self.levels, self.nl = dims, levels, nl or nn.GELU()
        self.proj, self.proj_out = nn.Linear(dims, 2 * dims + levels + 1), nn.Linear(dims, dims)
        self.proj_mod = nn.Conv2d(dims, dims, 1)
        self.hc = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dims, dims, 3 + 2 * level, padding=1 + level, groups=dims), self.nl)
            for level in range(levels)
        )

    def forward(self, x):
        q, ctx, gates = self.proj(x).movedim(-1, 1).split((self.dims, self.dims, self.levels + 1), 1)
        total = 0
        for level, layer in enumerate(self.hc):
            ctx = layer(ctx)
            total = total + ctx * gates[:, level : level + 1]
        total = total + self.nl(ctx.mean((2, 3), keepdim=True)) * gates[:, self.levels :]
        return self.proj_out((q * self.proj_mod(total)).movedim(1, -1))


class FocalModulateAsAuthors(AuthorsDetection):
    """The same biases, under the authors' names."""

    def level(self, dim, k):
        return nn.Sequential(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim), nn.GELU())


def layout(layer, C=12):
    """An input that the look-alike takes."""
    shapes = {ParallelVolume: (2, C, 4, 6, 5), CausalSpeech: (2, 9, C), FocalModulation1d: (2, C, 9)}
    shapes |= {ScrambledSigmoid: (2, C, 6, 5), FocalNetModulation: (2, C, 6, 5)}
    return torch.randn(shapes.get(type(layer), (2, 6, 5, C)))
