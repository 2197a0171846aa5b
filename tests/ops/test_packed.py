"""Weights kept packed from call to call: the same bits as without, and never those of a weight that has changed."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.utils import prune

import focalnet_kernels as fk
from focalnet_kernels.ops import _packed
from focalnet_kernels.testing import make_focal_branch_inputs, make_layer_inputs, make_mlp_branch_inputs
from ops.strategies import DTYPES, dtype_name

AROUND = {"norm": True, "gamma": True}
# few tokens, more, and more than few rows; channels that are whole panels of every instruction set, and others
SHAPES = [(1, 3, 3, 96), (2, 7, 9, 40), (3, 16, 16, 96), (2, 20, 17, 72)]


@pytest.fixture(autouse=True)
def nothing_kept(cpu_kernels):
    _packed._all.clear()
    with fk.use_backend("cpu"):
        yield
    _packed._all.clear()


def kept(model):
    """The copies that there are of a model's parameters."""
    found = [(p, _packed._all.get(id(p))) for p in model.parameters()]
    return [k.copy[1] for p, k in found if k is not None and k.copy and k.owner()._parameters.get(k.name) is p]


class Network(torch.nn.Module):
    """Two blocks of few rows, and two of more, in one model."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net = fk.FocalNet(
            patch_size=4, embed_dim=48, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3), num_classes=7
        ).to(dtype)

    def forward(self, x):
        return self.net(x.to(next(self.parameters()).dtype))


@pytest.fixture
def images(seed):
    torch.manual_seed(seed)
    return torch.randn(2, 3, 96, 96) + 0.3


@pytest.fixture
def network(seed):
    torch.manual_seed(seed + 1)
    return Network().eval()


def expected(model, x):
    """By a model of the same numbers that keeps nothing."""
    other = copy.deepcopy(model)
    assert not kept(other)
    return other(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits(isa, shape, dtype, seed):
    """For every op, instruction set and dtype, any strides of the weights."""
    C = shape[-1]
    options = {"dtype": dtype, "seed": seed}
    of_branch = make_focal_branch_inputs(shape, (3, 5), **options, **AROUND)
    calls = [
        (fk.mlp_branch, make_mlp_branch_inputs(shape, 4 * C - 8, post_norm=True, **options, **AROUND)),
        (fk.focal_branch, of_branch),
        (fk.focal_modulation, make_layer_inputs(shape, (3, 5), **options)),
        (fk.focal_branch, of_branch | {n: of_branch[n].t().contiguous().t() for n in ("f_weight", "h_weight")}),
    ]
    for op, inputs in calls:
        matrices = [n for n in inputs if n in ("f_weight", "h_weight", "proj_weight", "fc1_weight", "fc2_weight")]
        model = torch.nn.ParameterDict({n: torch.nn.Parameter(inputs[n]) for n in matrices})
        with torch.no_grad():
            without = op(**inputs | dict(model.items()))
            fk.keep_packed(model)
            with_copies = [op(**inputs | dict(model.items())) for _ in range(2)]
        assert len(kept(model)) == len(matrices)
        for found in with_copies:
            assert torch.equal(found, without), op.__name__


def test_copies_are_read_and_not_made_again(network, images):
    """A copy whose numbers were changed where no sample looks changes the result; the others stay."""
    fk.keep_packed(network)
    with torch.no_grad():
        before, first = network(images), kept(network)
        assert len(first) == 2 * 5
        assert torch.equal(network(images), before)
        assert all(a is b for a, b in zip(kept(network), first, strict=True))
        fc1 = network.net.layers[0].blocks[0].mlp.fc1.weight
        copied = _packed._all[id(fc1)].copy[1]
        assert copied.numel() == fc1.numel() * 4 + 8
        copied[: fc1.numel() * 4].view(torch.float32)[1] += 1.0
        assert not torch.equal(network(images), before)


def new_numbers(model):
    return {name: t + 0.1 * torch.randn_like(t) for name, t in model.state_dict().items()}


def in_place(model):
    for p in model.parameters():
        p.mul_(1.1)


def one_number(model):
    model.net.layers[0].blocks[0].mlp.fc1.weight[3, 5] += 1.0


def a_row_of_a_view(model):
    model.net.layers[1].blocks[0].modulation.h.weight[4] += 0.5


def load(model):
    model.load_state_dict(new_numbers(model))


def load_by_assigning(model):
    model.load_state_dict(new_numbers(model), assign=True)


def step(model):
    with torch.enable_grad():
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()


def fused_step(model):
    """Of one number, where no sample looks: no version counts it."""
    fc1 = model.net.layers[0].blocks[0].mlp.fc1.weight
    fc1.grad = torch.zeros_like(fc1)
    fc1.grad[0, 1] = 1.0
    version = fc1._version
    torch.optim.SGD([fc1], lr=1.0, fused=True).step()
    assert fc1._version == version
    model.zero_grad()


def to_16_bits(model):
    model.bfloat16()


def to_16_bits_and_back(model):
    model.half().float()


def swap_by_data(model):
    """As several implementations of moving averages do."""
    for p in model.parameters():
        p.data.copy_(p.data + 0.1 * torch.randn_like(p))


def swap_data(model):
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)


def average(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    in_place(model)
    averaged.update_parameters(model)
    for p, mean in zip(model.parameters(), averaged.parameters(), strict=True):
        p.detach().copy_(mean)


def by_numpy(model):
    for p in model.parameters():
        p.detach().numpy()[...] *= 0.9


def from_one_vector(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.1, model.parameters())


def in_inference_mode(model):
    with torch.inference_mode():
        in_place(model)


def another_parameter(model):
    mlp = model.net.layers[0].blocks[0].mlp
    mlp.fc1.weight = torch.nn.Parameter(mlp.fc1.weight * 1.1)


def other_strides(model):
    h = model.net.layers[0].blocks[0].modulation.h
    h.weight.data = (h.weight * 1.1).squeeze().t().contiguous().t().reshape_as(h.weight)


def swapped(model):
    """As PyTorch may convert modules from some release on: the parameters stay, what they hold is exchanged."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.bfloat16()
        model.load_state_dict(new_numbers(model))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def pruned(model):
    """By a mask, into a plain attribute; then for good, into another parameter."""
    fc1 = model.net.layers[0].blocks[0].mlp.fc1
    prune.l1_unstructured(fc1, "weight", amount=0.3)
    prune.remove(fc1, "weight")


