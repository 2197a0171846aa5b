"""torch.compile of whole accelerated models: one graph, and none anew for another batch size."""

import copy
import threading

import pytest
import torch
from models.foreign import huggingface_model, small_config, timm_model
from torch._dynamo.testing import CompileCounterWithBackend

import focalnet_kernels as fk

MODELS = {"timm": timm_model, "transformers": huggingface_model, "ours": lambda config: fk.FocalNet(**config)}
for_every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def accelerated(build, backend):
    model = build(small_config(img_size=32)).float()
    if not isinstance(model, fk.FocalNet):
        assert fk.accelerate(model, backend).replaced
    return model


def logits(output):
    return getattr(output, "logits", output)


def step(function, model, x):
    """The output and every parameter's gradient."""
    model.zero_grad()
    y = logits(function(x))
    y.square().mean().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(results, expected):
    for name, value in expected.items():
        size = value.abs().max()
        assert (results[name] - value).abs().max() <= 1e-4 * size + 1e-6, name


@for_every_model
@pytest.mark.parametrize("mark", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["marked", "automatic"])
def test_batch_sizes_share_a_graph(build, mark, cpu_kernels, seed):
    """Marked dynamic: one graph for all. By itself PyTorch first takes the size for a constant: two graphs."""
    share_a_graph(build, mark, "cpu", seed)


def test_batch_sizes_share_a_graph_on_every_backend(backend, seed):
    share_a_graph(MODELS["ours"], False, backend, seed)


def share_a_graph(build, mark, backend, seed):
    torch.manual_seed(seed)
    counter = CompileCounterWithBackend("aot_eager")
    with fk.use_backend(backend):
        model = accelerated(build, backend).train()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for B in (2, 3, 5):
            x = torch.randn(B, 3, 32, 32)
            expected = step(model, model, x)
            if mark:
                torch._dynamo.mark_dynamic(x, 0)
            assert_close(step(compiled, model, x), expected)
    assert counter.frame_count == (1 if mark else 2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor(backend, dynamic, seed):
    """Real code generation round the ops, forward and backward."""
    torch.manual_seed(seed)
    layer = fk.FocalModulation(8, 3, 2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    with fk.use_backend(backend):
        for B in (2, 3) if dynamic else (2,):
            x = torch.randn(B, 6, 5, 8)
            assert_close(step(compiled, layer, x), step(layer, layer, x))


@pytest.mark.slow
@for_every_model
def test_inductor_of_whole_models(build, backend, seed):
    torch.manual_seed(seed)
    with fk.use_backend(backend):
        model, x = accelerated(build, backend).train(), torch.randn(2, 3, 32, 32)
        assert_close(step(torch.compile(model, fullgraph=True), model, x), step(model, model, x))


def test_checkpointing_within(backend, seed):
    """Compiled layers under activation checkpointing: recomputed in the graph."""
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(8, 3, 2), torch.randn(2, 6, 5, 8)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    with fk.use_backend(backend):
        compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
        assert_close(step(compiled, layer, x), step(layer, layer, x))


def test_a_compiled_copy_is_independent(backend, seed):
    torch.manual_seed(seed)
    with fk.use_backend(backend), torch.no_grad():
        model = accelerated(timm_model, backend).eval()
        x = torch.randn(2, 3, 32, 32)
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected = compiled(x)
        for parameter in twin.parameters():
            parameter.zero_()
        torch.testing.assert_close(compiled(x), expected)


def kernels_of(graph):
    return [str(n.target) for n in graph.graph.nodes if str(n.target).startswith("focalnet_kernels.")]


@torch.no_grad()
def test_another_backend_recompiles(cpu_kernels):
    """Whoever changes it, and back without a third graph; a thread has its own."""
    layer, x, counter = fk.FocalModulation(8, 3, 2), torch.randn(2, 6, 5, 8), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)

    def kernels_after(call):
        call(x)
        return [bool(kernels_of(graph)) for graph in counter.graphs]

    with fk.use_backend("auto"):
        assert kernels_after(compiled) == [True]
        with fk.use_backend("reference"):
            assert kernels_after(compiled) == [True, False]
            with fk.use_backend("cpu"):
                assert kernels_after(compiled) == [True, False, True]
            assert kernels_after(compiled) == [True, False, True]
        assert kernels_after(compiled) == [True, False, True]
        fk.use_backend("reference")
        assert kernels_after(compiled) == [True, False, True]

        def in_its_own_block():
            with fk.use_backend("triton"):
                try:
                    compiled(x)
                except Exception as error:
                    said.append(str(error))

        said = []
        thread = threading.Thread(target=in_its_own_block)
        thread.start()
        thread.join()
        assert "backend 'triton' cannot run this call" in said[0]


@torch.no_grad()
def test_backends_chosen_within_a_graph(cpu_kernels):
    layer, x, counter = fk.FocalModulation(8, 3, 2), torch.randn(2, 6, 5, 8), CompileCounterWithBackend("eager")

    def twice(x):
        with fk.use_backend("reference"):
            y = layer(x)
        return y, layer(x)

    with fk.use_backend("cpu"):
        torch.compile(twice, fullgraph=True, backend=counter)(x)
        assert fk.dispatch.requested_backend() == "cpu"
    assert [len(kernels_of(graph)) for graph in counter.graphs] == [1]
