"""``xdit-sidecar generate``: a prompt to a picture, without ComfyUI."""

from __future__ import annotations

import json as jsons
import secrets
import time
from collections.abc import Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from ...protocol import messages as m
from ...protocol.client.client import Client
from ...protocol.client.remote import RemoteRanks
from ...protocol.errors import NO_RANKS, BadFile, BadJob, MissingComponent, RanksUnavailable
from ..models.parts import CLIP_L, LORA, T5, TRANSFORMER, VAE
from ..tokenizers import Tokenizers
from .console import make_console
from .options import RuntimeDir
from .plan import Size, parse_size
from .residence import Resident, make_resident, work_devices

if TYPE_CHECKING:
    import torch

_NEEDED = (TRANSFORMER, VAE, CLIP_L, T5)
_LARGEST_SEED = 2**63 - 1


class Lora(NamedTuple):
    """A file, and how strongly it works."""

    path: Path
    strength: float


def parse_lora(text: str) -> Lora:
    """The LoRA that "file.safetensors:0.8" means. Raises typer.BadParameter."""
    path, colon, strength = text.rpartition(":")
    if not colon:
        return Lora(Path(text), 1.0)
    try:
        return Lora(Path(path), float(strength))
    except ValueError:
        return Lora(Path(text), 1.0)  # a colon of the file's own name


def parse_degrees(text: str) -> m.Degrees:
    """The degrees that "ulysses=2,cfg=2" means. Raises typer.BadParameter."""
    degrees: dict[str, int] = {}
    for piece in filter(None, text.replace(" ", "").split(",")):
        name, _, number = piece.partition("=")
        if name not in m.Degrees.__struct_fields__ or not number.isdecimal() or not int(number):
            names = ", ".join(m.Degrees.__struct_fields__)
            raise typer.BadParameter(
                f"{piece!r}: write for example ulysses=2,cfg=2; there are {names}"
            )
        degrees[name] = int(number)
    return m.Degrees(**degrees)


def parse_compute(text: str) -> m.ComputeDtype:
    """The dtype that "bf16" means. Raises typer.BadParameter."""
    match text.upper():
        case "F32" | "F16" | "BF16" as dtype:
            return dtype
    raise typer.BadParameter(f"{text!r} is no dtype to compute in; use F32, F16 or BF16")