CHANGES = [
    in_place, one_number, a_row_of_a_view, load, load_by_assigning, step, fused_step, to_16_bits, to_16_bits_and_back,
    swap_by_data, swap_data, average, by_numpy, from_one_vector, in_inference_mode, another_parameter, other_strides,
    swapped, pruned,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_counts_at_once(network, images, change):
    fk.keep_packed(network)
    with torch.no_grad():
        before = network(images)
        change(network)
        after = network(images)
        assert torch.equal(after, expected(network, images))
        assert not torch.equal(after, before)
        assert torch.equal(network(images), after)  # by copies that were made again


@pytest.mark.parametrize("change", [swap_by_data, by_numpy], ids=lambda change: change.__name__)
def test_what_pytorch_does_not_count_is_packed_again(network, images, change):
    fk.keep_packed(network)
    with torch.no_grad():
        network(images)
        first = kept(network)
        change(network)
        network(images)
        network(images)
        assert not any(a is b for a, b in zip(kept(network), first, strict=True))
        fc1 = network.net.layers[0].blocks[0].mlp.fc1.weight
        copied = _packed._all[id(fc1)].copy[1]
        assert torch.equal(copied, torch.ops.focalnet_kernels.pack_weight(fc1))


def test_an_unseen_change_counts_when_asked_for_again(network, images):
    """What the docstring says of a few numbers written through `.data`."""
    fk.keep_packed(network)
    with torch.no_grad():
        network(images)
        network.net.layers[0].blocks[0].mlp.fc1.weight.data[0, 1] += 1.0
        fk.keep_packed(network)
        assert torch.equal(network(images), expected(network, images))


@pytest.mark.parametrize("change", [in_place, load, swap_by_data], ids=lambda change: change.__name__)
def test_threads(network, images, change):
    """All meet a change at once."""
    fk.keep_packed(network)
    for _ in range(3):
        with torch.no_grad():
            change(network)
            right = expected(network, images)
        found, together = [], threading.Barrier(4, timeout=60)

        def turn(found=found, together=together):
            together.wait()
            with torch.no_grad(), fk.use_backend("cpu"):
                found.extend(network(images) for _ in range(3))

        threads = [threading.Thread(target=turn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert len(found) == 4 * 3
        assert all(torch.equal(y, right) for y in found)


FORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
import focalnet_kernels as fk
from ops.test_packed import Network, expected, in_place, kept, swap_by_data

torch.manual_seed({seed})
network, images = Network().eval(), torch.randn(2, 3, 96, 96)
fk.keep_packed(network)
with torch.no_grad(), fk.use_backend("cpu"):
    before = network(images)
    copies = kept(network)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        same = torch.equal(network(images), before) and all(a is b for a, b in zip(kept(network), copies))
        in_place(network)
        same = same and torch.equal(network(images), expected(network, images))
        swap_by_data(network)
        os._exit(0 if same and torch.equal(network(images), expected(network, images)) else 1)
    _, status = os.waitpid(child, 0)
    assert torch.equal(network(images), before)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_a_forked_process(seed):
    script = FORK.format(tests=os.path.dirname(os.path.dirname(__file__)), seed=seed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_copies_go_with_the_model_and_are_never_copied(images):
    network = Network().eval()
    size = len(pickle.dumps(network))
    fk.keep_packed(network)
    with torch.no_grad():
        network(images)
    assert kept(network)
    assert len(pickle.dumps(network)) == size
    assert not kept(copy.deepcopy(network))
    assert not kept(pickle.loads(pickle.dumps(network)))
    assert not any("packed" in name for name in network.state_dict())
    copies = [torch._C._WeakTensorRef(t) for t in kept(network)]
    del network
    gc.collect()
    assert not _packed._all
    assert all(ref.expired() for ref in copies)


def test_switched_off(network, images):
    fk.keep_packed(network)
    with torch.no_grad():
        before = network(images)
        fk.keep_packed(network.net.layers[0], False)
        assert len(kept(network)) == 5
        fk.keep_packed(network, False)
        assert not kept(network) and not _packed._all
        assert torch.equal(network(images), before)


def test_only_inference_packs(network, images):
    """A backward reads the weights as they are, and a frozen part of a model is no inference."""
    fk.keep_packed(network)
    network(images).sum().backward()
    assert not kept(network)
    network.requires_grad_(False)
    network(images)
    assert len(kept(network)) == 2 * 5


def test_what_is_traced_reads_the_weights(network, images):
    fk.keep_packed(network)
    block = network.net.layers[0].blocks[0]
    x = torch.randn(1, 6, 6, 48)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))
        in_place(block)
        torch.testing.assert_close(compiled(x), block(x))
        counter = torch.utils.flop_counter.FlopCounterMode(display=False)
        with counter:
            block(x)
        fk.keep_packed(network, False)
        without = torch.utils.flop_counter.FlopCounterMode(display=False)
        with without:
            block(x)
        assert counter.get_total_flops() == without.get_total_flops() > 0


def test_models_of_others(images):
    """Accelerated ones, with their 1x1 convolutions; under autocast, which makes new weights in every call, too."""
    timm = pytest.importorskip("timm")
    model = timm.models.focalnet.FocalNet(depths=(1, 1, 1, 1), embed_dim=24, num_classes=5).eval()
    fk.accelerate(model)
    with torch.no_grad():
        before = model(images)
        fk.keep_packed(model)
        assert torch.equal(model(images), before)
        assert len(kept(model)) == 4 * 5
        with torch.autocast("cpu", torch.bfloat16):
            under = model(images)
            fk.keep_packed(model, False)
            assert torch.equal(model(images), under)


def test_arguments():
    with pytest.raises(TypeError, match=r"keep_packed\(model\): expected an nn.Module, got dict"):
        fk.keep_packed({})
    with pytest.raises(RuntimeError, match="packed: expected one for each of 2 products"):
        inputs = make_mlp_branch_inputs((1, 4, 4, 16), 32)
        x, parameters = inputs["x"], [inputs["fc1_weight"], None, inputs["fc2_weight"], *[None] * 5]
        torch.ops.focalnet_kernels.mlp_branch_packed(x, parameters, [None], 1e-5, False)
