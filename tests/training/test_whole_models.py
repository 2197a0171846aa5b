"""What training loops do to a model besides backward: averaging, saving, copying, insisting on determinism."""

import copy
import io

import pytest
import torch
from models.foreign import huggingface_model, small_config, timm_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import focalnet_kernels as fk

LIBRARIES = {"timm": timm_model, "transformers": huggingface_model, "ours": lambda config: fk.FocalNet(**config)}
for_every_library = pytest.mark.parametrize("build", LIBRARIES.values(), ids=LIBRARIES)


@pytest.fixture
def x(seed):
    torch.manual_seed(seed)
    return torch.randn(2, 3, 32, 32)


def training_model(build, backend):
    model = build(small_config(img_size=32)).float().train()
    if not isinstance(model, fk.FocalNet):
        fk.accelerate(model, backend)
    return model


def logits(model, x):
    output = model(x)
    return getattr(output, "logits", output)


def train(model, x, steps, after_step=lambda: None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        logits(model, x).square().mean().backward()
        optimizer.step()
        after_step()


@for_every_library
def test_moving_average(build, backend, x):
    """The averaged copy is made after a training forward, computes with its own parameters, and stays a copy."""
    with fk.use_backend(backend):
        model = training_model(build, backend)
        train(model, x, 1)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        snapshots = []

        def update():
            average.update_parameters(model)
            snapshots.append(copy.deepcopy(model.state_dict()))

        train(model, x, 3, update)
        expected = snapshots[0]  # the first update copies
        for state in snapshots[1:]:
            expected = {name: torch.lerp(value, state[name], 0.5) for name, value in expected.items()}
        for name, value in average.module.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        plain = build(small_config(img_size=32)).float().train()
        plain.load_state_dict(expected)
        with torch.no_grad():
            torch.testing.assert_close(logits(average, x), logits(plain, x), rtol=1e-4, atol=1e-4)
            assert not torch.equal(logits(average, x), logits(model, x))


@for_every_library
def test_a_saved_model_trains_on_the_same(build, backend, x):
    """torch.save of the whole model between two steps: bit for bit as without."""
    with fk.use_backend(backend):
        model = training_model(build, backend)
        train(model, x, 1)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        train(model, x, 2)
        train(loaded, x, 2)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.fixture
def deterministic():
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(True, warn_only=before)


@for_every_library
def test_deterministic_algorithms(build, backend, x, deterministic):
    """Where PyTorch raises for what could differ from run to run: trained twice, bit for bit the same."""
    with fk.use_backend(backend):
        model = training_model(build, backend)
        twin = copy.deepcopy(model)
        train(model, x, 2)
        train(twin, x, 2)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
