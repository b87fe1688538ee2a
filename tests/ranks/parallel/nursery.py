"""``nursery.py loaded|bare``: imports what is slow, then forks ranks as told on stdin."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "components")]
sys.path.append(str(HERE.parents[1]))

# What importing xfuser brings in besides xfuser: a fork is then ready in a second.
HEAVY = [
    "torch.distributed.tensor.experimental._attention",
    "transformers.models.t5.modeling_t5",
    *(
        f"diffusers.pipelines.{name}"
        for name in (
            *("pixart_alpha.pipeline_pixart_alpha", "flux.pipeline_flux", "latte.pipeline_latte"),
            *("stable_diffusion_3.pipeline_stable_diffusion_3", "cogvideo.pipeline_cogvideox"),
            *("hunyuandit.pipeline_hunyuandit", "sana.pipeline_sana", "wan.pipeline_wan_i2v"),
            *("stable_diffusion_xl.pipeline_stable_diffusion_xl", "lumina2.pipeline_lumina2"),
            "consisid.pipeline_consisid",
        )
    ),
]


def import_heavy(loaded: bool) -> None:
    import torch

    torch.set_num_threads(1)
    for name in HEAVY:
        importlib.import_module(name)
    if loaded:
        from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import load_xfuser

        load_xfuser(torch.device("cpu"))


def run_rank(order: dict[str, Any], rank: int) -> None:
    """In the forked process: do the task, write what it returned or raised."""
    import copy_tasks
    import rank_tasks
    import repair_tasks
    import vae_tasks
    import worker_tasks

    os.environ.update(order["settings"])
    modules = (rank_tasks, copy_tasks, repair_tasks, vae_tasks, worker_tasks)
    tasks = {name: task for module in modules for name, task in module.TASKS.items()}
    result: dict[str, Any]
    try:
        place = rank_tasks.Place(rank, order["world_size"], Path(order["directory"]))
        result = {"value": tasks[order["task"]](place, **order["arguments"])}
    except BaseException as error:  # noqa: BLE001  reported, whatever it is
        lines = traceback.format_exception(error)
        result = {"raised": f"{type(error).__name__}: {error}\n{''.join(lines[-6:])}"}
    path = Path(order["directory"], f"rank{rank}.json")
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    sys.stderr.flush()
    os._exit(0)


def wait_for(pids: list[int], limit: float) -> list[str]:
    """How each process ended; those that outlive the limit are killed."""
    end = time.monotonic() + limit
    found = ["hung"] * len(pids)
    left = set(range(len(pids)))
    while left:
        for index in list(left):
            pid, status = os.waitpid(pids[index], os.WNOHANG)
            if pid:
                left.discard(index)
                found[index] = "ok" if status == 0 else "died"
        if left and time.monotonic() > end:
            for index in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[index], signal.SIGKILL)
                os.waitpid(pids[index], 0)
            break
        time.sleep(0.01)
    return found


def main() -> None:
    # Ranks and libraries may print; the answers need a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_heavy(loaded=sys.argv[1] == "loaded")
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["world_size"]):
            pid = os.fork()
            if not pid:
                run_rank(order, rank)
            pids.append(pid)
        answers.write(json.dumps(wait_for(pids, order["limit"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