def generate_command(
    prompt: Annotated[str, typer.Option(help="What the picture shows.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")],
    model: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Transformer, VAE, CLIP-L and T5, each in a file of its own or together; once for "
            "each file; of two for one part the later counts. [default: what is resident]",
            show_default=False,
        ),
    ] = None,
    tokenizers: Annotated[
        Path | None,
        typer.Option(
            envvar="XDIT_SIDECAR_TOKENIZERS",
            metavar="DIR",
            help="ComfyUI's folder, or one with clip_l/ and t5/.",
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="What it does not show; needs --cfg above 1.")] = "",
    size: Annotated[
        Size, typer.Option(parser=parse_size, metavar="WIDTHxHEIGHT", help="In pixels.")
    ] = "1024x1024",  # type: ignore[assignment]  # parsed like a given value
    steps: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=_LARGEST_SEED, help="[default: another one each time]"),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Of distilled models, as FLUX.1 dev is.")] = 3.5,
    cfg: Annotated[float, typer.Option(min=0, max=100, help="1: without negative prompt.")] = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    lora: Annotated[
        list[Lora] | None,
        typer.Option(parser=parse_lora, metavar="FILE[:STRENGTH]", help="May be given repeatedly."),
    ] = None,
    compute: Annotated[
        m.ComputeDtype | None,
        typer.Option(
            parser=parse_compute,
            metavar="F32|F16|BF16",
            help="[default: BF16 on GPUs, else F32]",
            show_default=False,
        ),
    ] = None,
    fp8_matmul: Annotated[
        bool,
        typer.Option(
            "--fp8-matmul", help="Multiply in fp8: faster on recent GPUs, and not the same picture."
        ),
    ] = False,
    parallel: Annotated[
        m.Degrees | None,
        typer.Option(
            parser=parse_degrees,
            metavar="DEGREES",
            help="For example ulysses=2,cfg=2. [default: chosen for the model and the GPUs]",
            show_default=False,
        ),
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Draw a picture with the resident ranks and save it as PNG.

    Exit status: 0 it is saved, 1 it is not, 2 wrong usage, 3 no daemon.
    """
    _check_names(sampler, scheduler)
    _check_writable(out)
    if tokenizers is None:
        raise typer.BadParameter(
            "name ComfyUI's folder, which has the tokenizers, with --tokenizers or "
            "XDIT_SIDECAR_TOKENIZERS; nothing is downloaded"
        )
    console = make_console()
    began = time.monotonic()
    seed = secrets.randbelow(_LARGEST_SEED) if seed is None else seed
    tokens = _tokenize(Tokenizers.open(tokenizers), prompt, negative if cfg != 1 else None)
    with Client(runtime_dir, name="generate") as client:
        _check_ranks(client.status(), parallel)
        remote = RemoteRanks(client)
        devices = work_devices(client)
        held: list[Resident] = []
        for path in model or []:
            held += make_resident(client, path, devices, console=console)
        loras = [
            ([*make_resident(client, wanted.path, devices, role=LORA, console=console)], wanted)
            for wanted in lora or []
        ]
        components = {found.role: found.attachment.component.fingerprint for found in held}
        job = m.Generate(
            components=_complete(client, components),
            tensors=[],
            compute=compute or ("F32" if devices == ["cpu"] else "BF16"),
            fp8_matmul=fp8_matmul,
            degrees=parallel,
            adapters=_adapters(loras),
            width=size.width,
            height=size.height,
            seed=seed,
            steps=steps,
            guidance=guidance,
            cfg=cfg,
            sampler=sampler,
            scheduler=scheduler,
        )
        remote.wait_until_ready()
        image = _run(remote, job, tokens, console)
        for found in chain(held, *(copies for copies, _ in loras)):
            found.attachment.release()
    about = {
        **{"prompt": prompt, "negative": negative, "seed": seed, "steps": steps, "cfg": cfg},
        **{"guidance": guidance, "sampler": sampler, "scheduler": scheduler},
        **({"fp8_matmul": True} if fp8_matmul else {}),
        "loras": [[wanted.path.name, wanted.strength] for wanted in lora or []],
    }
    _save(image, out, about)
    console.print(
        f"{out}: {size.width} x {size.height}, seed {seed}, {time.monotonic() - began:.1f} s",
        highlight=False,
        markup=False,
    )


def _run(
    remote: RemoteRanks, job: m.Generate, tokens: Mapping[str, torch.Tensor], console: Console
) -> torch.Tensor:
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("steps", total=job.steps)

        def on_step(step: int, steps: int, _: torch.Tensor | None) -> None:
            progress.update(task, completed=step, total=steps)

        return remote.run(job, tokens, on_step=on_step)["image"]


def _tokenize(tokenizers: Tokenizers, prompt: str, negative: str | None) -> dict[str, torch.Tensor]:
    import torch

    tensors = {}
    for prefix, text in (("", prompt), ("negative_", negative)):
        if text is not None:
            # Of CLIP-L FLUX.1 uses what the first row says of the whole.
            tensors[f"{prefix}clip_l_ids"] = torch.tensor(tokenizers.clip_l(text)[:1])
            tensors[f"{prefix}t5_ids"] = torch.tensor([tokenizers.t5(text)])
    return tensors


def _complete(client: Client, components: dict[str, str]) -> dict[str, str]:
    """Fill in what is resident anyway. Raises MissingComponent for what is not, or not alone."""
    resident = [c for c in client.status().components if c.state == "resident"]
    for role in _NEEDED:
        if role in components:
            continue
        found = {c.fingerprint: c.label for c in resident if c.role == role}
        if len(found) != 1:
            there = f"{', '.join(sorted(found.values()))} are" if found else "none is"
            raise MissingComponent(
                f"which {role} shall draw? {there} resident: name its file with --model"
            )
        components[role] = next(iter(found))
    return {role: components[role] for role in _NEEDED}


def _adapters(loras: list[tuple[list[Resident], Lora]]) -> list[m.Adapter]:
    """Of each file's copies on all devices; a file that is named twice works twice."""
    strengths: dict[str, float] = {}
    for copies, wanted in loras:
        for fingerprint in {copy.attachment.component.fingerprint for copy in copies}:
            strengths[fingerprint] = strengths.get(fingerprint, 0.0) + wanted.strength
    return [m.Adapter(fingerprint, strength) for fingerprint, strength in strengths.items()]


# What can be told before anything is loaded, is.


def _check_names(sampler: str, scheduler: str) -> None:
    from ..ranks.sampling.samplers import SAMPLERS
    from ..ranks.sampling.schedule import SCHEDULERS

    for option, name, known in (
        ("--sampler", sampler, SAMPLERS),
        ("--scheduler", scheduler, SCHEDULERS),
    ):
        if name not in known:
            raise typer.BadParameter(f"{option} {name}: use one of {', '.join(known)}")


def _check_ranks(status: m.Status, degrees: m.Degrees | None) -> None:
    if status.group is None:
        raise RanksUnavailable(NO_RANKS)
    if status.group.state == "degraded":
        raise RanksUnavailable(f"the ranks were given up: {status.group.error}")
    ranks = len(status.ranks)
    if degrees is not None and prod(msgspec.structs.astuple(degrees)) != ranks:
        raise typer.BadParameter(
            f"--parallel: the product of the degrees must be {ranks}, the ranks"
        )


def _check_writable(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {out}: pictures are saved as .png")
    if out.is_dir():
        raise BadFile(f"cannot write {str(out)!r}: it is a folder; choose another name with --out")
    try:
        _unfinished(out).touch()
        _unfinished(out).unlink()
    except OSError as error:
        raise BadFile(
            f"cannot write to {str(out.parent)!r}: {error.strerror}; choose another place with "
            "--out"
        ) from None


def _unfinished(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


def _save(image: torch.Tensor, out: Path, about: Mapping[str, object]) -> None:
    """The first picture of (B, H, W, 3), 0 to 1, with what it was made from in its metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    height, width, _ = image[0].shape
    if not bool(image[0].isfinite().all()):
        raise BadJob("the picture has values that are no numbers: it was not saved")
    data = bytes((image[0].clamp(0, 1) * 255).round().byte().flatten().tolist())
    info = PngInfo()
    info.add_text("xdit-sidecar", jsons.dumps(about))
    part = _unfinished(out)
    try:
        Image.frombytes("RGB", (width, height), data).save(part, format="PNG", pnginfo=info)
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadFile(f"cannot write {str(out)!r}: {error}") from None
