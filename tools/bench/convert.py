"""Convert a model of a preset's full size from fairseq2 to Transformers and back: seconds, memory, and every bit.

    python tools/bench/convert.py --preset xlsr_1b

Writes a random model under the names of fairseq2, and converts it with four commands: fairseq2 → checkpoint → Hugging
Face → checkpoint → fairseq2. Each is first killed (SIGKILL) when half of its output is written, and then repeated; the
repetition is measured. The last file must have the same tensors as the first, bit for bit. A small model may be written
before its command can be killed: `killed` counts those that were.

Memory is that of the process without the pages of files, which the system takes back when it needs memory: the largest
RssAnon of /proc/PID/status, sampled every 5 ms. Importing PyTorch alone takes part of it, which the first row shows.
Needs as much disk as three times the model. Files are deleted at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from tools.bench.script import console, run_script
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.files import delete
from w2vscale.interop.fairseq2 import to_fairseq2
from w2vscale.interop.fairseq_file import load_fairseq
from w2vscale.interop.names import own_settings
from w2vscale.interop.torch_zip import write_torch_zip
from w2vscale.objectives import resolve
from w2vscale.optim.canonical import TensorSpec, model_shapes

SAMPLE_SECONDS = 0.005
SCALE = 0.02  # standard deviation of the weights


@dataclass(frozen=True)
class Step:
    """One command: what it took. Sizes in MB (10^6 bytes)."""

    name: str
    seconds: float
    mb_per_second: float
    peak_anonymous_mb: float
    peak_with_files_mb: float


def main(
    preset: Annotated[str, typer.Option(help="Preset of a model that fairseq2 and Transformers have.")] = "xlsr_1b",
    folder: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("exp/bench/convert"),
) -> None:
    """Print a table, and a JSON object as the last line."""
    if folder.exists():
        raise UserError(f"{folder}: exists; delete it or choose another one")
    folder.mkdir(parents=True)
    try:
        source = folder / "fairseq2.pt"
        size = write_random_model(preset, source)
        steps, killed = convert(source, folder, size)
        identical = same_tensors(source, folder / "back" / "model.pt")
    finally:
        shutil.rmtree(folder)
    table = Table("step", "seconds", "MB/s", "peak memory, MB", "with pages of files, MB", box=None)
    for step in steps:
        figures = (step.seconds, step.mb_per_second, step.peak_anonymous_mb, step.peak_with_files_mb)
        table.add_row(step.name, *(f"{figure:,.1f}" if figure else "" for figure in figures))
    console.print(table)
    found = {"preset": preset, "bytes": size, "identical": identical, "killed": killed}
    print(json.dumps(found | {"steps": [asdict(step) for step in steps]}))
    if not identical:
        sys.exit(1)


def write_random_model(preset: str, path: Path) -> int:
    """Write a pretrained model under the names of fairseq2, and return the bytes of its tensors. Holds one of them."""
    config, _ = resolve(load_config(preset))
    shapes = model_shapes(expected_of(config, optimizer=False))
    state = {name: random_tensor(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors = to_fairseq2(state, config, update=0)
    write_torch_zip(path, tensors, w2vscale=json.dumps(own_settings(config)))
    return sum(tensor.bytes for tensor in tensors.values())


def random_tensor(shape: tuple[int, ...], seed: int) -> LazyTensor:
    """A tensor that is drawn when it is read, always the same."""

    def draw() -> torch.Tensor:
        return SCALE * torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return LazyTensor.made(TensorSpec(shape, torch.float32), draw)


def convert(source: Path, folder: Path, size: int) -> tuple[list[Step], int]:
    """Run the commands, and count those that were killed. What a step has read is deleted, but not the source."""
    modules = "import w2vscale.interop.importing, w2vscale.interop.exporting"
    steps = [measure("importing PyTorch and w2vscale", [sys.executable, "-c", modules], 0)]
    place, killed = source, 0
    for name, output, arguments in (
        ("fairseq2 → checkpoint", "checkpoint", ["import"]),
        ("checkpoint → huggingface", "huggingface", ["export"]),
        ("huggingface → checkpoint", "again", ["import"]),
        ("checkpoint → fairseq2", "back", ["export", "--format", "fairseq2"]),
    ):
        command = [sys.executable, "-m", "w2vscale", arguments[0], str(place), str(folder / output), *arguments[1:]]
        killed += kill_half_way(command, folder, folder / output, size)
        steps.append(measure(name, command, size))
        left = [path.name for path in folder.rglob(".*.partial")]
        if left:
            raise UserError(f"{name}: left {', '.join(left)}")
        if place != source:
            delete(place)
        place = folder / output
    return steps, killed


def kill_half_way(command: list[str], folder: Path, output: Path, size: int) -> bool:
    """Start a command, kill it when half of its output is written, and check that nothing looks whole.

    Returns False, and deletes the output, if the command had written all of it.
    """
    before = bytes_below(folder)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and bytes_below(folder) - before < size / 2:
            time.sleep(SAMPLE_SECONDS)
        process.send_signal(signal.SIGKILL)
    complete = process.returncode == 0 and bytes_below(output) >= size
    if process.returncode != -signal.SIGKILL and not complete:
        raise UserError(f"{' '.join(command)}: ended with {process.returncode} before it was killed")
    if bytes_below(output) >= size:
        delete(output)
        return False
    whole = [*output.glob("*.safetensors*"), *output.glob("model.pt"), *output.glob("checkpoints/update_*")]
    if whole:
        raise UserError(f"{whole[0]}: there after its command was killed")
    return True


def measure(name: str, command: list[str], size: int) -> Step:
    """Run a command to its end."""
    began, anonymous, resident = time.perf_counter(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            used = memory(process.pid)
            anonymous, resident = max(anonymous, used.get("RssAnon", 0)), max(resident, used.get("VmHWM", 0))
            time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(f"{' '.join(command)}: ended with {process.returncode}")
    return Step(name, seconds, size / 1e6 / seconds, anonymous / 1e6, resident / 1e6)


def memory(process: int) -> dict[str, int]:
    """The memory of a process in bytes, by the names of /proc/PID/status; empty if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.removesuffix(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder, which other processes change meanwhile."""
    return sum(_size(os.path.join(root, name)) for root, _, names in os.walk(folder) for name in names)


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files have tensors of the same names, types, shapes and bits. Reads one tensor at a time."""
    ours, theirs = load_fairseq(one).state, load_fairseq(other).state
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype
        and tensor.shape == theirs[name].shape
        and torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8))
        for name, tensor in ours.items()
    )


if __name__ == "__main__":
    run_script(main)
