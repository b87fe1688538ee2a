"""``xdit-sidecar plan``: does this model fit on these GPUs, and how is it best shared?"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from ...protocol.errors import SidecarError
from ...protocol.health.units import human_bytes
from ...protocol.safetensors_file import SafetensorsFile
from ..devices import NoDevice, discover_gpus
from ..gpus import Gpu, Links, read_gpus, read_links
from ..models import plan_words
from ..models.flux_detection import detect_flux_file
from ..models.memory import TOKEN_PIXELS
from ..models.plan import Plan, Request, make_plan
from . import exit_status
from .console import make_console, make_table
from .options import Json, parse_bytes

_LARGEST_SIDE = 16384
_ASSUMED = "assumed GPU"


class Place(StrEnum):
    """Where the text encoders lie."""

    GPU = "gpu"
    CPU = "cpu"


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int


def parse_size(text: str) -> Size:
    """The size that "1024x768" means. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip().lower())
    sides = Size(int(match[1]), int(match[2])) if match else Size(0, 0)
    if any(side % TOKEN_PIXELS or not 0 < side <= _LARGEST_SIDE for side in sides):
        raise typer.BadParameter(
            f"{text!r} is no picture size; write for example 1024x768, in multiples of "
            f"{TOKEN_PIXELS} up to {_LARGEST_SIDE}"
        )
    return sides


def plan_command(
    file: Annotated[Path, typer.Argument(help="A FLUX.1 .safetensors file; its header is read.")],
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, help="For so many GPUs. [default: this machine's]", show_default=False
        ),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="For GPUs with so much memory, all free. [default: this machine's]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        Size,
        typer.Option(parser=parse_size, metavar="WIDTHxHEIGHT", help="Of the picture, in pixels."),
    ] = "1024x1024",  # type: ignore[assignment]  # parsed like a given value
    text: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of the prompt.")] = 512,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Rows of one forward.")] = 1,
    text_encoders: Annotated[Place, typer.Option(help="Where the text encoders lie.")] = Place.GPU,
    json: Json = False,
) -> None:
    """Will this model fit, and how should its ranks share the work? Nothing is loaded.

    Exit status: 0 it fits, 1 it does not or the file cannot be used, 2 wrong usage or no GPU.
    """
    try:
        with SafetensorsFile.open(file) as opened:
            config = detect_flux_file(opened)
            tensors = [tensor.spec for tensor in opened.tensors]
    except SidecarError as error:
        if not json:
            raise
        typer.echo(msgspec.json.encode({"error": {"code": error.code, "message": str(error)}}))
        raise typer.Exit(exit_status.of_error(error)) from None
    found, links = look_for_gpus(gpus, memory)
    request = Request(*size, text, batch, text_encoders is Place.GPU)
    plan = make_plan(config, tensors, found, request, links)
    if json:
        typer.echo(msgspec.json.encode(plan))
    else:
        print_plan(make_console(), plan)
    raise typer.Exit(exit_status.HEALTHY if plan.fits else exit_status.FAILED)


def look_for_gpus(count: int | None, memory: int | None) -> tuple[list[Gpu], Links]:
    """The machine's GPUs, or ``count`` of them, or such with ``memory`` bytes that it has not.

    GPUs beyond the machine's are taken to be like its first one, empty. Raises NoDevice.
    """
    if count is not None and memory is not None:
        return [Gpu(_ASSUMED, memory, memory)] * count, "unknown"
    uuids, reason = discover_gpus()
    found = read_gpus(uuids)
    if uuids and not found:
        reason = "NVML (libnvidia-ml.so.1) does not tell their memory"
    if memory is not None:
        return [Gpu(_ASSUMED, memory, memory)] * max(1, len(found)), "unknown"
    if not found:
        raise NoDevice(
            f"no GPU to plan for: {reason}; describe one, for example --gpus 2 --memory 24GiB"
        )
    if count is None or count <= len(found):
        return found[:count], read_links(uuids[:count])
    first = found[0]
    like = Gpu(f"{first.name} (assumed)", first.total, first.total)
    return found + [like] * (count - len(found)), "unknown"


def print_plan(console: Console, plan: Plan) -> None:
    """The table per GPU, the reasons, and what would help, for people."""
    wanted = plan.request
    console.print(
        f"{plan.model}, {plan_words.show_dtype(plan.dtype)}: {wanted.width}x{wanted.height}, "
        f"{wanted.text} text tokens, batch {wanted.batch}, {len(plan.gpus)} "
        f"{'rank' if len(plan.gpus) == 1 else 'ranks'} ({plan.degrees})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = make_table(
        "GPUs",
        *(">gpu", "name", ">total", ">free", ">weights", ">vae, text", ">activations"),
        *(">contexts", ">reserve", ">needed", ">left"),
    )
    for number, gpu in enumerate(plan.gpus):
        sizes = (gpu.total, gpu.free, gpu.weights, gpu.companions, gpu.activations)
        more = (gpu.contexts, gpu.reserve, gpu.needed, gpu.left)
        table.add_row(str(number), gpu.name, *map(human_bytes, (*sizes, *more)))
    console.print()
    console.print(table, highlight=False)
    console.print("activations and contexts are estimates; free is what no process uses now")
    console.print()
    for reason in plan.reasons:
        console.print(Text(reason), soft_wrap=True)
    console.print()
    if plan.fits:
        console.print(Text("fits", style="green"))
        return
    missing = -min(gpu.left for gpu in plan.gpus)
    console.print(Text(f"does not fit: {human_bytes(missing)} are missing", style="bold red"))
    for option in plan.options:
        verdict = "then it fits" if option.fits else "not enough alone"
        line = f"  -> {option.what}: saves {human_bytes(option.saves)}, {verdict}"
        console.print(Text(line), soft_wrap=True)
    if not plan.options:
        console.print(Text(f"  -> {plan_words.NO_OPTION}"), soft_wrap=True)
