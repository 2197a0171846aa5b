"""Choosing a backend, and being told why."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import focalnet_kernels as fk
from focalnet_kernels import _calls, _libraries, dispatch
from focalnet_kernels._calls import forget
from focalnet_kernels._prepare import prepare_focal_branch, prepare_focal_modulation, prepare_mlp_branch
from focalnet_kernels._warnings import warn_once
from focalnet_kernels.dispatch import BACKENDS, explain_call, requested_backend, select
from focalnet_kernels.ops import _limits
from focalnet_kernels.ops._native import why_not_native
from focalnet_kernels.ops.triton import launch
from focalnet_kernels.testing import (
    make_context_inputs,
    make_focal_branch_inputs,
    make_layer_inputs,
    make_mlp_branch_inputs,
    make_modulate_inputs,
    map_tensors,
)


@pytest.fixture(autouse=True)
def restore_backend():
    with fk.use_backend(requested_backend()):
        yield


INPUTS = {
    "focal_context": (fk.focal_context, lambda **kw: make_context_inputs((1, 8, 5, 4), [3], **kw)),
    "modulate": (fk.modulate, lambda **kw: make_modulate_inputs((1, 8, 5, 4), **kw)),
    "focal_modulation": (fk.focal_modulation, lambda **kw: make_layer_inputs((1, 5, 4, 8), [3], **kw)),
}
for_every_op = pytest.mark.parametrize("op, make_inputs", INPUTS.values(), ids=INPUTS)


def test_use_backend_sets():
    fk.use_backend("reference")
    assert requested_backend() == "reference"
    fk.use_backend("auto")
    assert requested_backend() == "auto"


def test_use_backend_restores():
    fk.use_backend("auto")
    with fk.use_backend("reference"):
        assert requested_backend() == "reference"
        with fk.use_backend("cpu"):
            assert requested_backend() == "cpu"
        assert requested_backend() == "reference"
        with pytest.raises(KeyError), fk.use_backend("triton"):
            raise KeyError
        assert requested_backend() == "reference"
    assert requested_backend() == "auto"


def in_a_thread(function, *args):
    """What it returns there."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def test_chosen_within_a_block_until_its_end():
    with fk.use_backend("cpu"):
        fk.use_backend("reference")
        with fk.use_backend("cuda"):
            assert requested_backend() == "cuda"
        assert requested_backend() == "reference"
    assert requested_backend() == "auto"


def test_each_thread_has_blocks_of_its_own():
    """Entered and left in turns, many times: nobody sees another's choice, and nothing is left behind."""
    names, wrong, together = ("reference", "cpu", "triton", "cuda"), [], threading.Barrier(4, timeout=60)

    def work(name):
        together.wait()
        for _ in range(2000):
            with fk.use_backend(name):
                if requested_backend() != name:
                    wrong.append(name)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert requested_backend() == in_a_thread(requested_backend) == "auto"


def test_two_threads_between_choosing_and_entering():
    """As `with` does it, step by step: a thread may come in between the two."""
    choices = [in_a_thread(fk.use_backend, name) for name in ("cpu", "reference")]
    for choice in choices:
        choice.__enter__()
    for choice in choices:
        choice.__exit__(None, None, None)
    assert requested_backend() == "auto"


def test_a_thread_without_a_block_follows_the_last_one_entered():
    with fk.use_backend("cpu"):
        assert in_a_thread(requested_backend) == "cpu"
        outer, inner = fk.use_backend("reference").__enter__(), fk.use_backend("cuda").__enter__()
        assert in_a_thread(requested_backend) == "cuda"
        outer.__exit__(None, None, None)  # out of order: only its own choice goes
        assert requested_backend() == in_a_thread(requested_backend) == "cuda"
        inner.__exit__(None, None, None)
        assert requested_backend() == in_a_thread(requested_backend) == "cpu"


def test_a_block_left_in_another_thread():
    block = in_a_thread(lambda: fk.use_backend("cpu").__enter__())
    assert requested_backend() == "auto"  # this thread stands in a block of its own
    assert in_a_thread(requested_backend) == "cpu"
    block.__exit__(None, None, None)
    assert in_a_thread(requested_backend) == "auto"


