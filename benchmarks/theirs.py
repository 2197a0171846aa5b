"""Networks of other people in their own code, as they are and accelerated. Their repository has to be cloned.

    python benchmarks/theirs.py authors PATH    of microsoft/FocalNet: FocalNet-T LRF, 224 px
    python benchmarks/theirs.py openocr PATH    of Topdu/OpenOCR: UniRec's vision encoder, a page of 704 x 480 px
    python benchmarks/theirs.py focalcodec PATH of lucadellalib/focalcodec: encoder and decoder, 10 s of speech
    python benchmarks/theirs.py seem PATH       of UX-Decoder/Segment-Everything-Everywhere-All-At-Once, whose backbone
                                                X-Decoder has too: FocalNet-T as published, 512 px

Both forms take turns in one process; medians and quantiles of `ROUNDS`. Into results/<machine>/theirs.csv, whose rows
of the same network are replaced. The numbers have to agree before anything is timed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

import focalnet_kernels as fk
from focalnet_kernels.bench.machine import machine
from focalnet_kernels.bench.records import read, write_rows

RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def authors(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    sys.path.insert(0, str(path / "classification"))
    return importlib.import_module("focalnet").focalnet_tiny_lrf(drop_path_rate=0.0), (3, 224, 224)


def openocr(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """As openrec/modeling/unirec_modeling builds it."""
    sys.path.insert(0, str(path))
    encoder = importlib.import_module("openrec.modeling.encoders.focalsvtr").FocalSVTR
    options = {"depths": [2, 2, 9, 2], "sub_k": [[2, 2], [2, 2], [2, 2], [-1, -1]]}
    windows = {"focal_levels": [3, 3, 3, 3], "focal_windows": [3, 3, 3, 3]}
    return encoder(img_size=[704, 480], embed_dim=96, drop_path_rate=0.0, **options, **windows), (3, 704, 480)


def focalcodec(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """From WavLM's features, 50 a second, to codes and back. One file, for the package wants torchaudio too."""
    spec = importlib.util.spec_from_file_location("focalcodec_focalnet", path / "focalcodec" / "focalnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Codec(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = module.FocalEncoder(), module.FocalDecoder()

        def forward(self, x):
            return self.decoder(self.encoder(x)[0])

    return Codec(), (500, 1024)


def seem(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """Its backbone by itself, with configs/seem/focalt_unicl_lang_v1.yaml's options. Of detectron2, which it does not
    compute with, the names that it imports."""
    for name in ("detectron2", "detectron2.utils", "detectron2.utils.file_io", "detectron2.modeling"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["detectron2.utils.file_io"].PathManager = object
    base = {"BACKBONE_REGISTRY": None, "Backbone": nn.Module, "ShapeSpec": object}
    sys.modules["detectron2.modeling"].__dict__.update(base)
    package = types.ModuleType("seem_backbone")
    package.__path__ = [str(path / "modeling" / "vision" / "backbone")]
    sys.modules["seem_backbone"] = package
    options = {"focal_levels": [3, 3, 3, 3], "focal_windows": [3, 3, 3, 3], "use_conv_embed": True, "use_postln": True}
    backbone = importlib.import_module("seem_backbone.focal_dw").FocalNet(
        pretrain_img_size=224, drop_path_rate=0.0, scaling_modulator=True, use_layerscale=True, **options
    )

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def forward(self, x):
            return torch.cat([y.flatten() for y in self.backbone(x).values()])

    return Maps(), (3, 512, 512)


NETWORKS: dict[str, tuple[Callable, str, tuple[tuple[int, str], ...]]] = {
    "authors": (authors, "authors' FocalNet-T LRF", ((1, "forward"), (8, "forward"), (8, "forward+backward"))),
    "focalcodec": (focalcodec, "FocalCodec", ((1, "forward"), (4, "forward+backward"))),
    "openocr": (openocr, "UniRec's encoder", ((1, "forward"), (1, "forward+backward"))),
    "seem": (seem, "SEEM's FocalNet-T", ((1, "forward"), (1, "forward+backward"))),
}


def call(network: nn.Module, x: Tensor, mode: str) -> Tensor:
    """The output, and behind it the parameters' gradients."""
    with torch.set_grad_enabled(mode != "forward"):
        y = network(x)
        y = y[0] if isinstance(y, tuple) else y
    if mode == "forward":
        return y
    network.zero_grad(set_to_none=True)
    y.float().square().mean().backward()
    return torch.cat([y.detach().flatten(), *[p.grad.flatten() for p in network.parameters() if p.grad is not None]])


def rows(name: str, path: Path) -> list[dict[str, object]]:
    make, case, calls = NETWORKS[name]
    torch.manual_seed(0)
    theirs, shape = make(path)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        networks = {"theirs": copy.deepcopy(theirs).to(dtype)}
        networks["theirs accelerated"] = copy.deepcopy(networks["theirs"])
        fk.accelerate(networks["theirs accelerated"])
        for batch, mode in calls:
            x = torch.randn(batch, *shape, dtype=dtype)
            for network in networks.values():
                network.train(mode != "forward")
            expected, found = (call(network, x, mode).double() for network in networks.values())
            if (error := ((found - expected).norm() / expected.norm()).item()) > LIMITS[dtype]:
                raise click.ClickException(f"{case}, {dtype}: accelerated it differs by {error:.1e}")
            times: dict[str, list[float]] = {provider: [] for provider in networks}
            for _ in range(ROUNDS):
                for provider, network in networks.items():
                    start = time.perf_counter()
                    call(network, x, mode)
                    times[provider].append(1e3 * (time.perf_counter() - start))
            for provider, found_ms in times.items():
                ordered = sorted(found_ms)
                p20, p50, p80 = (ordered[i] for i in (ROUNDS // 5, ROUNDS // 2, ROUNDS - 1 - ROUNDS // 5))
                about = {"case": case, "shape": "x".join(map(str, x.shape)), "dtype": str(dtype).removeprefix("torch.")}
                quantiles = {"p20_ms": round(p20, 2), "p50_ms": round(p50, 2), "p80_ms": round(p80, 2)}
                rate = {"images_per_s": round(1e3 * batch / p50, 2)}
                lines.append(about | {"mode": mode, "provider": provider} | quantiles | rate)
    return lines


@click.command(help=__doc__)
@click.argument("network", type=click.Choice(sorted(NETWORKS)))
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(network: str, path: Path) -> None:
    about = machine("cpu")
    file = RESULTS / str(about["machine"]) / "theirs.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row | about for row in rows(network, path)]
    for row in lines:
        what = f"{row['case']:25}{row['shape']:15}{row['dtype']:9}{row['mode']:17}{row['provider']:19}"
        click.echo(f"{what}{row['p50_ms']:9.1f} ms")
    kept = [row for row in read(file) if row["case"] != NETWORKS[network][1]] if file.exists() else []
    write_rows(file, [*kept, *lines])


if __name__ == "__main__":
    main()
