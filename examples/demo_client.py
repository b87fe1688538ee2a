"""One client of the demo, standing in for a ComfyUI process: does what standard input says.

Each line is a command as JSON, each answer a line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy
import torch
from demo_digits import DRAW_SECONDS, draw_sheet
from demo_processes import HandedOver
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.remote import RemoteRanks
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile


def warm_up(device: str) -> None:
    """Do once what costs memory by itself, so that it is not taken for the weights' later."""
    target = torch.device("cpu")
    if device != "cpu":
        ordinal = CudaDriver.load().ordinal_of(device)
        CudaDriver.load().memory_info(ordinal)
        if torch.cuda.is_available():
            target = torch.device("cuda", ordinal)
    byte_sum(torch.from_numpy(numpy.ones(1 << 20, dtype=numpy.float32)).to(target))


def byte_sum(tensor: torch.Tensor) -> int:
    """A checksum of a tensor, computed where it lies."""
    # In pieces: on the CPU torch would first convert the whole to int64.
    pieces = tensor.reshape(-1).view(torch.uint8).split(1 << 20)
    return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)


def bytes_read_by_process() -> int:
    """What this process has read through system calls, as the kernel counts it."""
    with open("/proc/self/io", encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def hand_over(client: Client, device: str, role: str, path: str) -> tuple[Attachment, HandedOver]:
    """Hand one file over and describe what that took."""
    read = bytes_read_by_process()
    start = time.perf_counter()
    with SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role=role)
        attachment = hand_over_file(client, file, device)
        views = attachment.tensors()
        seconds = time.perf_counter() - start
        read = bytes_read_by_process() - read
    outside = [n for n, v in views.items() if v.numel() and not attachment.contains(v.data_ptr())]
    return attachment, {
        "role": role,
        "seconds": seconds,
        "weights_read": file.bytes_read,
        "process_read": read,
        "payload": sum(spec.nbytes for spec in file.component.tensors),
        "region": attachment.nbytes,
        "address": attachment.mapping.address,
        "tensors": len(views),
        "outside": outside,
    }


def draw(
    remote: RemoteRanks, compute: m.ComputeDtype, attachments: dict[str, Attachment]
) -> dict[str, float]:
    """A picture by the ranks, which random weights make noise; seconds that each part took."""
    remote.wait_until_ready()
    ends: list[float] = []
    generator = torch.Generator().manual_seed(3)
    # Random weights have no use for words: any tokens will do.
    tokens = {
        "clip_l_ids": torch.randint(0, 49406, (1, 77), generator=generator),
        "t5_ids": torch.randint(0, 32000, (1, 256), generator=generator),
    }
    job = m.Generate(
        components={role: held.component.fingerprint for role, held in attachments.items()},
        tensors=[],
        compute=compute,
        width=256,
        height=256,
        steps=8,
        seed=3,
    )
    start = time.perf_counter()
    remote.run(
        job, tokens, timeout=DRAW_SECONDS, on_step=lambda *_: ends.append(time.perf_counter())
    )
    end = time.perf_counter()
    return {
        "text": ends[0] - start,
        "first step": ends[1] - ends[0],
        "other steps": (ends[-1] - ends[1]) / (len(ends) - 2),
        "decode": end - ends[-1],
        "in all": end - start,
    }


def main() -> None:
    """Answer commands until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime-dir", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    warm_up(arguments.device)
    attachments: dict[str, Attachment] = {}
    compute: m.ComputeDtype = "F32" if arguments.device == "cpu" else "BF16"
    with Client(arguments.runtime_dir, name=arguments.name, host="make demo") as client:
        client.ping()
        remote = RemoteRanks(client)
        answer: object = {"torch": torch.__version__}
        print(json.dumps(answer), flush=True)
        for line in sys.stdin:
            match json.loads(line):
                case {"do": "hand-over", "files": files}:
                    answer = []
                    for role, path in files:
                        attachments[role], report = hand_over(client, arguments.device, role, path)
                        answer.append(report)
                case {"do": "draw"}:
                    answer = draw(remote, compute, attachments)
                case {"do": "draw digits", "out": out}:
                    answer = draw_sheet(
                        remote,
                        compute,
                        lambda role, path: hand_over(client, arguments.device, role, path)[0],
                        out,
                    )
                case {"do": "use"}:
                    answer = {
                        role: sum(map(byte_sum, attachment.tensors().values()))
                        for role, attachment in attachments.items()
                    }
                case other:
                    raise SystemExit(f"unknown command {other!r}")
            print(json.dumps(answer), flush=True)
        attachments.clear()


if __name__ == "__main__":
    main()