def test_one_block_entered_again():
    block = fk.use_backend("cpu")
    with block, fk.use_backend("reference"):
        with block:
            assert requested_backend() == "cpu"
        assert requested_backend() == "reference"
    with block:
        assert requested_backend() == "cpu"
    assert requested_backend() == "auto"


@for_every_op
def test_the_backend_of_one_call(op, make_inputs):
    """It goes before the one in force, and changes nothing."""
    inputs = make_inputs(dtype=torch.float64)
    with fk.use_backend("cpu"):
        assert op(**inputs, backend="reference").dtype == torch.float64
        assert fk.explain(op, **inputs, backend="reference").backend == "reference"
        assert requested_backend() == "cpu"
    with pytest.raises(fk.BackendError, match="backend 'cuda' cannot run this call"):
        op(**inputs, backend="cuda")
    assert fk.explain(op, **inputs, backend="cuda").backend is None
    with pytest.raises(ValueError, match="^backend: unknown backend 'refrence', expected .* did you mean 'reference'"):
        op(**inputs, backend="refrence")


def test_the_backend_of_one_call_reaches_every_op():
    inputs = make_layer_inputs((1, 5, 4, 8), [3], dtype=torch.float64)
    cross = inputs | {"target": inputs["x"]}
    for call in (
        lambda **kw: fk.focal_modulation(**inputs, return_gates=True, **kw),
        lambda **kw: fk.cross_focal_modulation(**cross, **kw),
    ):
        with pytest.raises(fk.BackendError, match="focal_context: backend 'cpu' cannot run this call: .*float64"):
            call(backend="cpu")
        with fk.use_backend("cpu"):
            call(backend="reference")
    assert fk.explain(fk.cross_focal_modulation, **cross, backend="cpu").backend is None


@pytest.mark.parametrize(
    "name, close", [("refrence", "reference"), ("CPU", None), ("tritn", "triton"), ("gpu", None), (3, None)]
)
def test_unknown_names_are_refused(name, close):
    before = requested_backend()
    with pytest.raises(ValueError) as caught:
        fk.use_backend(name)
    message = str(caught.value)
    assert f"unknown backend {name!r}" in message
    assert "auto, reference, cpu, triton, cuda" in message
    assert close is None or f"did you mean {close!r}?" in message
    assert requested_backend() == before


ENVIRONMENT_PROBE = """
import json, os, sys
os.environ["FOCALNET_KERNELS_BACKEND"] = sys.argv[1]
import torch, focalnet_kernels as fk
from focalnet_kernels.dispatch import requested_backend
try:
    fk.focal_context(torch.randn(1, 4, 3), torch.randn(1, 1, 3), [])
    print(json.dumps(requested_backend()))
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("value", ["Reference", "", "refrence"])
def test_environment_variable(value):
    environment = {k: v for k, v in os.environ.items() if k != dispatch.ENVIRONMENT}
    command = [sys.executable, "-c", ENVIRONMENT_PROBE, value]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    if value != "refrence":
        assert said == (value.lower() or "auto")
    else:
        assert "environment variable FOCALNET_KERNELS_BACKEND: unknown backend 'refrence'" in said
        assert "did you mean 'reference'?" in said


ISA_PROBE = """
import torch, focalnet_kernels as fk
from focalnet_kernels import _libraries
try:
    fk.FocalModulation(8, 3, 2)(torch.randn(1, 5, 4, 8))
    print(_libraries.cpu_isa())
except ValueError as error:
    print(error)
