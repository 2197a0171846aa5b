"""A small training run, on one process or on two: `torchrun --nproc-per-node 2 train.py ddp|fsdp OUT BACKEND...`."""

import copy
import os
import sys
import warnings

import timm.models.focalnet
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import focalnet_kernels as fk

CASES = {
    "ddp": ("plain", "gradients are views", "channels last", "checkpointed"),
    "fsdp": ("plain", "checkpointed", "bfloat16"),
}
CONTROL = "from here on a warning is expected"
STEPS = 2


def build() -> nn.Module:
    """timm's model of two stages, accelerated: the only line that a user adds."""
    torch.manual_seed(7)
    options = {"depths": (1, 1), "focal_levels": (2, 2), "focal_windows": (3, 3), "embed_dim": 8, "num_classes": 5}
    options |= {"drop_path_rate": 0.0, "use_post_norm_in_modulation": True, "layerscale_value": 0.5}
    model = timm.models.focalnet.FocalNet(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)  # no value that hides mistakes
    report = fk.accelerate(model)
    assert (len(report.replaced), report.kept) == (2, [])
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))


def blocks(model: nn.Module) -> list[nn.Module]:
    return [block for stage in model.layers for block in stage.blocks]


def ddp(model: nn.Module, case: str) -> nn.Module:
    model.set_grad_checkpointing(case == "checkpointed")
    if case == "channels last":
        model.to(memory_format=torch.channels_last)
    return DistributedDataParallel(model, gradient_as_bucket_view=case == "gradients are views")


def fsdp(model: nn.Module, case: str) -> nn.Module:
    if case == "checkpointed":
        for stage in model.layers:
            stage.blocks = nn.Sequential(*map(checkpoint_wrapper, stage.blocks))
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if case == "bfloat16" else MixedPrecisionPolicy()
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, on every process."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def name_of(parameter: str) -> str:
    """The model's own name for a parameter of the wrapped one."""
    return parameter.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def train(model: nn.Module, rank: int = 0, world: int = 1) -> dict:
    """Losses and gradients of every step, each process on its share of the batch, and the parameters at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(step).chunk(world)[rank]).float().square().mean()
        loss.backward()
        shown = loss.detach().clone()
        if world > 1:
            dist.all_reduce(shown)
        results[f"loss {step}"] = shown / world
        for name, parameter in model.named_parameters():
            results[f"gradient {step} {name_of(name)}"] = whole(parameter.grad)
        optimizer.step()
    return results | {f"parameter {name_of(name)}": whole(p) for name, p in model.named_parameters()}


class Restrided(torch.autograd.Function):
    """A 1x1 convolution's weight whose gradient has other strides along the axes of one element."""

    @staticmethod
    def forward(fctx, weight):
        return weight.clone()

    @staticmethod
    def backward(fctx, grad):
        return grad.contiguous(memory_format=torch.channels_last).as_strided(grad.shape, (grad.shape[1], 1, 4, 4))


class Control(nn.Conv2d):
    """A layer that DDP complains of."""

    def forward(self, x):
        return self._conv_forward(x, Restrided.apply(self.weight), self.bias)


def quiet_models() -> list[tuple[nn.Module, torch.Tensor]]:
    """Models without a weight of PyTorch's that makes DDP warn (timm's MLP has some), in every memory order."""
    order = {"memory_format": torch.channels_last}
    layers = [timm.models.focalnet.FocalModulation(8, 3, 2) for _ in range(4)]
    for layer in layers:
        fk.accelerate(layer)
    x = torch.randn(2, 8, 6, 5)
    ours = fk.FocalNet(depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3), embed_dim=8, num_classes=5)
    return [
        (layers[0], x),
        (layers[1], x.contiguous(**order)),
        (layers[2].to(**order), x),
        (layers[3].to(**order), x.contiguous(**order)),
        (ours, batch(0)),
        (copy.deepcopy(ours).to(**order), batch(0).contiguous(**order)),
    ]


def backward_under_ddp(model: nn.Module, x: torch.Tensor) -> None:
    model = DistributedDataParallel(model)
    for _ in range(2):  # the first one only fixes DDP's buckets
        model(x).sum().backward()


def main(way: str, out: str, backends: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("always")
    dist.init_process_group("gloo")
    if way == "ddp":
        with fk.use_backend(backends[-1]):
            for model, x in quiet_models():
                backward_under_ddp(model, x)
        dist.barrier()
        print(CONTROL, file=sys.stderr, flush=True)
        dist.barrier()
        backward_under_ddp(Control(4, 4, 1), torch.randn(2, 4, 3, 3))
    rank, world = dist.get_rank(), dist.get_world_size()
    wrap, results = {"ddp": ddp, "fsdp": fsdp}[way], {}
    for backend in backends:
        with fk.use_backend(backend):
            for case in CASES[way]:
                results[backend, case] = train(wrap(build(), case), rank, world)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()
    # FSDP's mesh keeps gloo's threads; one that drops a tensor while Python shuts down aborts (PyTorch PR 179291)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
