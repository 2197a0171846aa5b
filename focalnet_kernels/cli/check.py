"""`check`: whether the kernels are right on this machine, or what they compile to for others."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch.utils._pytree import tree_leaves

from ..bench.layers import DETECTION, PublishedLayer, published_layers
from ..dispatch import use_backend
from ..functional import explain, focal_modulation
from ..models.variants import VARIANTS
from ..ops.triton.launch import Launch, recorded_launches
from ..testing import assert_op_accurate, make_layer_inputs
from . import options
from .info import info

DTYPES = ("float32", "bfloat16", "float16")


def _check_targets(context: click.Context, parameter: click.Parameter, names: str | None) -> list[str]:
    """GPUs' names. A wrong one is said once, and not for every kernel."""
    if names is None:
        return []
    if importlib.util.find_spec("triton") is None:
        raise click.BadParameter("the package triton is not installed")
    from ..ops.triton.resources import why_not_target

    targets = names.split(",")
    for target in targets:
        if reason := why_not_target(target):
            raise click.BadParameter(reason)
    return targets


@click.command()
@click.option("--variant", "variants", multiple=True, type=click.Choice(sorted(VARIANTS)), help="Default: all.")
@click.option("--batch", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES, show_default=True, type=click.Choice(DTYPES))
@options.device
@click.option(
    "--compile",
    "targets",
    callback=_check_targets,
    help="Compile the Triton kernels instead, for sm_80,sm_90,gfx942 and the like.",
)
@click.option(
    "--count",
    "counted",
    type=click.Choice(["sm_80", "sm_90"]),
    help="Count what the GPU kernels issue instead, without a GPU. Half an hour; needs a checkout and nvcc.",
)
@click.pass_context
def check(context, variants, batch, dtypes, device, targets, counted) -> None:
    """Hold every backend that can run here to the error rule, on the layers of the published variants.

    Versions and backends come first, then what is right and what is not; the exit code is 1 if anything is not.

    With --compile nothing is run and no GPU is needed: every kernel is compiled for these layers, and its registers,
    spilled bytes (stack), shared memory and tensor-core instructions are shown. Spills are failures.

    With --count they are run too, as compiled, on a CPU: instructions by kind, memory traffic, and the least time that
    each part of an H100 takes for them, into benchmarks/results/counted/.
    """
    if counted:
        given = [p.opts[0] for p in context.command.params if p.name != "counted" and _given(context, p)]
        if given:
            raise click.UsageError(f"--count takes no {', '.join(given)}")
        context.exit(_count(counted))
    layers = dict.fromkeys(layer for name in variants or VARIANTS for layer in published_layers(name))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a table in a file shall keep its columns
    if targets:
        failures = _compile(console, layers, [getattr(torch, d) for d in dtypes], targets)
    else:
        context.invoke(info)
        failures = _run(console, layers, batch, [getattr(torch, d) for d in dtypes], device)
    if failures:
        raise click.ClickException(f"{failures} failed")


def _given(context: click.Context, parameter: click.Parameter) -> bool:
    return context.get_parameter_source(parameter.name) == click.core.ParameterSource.COMMANDLINE


def _count(target: str) -> int:
    """By a script beside the machine that runs PTX, which is part of the tests."""
    script = Path(__file__).parents[2] / "benchmarks/count.py"
    if not script.exists():
        raise click.ClickException(f"--count needs a checkout of the source: there is no {script}")
    return subprocess.run([sys.executable, script, target]).returncode


def _run(console, layers, batch, dtypes, device) -> int:
    table = Table("layer", "dtype", *(backends := ("cpu", "triton", "cuda")), title=f"the error rule on {device}")
    absent: dict[str, None] = {}
    failures = 0
    for layer, dtype in track(list(itertools.product(layers, dtypes)), console=console, transient=True):
        shape = (batch, *layer.spatial, layer.dim)
        options = {"postln": layer.use_postln_in_modulation, "dtype": dtype, "device": device}
        inputs = make_layer_inputs(shape, layer.kernels, **options) | {"normalize": layer.normalize_modulator}
        cells = []
        for backend in backends:
            with use_backend(backend):
                found = explain(focal_modulation, **inputs)
            if found.backend != backend:
                absent.setdefault(f"{backend}: {found.reasons[backend]}")
                cells.append("-")
                continue
            try:
                assert_op_accurate(focal_modulation, inputs, backend, torch.randn(shape, device=device).to(dtype))
                cells.append("right")
            except Exception as error:  # a kernel that does not even run is what users have to hear of
                failures += 1
                cells.append(Text(str(error) or repr(error), style="red"))
        table.add_row(_name(layer, shape[0]), str(dtype).removeprefix("torch."), *cells)
    console.print(table)
    for reason in absent:
        console.print(f"not run: {reason}", highlight=False, soft_wrap=True)
    return failures