"""
ISA = "FOCALNET_KERNELS_CPU_ISA"


@pytest.mark.parametrize("value, said", [("", ""), ("Portable", "portable"), ("sse9", f"environment variable {ISA}: ")])
def test_environment_variable_of_the_instruction_set(cpu_kernels, value, said):
    command = [sys.executable, "-c", ISA_PROBE]
    done = subprocess.run(command, env=os.environ | {ISA: value}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said if value == "Portable" else done.stdout.startswith(said)
    assert value != "sse9" or "expected one of this machine's " in done.stdout and "portable, got 'sse9'" in done.stdout


@pytest.mark.parametrize("command, name", [("info", dispatch.ENVIRONMENT), ("check", ISA), ("bench", ISA)])
def test_every_command_tells_of_a_wrong_environment(cpu_kernels, name, command):
    command = [sys.executable, "-m", "focalnet_kernels", command]
    done = subprocess.run(command, env=os.environ | {name: "sse9"}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: environment variable {name}: ")


@for_every_op
@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_named_backend_that_cannot_run_raises(op, make_inputs, name):
    inputs = make_inputs(dtype=torch.float64)
    with fk.use_backend(name), pytest.raises(fk.BackendError) as caught:
        op(**inputs)
    assert str(caught.value).startswith(f"{op.__name__}: backend {name!r} cannot run this call: ")
    if name == "cpu":
        assert "float64" in str(caught.value)
    assert fk.explain(op, **inputs).backend == "reference"


@for_every_op
def test_auto_runs_everything(op, make_inputs):
    with fk.use_backend("auto"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert op(**make_inputs(dtype=dtype)).dtype == dtype


@for_every_op
def test_auto_chooses_the_same_in_torch_compile(op, make_inputs):
    inputs = make_inputs()
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    with fk.use_backend("auto"), torch.inference_mode():
        torch.compile(op, fullgraph=True, backend=counter)(**inputs)
        chosen = fk.explain(op, **inputs).backend
    raw_ops = [n for n in counter.graphs[0].graph.nodes if str(n.target).startswith("focalnet_kernels.")]
    assert bool(raw_ops) == (chosen != "reference")


@for_every_op
@pytest.mark.parametrize("by_name", [False, True], ids=["function", "name"])
def test_explain(op, make_inputs, by_name):
    with fk.use_backend("auto"):
        found = fk.explain(op.__name__ if by_name else op, **make_inputs(dtype=torch.float64))
    assert found.op == op.__name__
    assert found.backend == "reference"
    assert set(found.reasons) == {"cpu", "triton", "cuda"}
    assert "float64" in found.reasons["cpu"]
    assert str(found).startswith(f"{op.__name__}: runs on 'reference'\n")
    assert all(f"not {name!r}: {reason}" in str(found) for name, reason in found.reasons.items())


@for_every_op
def test_explain_tells_of_the_cpu_kernels(cpu_kernels, op, make_inputs):
    with fk.use_backend("auto"):
        found = fk.explain(op, **make_inputs())
    assert found.backend == "cpu"
    assert found.reasons["reference"] == "'cpu' is preferred"


@for_every_op
def test_explain_names_the_users_choice(op, make_inputs):
    with fk.use_backend("reference"):
        found = fk.explain(op, **make_inputs())
    assert found.backend == "reference"
    with fk.use_backend("cuda"):
        found = fk.explain(op, **make_inputs(dtype=torch.float64))
    assert found.backend is None
    assert found.reasons["reference"] == "backend 'cuda' was asked for"
    assert "cannot run" in str(found)


@pytest.mark.parametrize("module", [fk.FocalModulation1d, fk.FocalModulation, fk.FocalModulation3d])
def test_explain_modules(module):
    layer = module(8, 3, 2, use_postln_in_modulation=True).double()
    x = torch.randn(1, *(4,) * layer.ndim, 8, dtype=torch.float64)
    found = fk.explain(layer, x)
    assert found.op == "focal_modulation" and found.backend == "reference"


@pytest.mark.parametrize("module", [fk.FocalModulation, fk.CrossFocalModulation])
def test_explain_modules_that_run_part_by_part(module):
    layer, x = module(8, 3, 2), torch.randn(1, 4, 4, 8)
    layer.proj = torch.nn.Identity()
    found = fk.explain(layer, *[x] * (1 + (module is fk.CrossFocalModulation)))
    assert found.backend == "reference"
    assert all(r.startswith("the layer runs part by part: proj is a Identity") for r in found.reasons.values())


@pytest.mark.parametrize(
    "op, given, error",
    [
        (fk.FocalModulation(8, 3, 1), (), r"FocalModulation(x, return_gates\) is called with: missing .*'x'"),
        (fk.CrossFocalModulation(8, 3, 1), (torch.zeros(1, 4, 4, 8),), "CrossFocalModulation(x, .*'target'"),
        ("focal_modulation", (torch.zeros(1, 4, 4, 8),), "focal_modulation(x, f_weight, .*'f_weight'"),
        (fk.modulate, (), r"modulate(q, ctx_all, weight, bias, backend\) .*'q'"),
        ("focal_context", (1, 2, 3, 4), "focal_context(ctx, gates, weights, .*too many positional arguments"),
    ],
)
def test_explain_names_what_the_call_lacks(op, given, error):
    """In public names, as the call itself would."""
    pattern = r"^explain\(op, ...\): expected what " + error.replace("(", r"\(", 1)
    with pytest.raises(TypeError, match=pattern) as caught:
        fk.explain(op, *given)
    assert "_prepare" not in str(caught.value) and "functional_arguments" not in str(caught.value)


def test_explain_takes_a_call_by_name():
    layer, x = fk.FocalModulation(8, 3, 1), torch.zeros(1, 4, 4, 8)
    assert fk.explain(layer, x=x) == fk.explain(layer, x) == fk.explain(layer, x, return_gates=True)


@pytest.mark.parametrize("op", ["focal", torch.relu, torch.nn.Linear(2, 2), None, 3])
def test_explain_refuses_what_it_does_not_know(op):
    with pytest.raises(
        TypeError, match=r"^explain\(op\): expected focal_context, modulate, focal_modulation, focal_branch"
    ):
        fk.explain(op, torch.zeros(1))


def test_warnings_come_once(recwarn):
    warn_once("something of this test alone")
    warn_once("something of this test alone")
    assert [str(w.message) for w in recwarn] == ["something of this test alone"]


@pytest.mark.parametrize(
    "backend, C, postln, fast",
    [("cuda", 96, False, True), ("cuda", 96, True, False), ("cuda", 33, False, False), ("triton", 96, False, False)],
)
def test_what_trains_slower_than_eager_is_left_to_it(backend, C, postln, fast):
    """On a GPU, where nothing was measured and nobody named a backend; inference is not."""
    with FakeTensorMode():
        inputs = make_layer_inputs((2, 8, 8, C), [3, 5], postln=postln, seed=0)
        call, _ = prepare_focal_modulation(**map_tensors(lambda t: t.to("cuda"), inputs))

    def reason(training, name):
        return explain_call(call, training, name).reasons.get(backend, "")

    slower = "its backward was slower than eager PyTorch on an H100: name it to train with it"
    for name in ("auto", backend):
        assert reason(False, name) != slower
    assert (reason(True, "auto") == slower) != fast
    assert reason(True, backend) != slower


ON_A_GPU = [  # channels, dtype, whether in autocast, who runs the MLP branch in inference
    (96, torch.bfloat16, False, "triton"),
    (128, torch.float16, True, "triton"),
    (192, torch.bfloat16, False, "cuda"),
    (192, torch.bfloat16, True, "cuda"),
    (96, torch.float32, False, "cuda"),
]


@pytest.mark.parametrize("C, dtype, in_autocast, backend", ON_A_GPU)
def test_branches_on_a_gpu(C, dtype, in_autocast, backend, monkeypatch):
    """Where nobody names a backend: what was measured faster than eager on an H100 and an H200."""
    monkeypatch.setattr(launch, "MISSING", None)
    monkeypatch.setattr(_libraries, "cuda_missing", None)
    with FakeTensorMode():
        residual = torch.float32 if in_autocast else dtype
        inputs = make_mlp_branch_inputs((2, 8, 8, C), 4 * C, dtype=dtype, residual_dtype=residual, seed=0)
        call, _ = prepare_mlp_branch(**without_options(map_tensors(lambda t: t.to("cuda"), inputs)))
        inputs = make_focal_branch_inputs((2, 8, 8, C), [3, 5], dtype=dtype, residual_dtype=residual, seed=0)
        focal, _ = prepare_focal_branch(**without_options(map_tensors(lambda t: t.to("cuda"), inputs)))
    assert explain_call(call, False).backend == backend
    assert explain_call(call, True).backend == ("triton" if C <= 128 and dtype != torch.float32 else "reference")
    assert explain_call(focal, True).backend == explain_call(focal, False).backend == "cuda"
    assert explain_call(call, True, "triton").backend == "triton"


def without_options(inputs):
    return {name: value for name, value in inputs.items() if name != "post_norm"}


def test_candidates_are_listed_once(monkeypatch):
    """Whoever asks, to run or to explain: the same backends in the same order, for the same reasons."""
    call, _ = prepare_focal_modulation(**make_layer_inputs((1, 5, 4, 8), [3]))
    for name in BACKENDS:
        found = explain_call(call, False, name)
        if found.backend is None:
            with pytest.raises(fk.BackendError) as caught:
                select(call, False, name)
            assert str(caught.value).endswith(found.reasons[name])
        else:
            assert select(call, False, name).backend == found.backend


def test_choices_are_looked_up(cpu_kernels, monkeypatch):
    """The second call of a kind asks nobody, and one of another kind does."""
    asked = []
    monkeypatch.setattr(
        dispatch, "_candidates", lambda *args, real=dispatch._candidates: asked.append(args) or real(*args)
    )
    inputs = make_modulate_inputs((1, 8, 5, 3))
    forget()
    for _ in range(3):
        fk.modulate(**inputs)
    assert len(asked) == 1
    fk.modulate(**inputs, backend="reference")
    inputs["q"].requires_grad_()
    fk.modulate(**inputs)
    fk.modulate(**make_modulate_inputs((1, 8, 5, 4)))
    assert len(asked) == 4
    for _ in range(2):  # a mode of PyTorch's is asked for in every call
        torch.func.grad(lambda q: fk.modulate(**{**inputs, "q": q}).sum())(inputs["q"].detach())
    assert len(asked) == 6
    fk.modulate(**inputs)
    assert len(asked) == 6


def test_what_is_remembered_is_bounded():
    for size in range(1, 1200):
        fk.explain(fk.modulate, **make_modulate_inputs((1, 1, size), device="meta"))
    sizes = [table.cache_info() for table in _calls._tables]
    assert all(info.currsize <= info.maxsize == 1024 for info in sizes)
    assert max(info.currsize for info in sizes) == 1024


def test_old_gpus_are_left_to_the_reference(monkeypatch):
    """Before compute capability 8.0 tensor cores do not know bfloat16, and Triton's code spills."""
    call = _calls.Call("focal_context", torch.device("cuda"), torch.float16, 8, ((3, 3),), (1, 4, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "MISSING", None)
    monkeypatch.setattr(_libraries, "cuda_missing", None)
    monkeypatch.setattr(_limits, "_capability", lambda device: (7, 5))
    for reason in (launch.why_not_triton(call), why_not_native("cuda", call)):
        assert reason == "it needs compute capability 8.0, cuda has 7.5"
    monkeypatch.setattr(_limits, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.ops.focalnet_kernels, "cuda_build", lambda: "8.0, CUDA 13.0", raising=False)
    assert launch.why_not_triton(call) is why_not_native("cuda", call) is None


@pytest.mark.parametrize(
    "build, runs, does_not",
    [
        ("8.0 9.0 10.0 12.0, CUDA 13.0", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1)], [(11, 0), (13, 0)]),
        ("8.6 9.0+PTX, CUDA 12.6", [(8, 9), (9, 0), (10, 0), (12, 0)], [(8, 0)]),
        ("9.0a 10.0f, CUDA 13.0", [(9, 0), (10, 0), (10, 3)], [(8, 0), (9, 1), (12, 0)]),
        ("Hopper, CUDA 13.0", [(8, 0), (9, 0)], []),  # what cannot be told is tried
    ],
)
def test_gpus_without_code_are_left_to_other_backends(build, runs, does_not, monkeypatch):
    call = _calls.Call("focal_context", torch.device("cuda"), torch.float16, 8, ((3, 3),), (1, 4, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_libraries, "cuda_missing", None)
    monkeypatch.setattr(torch.ops.focalnet_kernels, "cuda_build", lambda: build, raising=False)
    for gpu in runs + does_not:
        monkeypatch.setattr(_limits, "_capability", lambda device, gpu=gpu: gpu)
        here = ".".join(map(str, gpu))
        said = f"it was built for {build}; cuda has compute capability {here}: build with TORCH_CUDA_ARCH_LIST={here}"
        assert why_not_native("cuda", call) == (said if gpu in does_not else None)
