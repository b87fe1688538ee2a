"""A real ComfyUI end to end, with FLUX.1-dev's sizes: the stock workflow, our loaders in it.

For each ComfyUI (``comfyui-VERSION.tar.xz`` in ``$XDIT_WHEELS``, see ``pack_comfyui.py``; without
that the one of the tests) and each way to start it a case of its own, with a daemon of its own: two
prompts, ``/free``, SIGKILL and restart, the same picture by the stock loaders, XDiT Share, the
daemon's death. Each case is written at once; one that fails does not keep the others from running.

Usage: ``python benchmarks/gpu/real_comfyui.py [--tiny] [--list] OUTPUT [CASE…]``. ``--tiny``: the
tests' small files, on the CPU. CASE: part of a case's name.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

# ComfyUI chooses its allocator itself.
for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
    os.environ.pop(name, None)
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import comfyui_checkout  # noqa: E402
import torch  # noqa: E402
from comfyui import nodes_scene, packs, workflows  # noqa: E402
from comfyui.server import ComfyServer, WorkflowFailed  # noqa: E402
from comfyui.workflows import Nodes, Settings, Workflow  # noqa: E402
from comfyui_figures import figures_of  # noqa: E402
from comfyui_files import FILES, write_models  # noqa: E402
from daemon_process import DaemonProcess, running_daemon  # noqa: E402
from device_memory import read_memory  # noqa: E402
from machine import describe_run  # noqa: E402
from pack_comfyui import find_checkouts, read_version  # noqa: E402

STAGE_SECONDS = 520  # no case begins that could not end within them
CASE_SECONDS = 120  # ranks compile meanwhile
PROMPT_SECONDS = 150
DEATH_SECONDS = 10.0  # promised: 3
TOLERANCE = 0.05  # of latents, relative, after all steps in bf16
REST_BYTES = 16 << 30  # contexts of three processes, activations of ranks and VAE
UNSHARED_BYTES = 4 << 20  # CLIP's projection, which FLUX.1 does not use, and scalars
LOG_LINES = 40
FULL = Settings(width=1024, height=1024, steps=4, seed=1)
TINY = Settings(steps=4, seed=1)


@dataclass(frozen=True)
class Case:
    """A ComfyUI and how it is started; ``whole`` with everything that happens to it."""

    checkout: Path
    arguments: tuple[str, ...] = ()
    whole: bool = True

    @property
    def version(self) -> str:
        return read_version(self.checkout)

    @property
    def name(self) -> str:
        return " ".join([self.version, *(self.arguments or ("default",))])


def list_cases(checkouts: list[Path]) -> list[Case]:
    """The defaults first."""
    cases = [Case(checkout) for checkout in checkouts]
    for checkout in checkouts:
        if "disable-dynamic-vram" in (checkout / "comfy" / "cli_args.py").read_text():
            cases.append(Case(checkout, ("--disable-dynamic-vram",)))
    return cases + [Case(checkout, ("--lowvram",), whole=False) for checkout in checkouts]


@dataclass(frozen=True)
class Setup:
    """What all cases share."""

    tiny: bool
    models: Path
    stock: Nodes
    shared: Nodes
    settings: Settings
    references: dict[str, dict[str, torch.Tensor]]  # version → what its stock loaders gave

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"


def set_up(tiny: bool, models: Path) -> Setup:
    """Writes the files unless they are tiny."""
    if tiny:
        return Setup(tiny, models, nodes_scene.STOCK, nodes_scene.SHARED, TINY, {})
    write_models(models)
    unet, clip, t5, vae = (Path(name).name for name in FILES)
    names = {"clip_name1": clip, "clip_name2": t5}
    stock = Nodes(
        model_inputs={"unet_name": unet, "weight_dtype": "default"},
        clip_inputs={**names, "type": "flux"},
        vae_inputs={"vae_name": vae},
    )
    shared = replace(
        nodes_scene.SHARED,
        model_inputs={**nodes_scene.LOADER, "unet_name": unet},
        clip_inputs=names,
        vae_inputs={"vae_name": vae},
    )
    return Setup(tiny, models, stock, shared, FULL, {})


class Story:
    """One case as it goes on; ``record`` is what becomes of it."""

    def __init__(
        self, setup: Setup, case: Case, daemon: DaemonProcess, server: ComfyServer, record: Any
    ) -> None:
        self.setup, self.case, self.daemon, self.server = setup, case, daemon, server
        self.record = record
        self.seconds: dict[str, float] = record["seconds"]
        self.memory: dict[str, Any] = record["memory"]
        self.checks: dict[str, bool] = record["checks"]
        self.components = 0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[what] = round(time.monotonic() - began, 2)

    def settings(self, seed: int) -> Settings:
        return replace(self.setup.settings, seed=seed)

    def run(self, what: str, workflow: Workflow) -> dict[str, Any]:
        """A prompt, and how long it and each of its nodes took."""
        with self.server.listen() as listener, self.timed(what):
            prompt = self.server.queue(workflow, listener.client_id)
            entry = self.server.wait(prompt, PROMPT_SECONDS)
            listener.wait_until_done(prompt)
            events = listener.named("executing")
        spent: dict[str, float] = {}
        for event, following in pairwise(events):
            spent[str(event.data["node"])] = round(following.at - event.at, 2)
        self.record["nodes"][what] = {node: s for node, s in spent.items() if s >= 0.1}
        return entry

    def weigh(self, when: str) -> None:
        """Device memory now, by process."""
        status = self.daemon.wait_for_status(lambda s: True)
        names = {self.server.pid: "ComfyUI", status.pid: "broker"}
        names |= {rank.pid: f"rank {rank.rank}" for rank in status.ranks if rank.pid}
        names |= {each.keeper_pid: "keeper" for each in status.devices if each.keeper_pid}
        self.record["dynamic VRAM"] = [
            each.hello.dynamic_vram for each in status.sessions if each.pid == self.server.pid
        ]
        found = read_memory(names)
        self.components = sum(each.nbytes for each in status.components)
        found["components"] = {
            f"{each.role} {each.device}": each.nbytes for each in status.components
        }
        self.memory[when] = found

    # --- what happens

    def first_prompts(self) -> None:
        for number, what in enumerate(("first prompt", "second prompt"), 1):
            self.run(what, picture(self.setup.shared, self.settings(number), f"ours{number}"))
        self.weigh("after two prompts")
        for number in (1, 2):
            image = self.server.tensors(f"ours{number}-image")["images"]
            self.checks[f"picture {number} is finite, not constant"] = bool(
                image.isfinite().all() and image.std() > 1e-3
            )
            self.record[f"picture {number} std"] = round(float(image.std()), 4)
        used = self.memory["after two prompts"].get("used")
        if used is not None:
            rest = used - self.memory["before"]["used"] - self.components
            self.record["memory beside one copy"] = rest
            self.checks["one copy on the device"] = rest < REST_BYTES

    def probe(self, what: str) -> None:
        entry = self.run(what, probing(self.setup.shared))
        (found,) = entry["outputs"]["probe"]["probe"]
        self.record["probe"][what] = found
        shared = [found[name] for name in ("clip", "vae")]
        self.checks[f"{what}: parameters lie in regions"] = all(
            each["inside"][0] > 0 and each["outside"][1] < UNSHARED_BYTES for each in shared
        )

    def free(self) -> None:
        with self.timed("/free"):
            self.server.free()
        self.weigh("after /free")
        self.run(
            "prompt after /free", picture(self.setup.shared, self.settings(3), "ours3", text=False)
        )
        self.probe("probe after /free")

    def restart(self) -> None:
        self.server.kill()
        self.weigh("ComfyUI killed")
        known = len(self.server.log)
        killed = time.monotonic()
        with self.timed("ComfyUI started again"):
            self.server.start()
        before = bytes_read(self.server.pid)
        self.probe("loaders after a restart")
        self.seconds["from the restart until the loaders returned"] = round(
            time.monotonic() - killed, 2
        )
        read = bytes_read(self.server.pid) - before
        self.record["bytes read after a restart"] = read
        lines = [line for line in self.server.log[known:].splitlines() if "xDiT: " in line]
        self.record["said after a restart"] = lines
        few = self.setup.tiny or read < self.components / 100
        self.checks["no weights read after a restart"] = (
            few and any("was resident" in line for line in lines) and ", read " not in str(lines)
        )

    def stock(self) -> None:
        self.run(
            "stock loaders, first prompt", picture(self.setup.stock, self.settings(1), "stock1")
        )
        self.weigh("with the stock loaders' copy")
        found = {name: self.server.tensors(f"stock1{name}") for name in ("", "-image", "-text")}
        self.setup.references[self.case.version] = {
            "latent": found[""]["samples"],
            "image": found["-image"]["images"],
            **found["-text"],
        }

    def compare(self) -> None:
        reference = self.setup.references.get(self.case.version)
        if reference is None:
            return
        ours = {
            "latent": self.server.tensors("ours1")["samples"],
            "image": self.server.tensors("ours1-image")["images"],
            **self.server.tensors("ours1-text"),
        }
        differences = {}
        for name, expected in reference.items():
            difference = (ours[name].double() - expected.double()).abs()
            norm = float(expected.double().norm()) or 1.0
            differences[name] = {
                "max": float(difference.max()),
                "relative": float(difference.norm()) / norm,
            }
        self.record["against the stock loaders"] = differences
        self.checks["latents agree"] = differences["latent"]["relative"] < TOLERANCE

    def share(self) -> None:
        """XDiT Share behind stock loaders: shared, or refused with what to do."""
        workflow = nodes_scene.behind_share(
            picture(self.setup.stock, self.settings(5), "behind", text=False)
        )
        try:
            self.run("prompt behind XDiT Share", workflow)
            self.record["XDiT Share"] = "shared"
        except WorkflowFailed as failure:
            said = str(failure).splitlines()[0]
            self.record["XDiT Share"] = said
            self.checks["XDiT Share says what to do"] = "--disable-dynamic-vram" in said

    def death(self) -> None:
        """The daemon is killed while the ranks sample."""
        settings = replace(self.setup.settings, seed=6, steps=2000)
        workflow = workflows.text_to_image(self.setup.shared, settings, picture=False)
        with self.server.listen() as listener:
            prompt = self.server.queue(workflow, listener.client_id)
            listener.wait_for(lambda event: event.name == "progress", PROMPT_SECONDS)
        os.kill(self.daemon.pid, signal.SIGKILL)
        killed = time.monotonic()
        try:
            self.server.wait(prompt, 60)
            self.record["daemon killed"] = "the prompt went on"
            self.checks["the daemon's death is told"] = False
        except WorkflowFailed as failure:
            seconds = time.monotonic() - killed
            self.seconds["from the daemon's death to the error"] = round(seconds, 2)
            self.record["daemon killed"] = (
                f"{failure.exception_type}: {str(failure).splitlines()[0]}"
            )
            self.checks["the daemon's death is told"] = seconds < DEATH_SECONDS
        assert self.daemon.process is not None
        self.daemon.process.wait(30)


def picture(nodes: Nodes, settings: Settings, save: str, *, text: bool = True) -> Workflow:
    """Text to picture; latent, picture and conditioning are saved."""
    workflow = workflows.text_to_image(nodes, settings, save=save)
    if text:
        inputs = {"name": f"{save}-text", "conditioning": ["guidance", 0]}
        workflow["save_text"] = {"class_type": "TestSaveTensors", "inputs": inputs}
    return workflow


def probing(nodes: Nodes) -> Workflow:
    """The loaders alone, and where their parameters lie."""
    whole = workflows.text_to_image(nodes)
    loaders = {name: whole[name] for name in ("model", "clip", "vae")}
    inputs = {name: [name, 0] for name in loaders}
    return {**loaders, "probe": {"class_type": "XDiTBenchProbe", "inputs": inputs}}


def bytes_read(pid: int) -> int:
    """What the process has read by system calls, from files or the page cache."""
    text = Path(f"/proc/{pid}/io").read_text()
    return int(text.split("rchar:")[1].split()[0])


def make_server(setup: Setup, case: Case, daemon: DaemonProcess, base: Path) -> ComfyServer:
    """A ComfyUI of that daemon with our nodes and the full-size files, not yet started."""
    os.environ[comfyui_checkout.OTHER] = str(case.checkout)
    server = ComfyServer(
        base,
        packs={"xdit_sidecar": packs.clone(), "probe_pack": HERE / "probe_pack"},
        # A CPU has no way to be short of VRAM.
        arguments=[each for each in case.arguments if each != "--lowvram" or not setup.tiny],
        environment={
            "XDIT_SIDECAR_RUNTIME_DIR": str(daemon.runtime_dir),
            "OMP_NUM_THREADS": "1" if setup.tiny else str(os.cpu_count()),
        },
        cpu=setup.tiny,
    )
    if not setup.tiny:
        for name in FILES:
            os.link(setup.models / name, base / "models" / name)
    return server


def run_case(setup: Setup, case: Case, directory: Path, record: Any) -> None:
    """Everything of one case; ``record`` is filled as it goes on."""
    record["memory"]["before"] = read_memory({})
    directory.mkdir()
    with ExitStack() as stack:
        daemon = stack.enter_context(
            running_daemon(directory, "--ranks", "1", "--deadline", "120", device=setup.device)
        )
        server = make_server(setup, case, daemon, directory / "base")
        story = Story(setup, case, daemon, server, record)
        try:
            with story.timed("ComfyUI started"):
                stack.enter_context(server)
            with story.timed("until the ranks were ready, then"):
                daemon.wait_for_status(lambda s: s.group.state == "ready", 120)
            story.weigh("ready, nothing loaded")
            story.first_prompts()
            story.probe("probe")
            story.free()
            if case.whole:
                story.restart()
                story.stock()
            story.compare()
            if case.whole:
                story.share()
                story.death()
        except BaseException:
            record["log of ComfyUI"] = server.log.splitlines()[-LOG_LINES:]
            record["log of the daemon"] = daemon.log.splitlines()[-LOG_LINES:]
            raise
        finally:
            record["said by ComfyUI"] = [
                line
                for line in server.log.splitlines()
                if any(word in line for word in ("VRAM", "vram state", "cudaMalloc", "Device: "))
            ]


def make_record(case: Case) -> dict[str, Any]:
    """What a case has to tell, before it began."""
    parts = ("seconds", "checks", "nodes", "memory", "probe")
    known = {"case": case.name, "commit": describe_run()["commit"], "success": False}
    return {**known, **{part: {} for part in parts}}


def main() -> int:
    """Write ``gpu-comfyui.json`` into the directory given; 0 if all cases succeeded."""
    began = time.monotonic()
    flags = {"--tiny", "--list"} & set(sys.argv)
    output, *wanted = [argument for argument in sys.argv[1:] if argument not in flags]
    target = Path(output) / "gpu-comfyui.json"
    result: dict[str, Any] = {"cases": {}, "figures": []}
    if target.exists():
        result |= json.loads(target.read_text())
    failed = []
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        cases = list_cases(find_checkouts(directory))
        if wanted:
            cases = [case for case in cases if any(part in case.name for part in wanted)]
        if "--list" in flags:
            print(*(case.name for case in cases), sep="\n")
            return 0
        setup = set_up("--tiny" in flags, directory / "models")
        result |= {**describe_run(), "writing the files, s": round(time.monotonic() - began, 1)}
        for number, case in enumerate(cases):
            if time.monotonic() - began + CASE_SECONDS > STAGE_SECONDS:
                print(f"--- {case.name}: no time left", flush=True)
                failed.append(case.name)
                continue
            print(f"--- {case.name}", flush=True)
            record = make_record(case)
            started = time.monotonic()
            try:
                run_case(setup, case, directory / f"case{number}", record)
                record["success"] = all(record["checks"].values())
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # noqa: BLE001  also pytest's ways to fail and skip
                record["error"] = traceback.format_exc().splitlines()[-30:]
            record["seconds"]["the case"] = round(time.monotonic() - started, 1)
            result["cases"][case.name] = record
            result["figures"] = [f.as_dict() for f in figures_of(result["cases"].values())]
            target.write_text(json.dumps(result, indent=1) + "\n")
            report(record)
            if not record["success"]:
                failed.append(case.name)
    print(f"--- failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed or not all(figure["met"] for figure in result["figures"]) else 0


def report(record: Any) -> None:
    """The short of it, and the logs of a case that failed."""
    print(f"seconds: {record['seconds']}")
    print(f"checks: {record['checks']}")
    print(f"against the stock loaders: {record.get('against the stock loaders')}")
    for when, found in record["memory"].items():
        print(f"memory, {when}: {found}")
    for key in () if record["success"] else ("log of the daemon", "log of ComfyUI", "error"):
        print("\n".join([f"{key}:", *record.get(key, [])]))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