def _compile(console, layers, dtypes, targets) -> int:
    """Every different kernel of these layers and of the detection maps, in parallel."""
    launches: dict[str, tuple[str, Launch]] = {}
    for layer, dtype, batch in itertools.product([*layers, *DETECTION], dtypes, (1, 128)):
        parts = layer_launches(layer, batch, dtype), layer_launches(layer, batch, dtype, training=False)
        for launch in itertools.chain(*parts, op_launches(layer, batch, dtype), branch_launches(layer, batch, dtype)):
            launches.setdefault(_identity(launch), (_name(layer, batch), launch))
    table = Table(
        "kernel", "first needed by", "dtype", "target", "registers", "stack", "shared", "instructions", "tensor core"
    )
    failures = 0
    work = [(name, launch, target) for name, launch in launches.values() for target in targets]
    with ProcessPoolExecutor() as pool:
        sent = [(k.fn.__module__, k.__name__, args, constants, target) for _, (k, _, args, constants), target in work]
        results = pool.map(_resources, sent)
        for (name, launch, target), found in track(zip(work, results, strict=True), total=len(work), console=console):
            dtype = next(a.dtype for a in tree_leaves(launch.args) if isinstance(a, torch.Tensor))  # in views too
            cells = [launch.kernel.__name__.removesuffix("_kernel"), name, str(dtype).removeprefix("torch."), target]
            if isinstance(found, str):
                failures += 1
                table.add_row(*cells, f"[red]{found}")
                console.print(*cells, f"[red]{found}")  # long before the table
                continue
            if found.stack:
                failures += 1
                console.print(*cells, f"[red]{found.registers} registers, {found.stack} bytes of stack")
            figures = (found.registers, found.stack, found.shared, found.instructions, found.tensor_core)
            table.add_row(*cells, *("" if f is None else str(f) for f in figures), style="red" if found.stack else "")
    console.print(table)
    console.print(f"{len(launches)} kernels, {len(targets)} targets, {failures} failures")
    return failures


def layer_launches(layer: PublishedLayer, batch: int, dtype: torch.dtype, training: bool = True) -> list[Launch]:
    """What the forward and the backward of a layer's training step launch through Triton, or its inference."""
    from ..ops.focal_modulation.triton_launch import focal_modulation_bwd_impl, focal_modulation_fwd_impl

    empty = partial(torch.empty, dtype=dtype, device="meta")
    x, parameters = empty(batch, *layer.spatial, layer.dim), layer.parameters(empty)
    normalize = layer.normalize_modulator
    with recorded_launches() as launches:
        y, saved = focal_modulation_fwd_impl(x, parameters, normalize, 1e-5, training)
        if training:
            focal_modulation_bwd_impl(y, x, parameters, *saved, normalize, 1e-5, -1)
    return launches


def op_launches(layer: PublishedLayer, batch: int, dtype: torch.dtype) -> list[Launch]:
    """The same of the ops called by themselves, on contiguous tensors of a layer's shapes."""
    from ..ops.focal_context.triton_launch import focal_context_bwd_impl, focal_context_fwd_impl
    from ..ops.modulate.triton_launch import modulate_fwd_impl

    empty = partial(torch.empty, dtype=dtype, device="meta")
    C, normalize = layer.dim, layer.normalize_modulator
    ctx = empty(batch, C, *layer.spatial)
    inputs = ctx, empty(batch, layer.focal_level + 1, *layer.spatial), [empty(C, 1, k, k) for k in layer.kernels]
    with recorded_launches() as launches:
        ctx_all, mean = focal_context_fwd_impl(*inputs, normalize)
        focal_context_bwd_impl(ctx_all, *inputs, mean, normalize, -1)
        modulate_fwd_impl(ctx, ctx_all, empty(C, C), empty(C))
    return launches


def branch_launches(layer: PublishedLayer, batch: int, dtype: torch.dtype) -> list[Launch]:
    """The same of a block's MLP branch: in training and inference, its norm before or after, and in autocast; and of
    the sum before it, normalized where it is made."""
    from ..ops.mlp_branch.parameters import MlpBranchParameters
    from ..ops.mlp_branch.triton_launch import mlp_branch_bwd_impl, mlp_branch_fwd_impl
    from ..ops.residual import Residual
    from ..ops.token_rows import Norm
    from ..ops.triton.token_rows import TRITON

    C, all_of_them = layer.dim, (1 << len(MlpBranchParameters.names)) - 1  # but drop_path's, the last
    with recorded_launches() as launches:
        for post, residual_dtype in itertools.product((False, True), {dtype, torch.float32}):
            body, around = (partial(torch.empty, dtype=d, device="meta") for d in (dtype, residual_dtype))
            x = around(batch, *layer.spatial, C)
            parameters = [body(4 * C, C), body(4 * C), body(C, 4 * C), body(C), around(C), around(C)]
            parameters += [around(C) if post else None, around(batch)]
            y, saved = mlp_branch_fwd_impl(x, parameters, 1e-5, post, False, True)
            mlp_branch_bwd_impl(y, x, parameters, saved, 1e-5, post, False, all_of_them)
            mlp_branch_fwd_impl(x, parameters, 1e-5, post, False, False)
            rows, u, norm = x.flatten(0, -2), body(x.numel() // C, C), Norm(around(C), around(C), 1e-5, dtype)
            TRITON.residual_fwd(rows, u, Residual(None, None, None, None), 1e-5, False, torch.empty_like(rows), norm)
    return launches


def _identity(launch: Launch) -> str:
    from ..ops.triton.resources import specialization

    return repr((launch.kernel.__name__, specialization(launch)))


def _resources(work):
    """In a process of its own, where the kernel goes by name: Triton's functions cannot be sent."""
    from ..ops.triton.resources import compile_launch

    module, name, args, constants, target = work
    try:
        return compile_launch(Launch(getattr(importlib.import_module(module), name), 0, args, constants), target)
    except Exception as error:
        return str(error).strip().splitlines()[-1]


def _name(layer: PublishedLayer, batch: int) -> str:
    shape = "x".join(map(str, (batch, *layer.spatial, layer.dim)))
    return f"{shape} k={','.join(map(str, layer.kernels))}{' postln' if layer.use_postln_in_modulation else ''}"
