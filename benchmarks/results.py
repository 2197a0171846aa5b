"""Every committed figure of this class of machines: `make bench-results`.

Each command runs in a process of its own and writes benchmarks/results/<machine>/<name>.csv; what it says stands
beside it. Nothing else may run on the machine meanwhile. `--only layers --only peers` runs some, `--tiny` shows that
the way is clear and keeps nothing.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from focalnet_kernels._machine import device_class

RESULTS = Path(__file__).parent / "results"
BOTH = "--mode forward --mode forward+backward"
# compiling takes longer than measuring: of whole models timm's alone, as it is and accelerated
MODELS = (
    "--provider \"authors' form\" --provider timm --provider 'timm channels_last' --provider transformers"
    " --provider 'timm compiled*' --provider 'ours*'"
)
COMPILED = "--compile default --compile max-autotune"
# what people would use instead for inference; the model as it is and accelerated, and ours
ENGINES = (
    "--level model --mode forward --no-memory --no-roofline --rounds 15 --provider timm --provider 'timm frozen'"
    " --provider 'ONNX Runtime' --provider OpenVINO --provider 'timm accelerated cpu' --provider 'ours cpu'"
    " --provider transformers --provider 'transformers accelerated cpu'"
)
COMPILED_TOO = (
    "--compile default --provider 'timm compiled' --provider 'timm accelerated cpu compiled'"
    " --provider 'timm accelerated cpu frozen'"
)
PACKED = (
    "--level model --mode forward --no-memory --no-roofline --rounds 41 --provider 'timm accelerated cpu'"
    " --provider 'timm packed cpu'"
)
TRAINING = (
    "--level model --mode forward+backward --no-roofline --provider timm --provider 'timm accelerated cpu'"
    " --provider 'timm keep_hidden cpu' --provider 'ours cpu'"
)
LARGER = "--target focalnet_small_lrf --target focalnet_base_lrf --batch 4 --rounds 5"
# 800 x 1333 pixels, as detectors pad them
DETECTED = "--size 800x1344 --batch 1 --rounds 5"
ON_A_CPU = {
    "layers": f"{COMPILED} --provider '[!a]*' --provider \"authors' form\" --rounds 7",
    "ops": "--level op --rounds 7 --no-memory",
    "blocks": f"--level block --stage 1 --stage 3 --rounds 5 --no-memory {BOTH}",
    "detection": f"--target detection --batch 1 --dtype bfloat16 --rounds 3 --no-memory {BOTH}",
    "video": f"--target video --stage 1 --stage 2 --batch 1 --rounds 5 --no-memory {BOTH}",
    "model": f"--level model {COMPILED} --rounds 5 --no-memory {BOTH} {MODELS} --provider 'timm accelerated*'",
    "engines": f"{ENGINES} {COMPILED_TOO}",
    "engines_one_image": f"{ENGINES} {COMPILED_TOO} --batch 1",
    "engines_larger": f"{ENGINES} {LARGER}",
    "backbone": f"{ENGINES} {DETECTED}",
    "packed": PACKED,
    "packed_one_image": f"{PACKED} --batch 1",
    "training": f"{TRAINING} --compile default --rounds 7 --provider 'timm compiled' --provider transformers"
    " --provider 'transformers accelerated cpu'",
    "training_larger": f"{TRAINING} {LARGER}",
    "training_backbone": f"{TRAINING} {DETECTED}",
    "peers": f"--level peers --compile default --dtype float32 --rounds 5 --no-memory --no-roofline {BOTH}",
    "peers_larger": "--level peers --target focalnet_small_lrf --target focalnet_base_lrf --compile default --batch 4"
    f" --dtype float32 --rounds 3 --no-memory --no-roofline {BOTH}",
}
ON_A_GPU = {
    "layers": f"{COMPILED} --batch 128 --dtype bfloat16 --dtype float32 --rounds 20",
    "latency": "--batch 1 --dtype bfloat16 --dtype float16 --rounds 20",
    "ops": "--level op --compile default --batch 128 --rounds 20",
    "blocks": f"--level block --compile default --batch 128 --dtype bfloat16 --rounds 20 {BOTH}",
    "detection": "--target detection --compile default --batch 2 --dtype bfloat16 --dtype float16 --rounds 20",
    "video": "--target video --compile default --batch 8 --dtype bfloat16 --rounds 20",
    "model": f"--level model {COMPILED} --batch 128 --dtype bfloat16 --rounds 10 {BOTH} {MODELS}"
    " --provider 'timm accelerated*'",
    "peers": f"--level peers --target '*_lrf' --compile default --batch 128 --dtype bfloat16 --rounds 10 {BOTH}",
}
SCRIPTS = ("overhead", "shares")  # of their own, for a CPU
TINY = "--batch 1 --size 32 --rounds 3"


@click.command()
@click.option("--only", multiple=True, type=click.Choice(sorted({*ON_A_CPU, *ON_A_GPU, *SCRIPTS})))
@click.option("--tiny", is_flag=True)
def main(only, tiny) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(tempfile.mkdtemp()) if tiny else RESULTS / str(device_class(torch.device(device)))
    folder.mkdir(parents=True, exist_ok=True)
    commands = ON_A_CPU if device == "cpu" else ON_A_GPU
    for name in only or (*commands, *(SCRIPTS if device == "cpu" else ())):
        started = time.monotonic()
        if name in SCRIPTS:
            script = Path(__file__).parent / f"{name}.py"
            subprocess.run([sys.executable, script, *["--print"] * tiny], check=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            continue
        arguments = [*shlex.split(commands[name]), *(TINY.split() if tiny else ()), "--device", device]
        command = [sys.executable, "-m", "focalnet_kernels", "bench", *arguments, "--output", folder / f"{name}.csv"]
        print(f"{name}: {shlex.join(map(str, command[1:]))}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL if tiny else None)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
