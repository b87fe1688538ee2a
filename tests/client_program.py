"""The program of a :class:`processes.ClientProcess`: one JSON command a line, one answer a line."""

from __future__ import annotations

import json
import sys
import time

import components
import torch
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.fill import OpenFill
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile


class Program:
    """Each public method is a command."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.attachments: list[Attachment] = []
        self.fill: OpenFill | None = None

    def hand_over(self, device: str, seed: int = 0, pause: float = 0.0) -> bool:
        """Hand the component of ``seed`` over; whether this process filled it."""
        tensors = components.random_tensors(seed)
        filled = False

        def fill(writer) -> None:
            nonlocal filled
            filled = True
            time.sleep(pause)
            writer.copy_tensors(tensors)

        component = components.describe(tensors)
        self.attachments.append(self.client.hand_over(component, device, fill))
        return filled

    def begin_fill(self, device: str, seed: int = 0) -> None:
        """Take a region to fill and write half of it; never commit."""
        tensors = components.random_tensors(seed)
        self.fill = self.client.open_fill(components.describe(tensors), device)
        self.fill.writer.write(0, b"\xff" * 1000)

    def check(self, seed: int = 0) -> bool:
        """Whether every tensor of the newest attachment has the right bytes."""
        expected = components.random_tensors(seed)
        views = self.attachments[-1].tensors()
        return all(torch.equal(view.cpu(), expected[name]) for name, view in views.items())

    def hand_over_file(self, device: str, path: str) -> int:
        """Hand a file over and read every byte of it; bytes read from the file."""
        with SafetensorsFile.open(path) as opened:
            file = ComponentFile(opened, role="vae")
            self.attachments.append(hand_over_file(self.client, file, device))
        for view in self.attachments[-1].tensors().values():
            view.reshape(-1).view(torch.uint8).max()
        return file.bytes_read

    def copy_privately(self) -> None:
        """Do what sharing is there to avoid: an own copy of the newest attachment."""
        self.copies = [view.clone() for view in self.attachments[-1].tensors().values()]

    def write_to_map(self) -> None:
        """Write to a tensor of the newest attachment. Does not return if that is impossible."""
        next(iter(self.attachments[-1].tensors().values())).zero_()

    def release(self) -> None:
        """Release the oldest attachment."""
        self.attachments.pop(0).release()

    def orphaned(self) -> bool:
        """Whether the newest attachment's keeper is known to be dead."""
        return self.attachments[-1].orphaned.wait(10)

    def renew(self) -> None:
        """Move to a region of the living keeper and let the old one go."""
        renewed = self.client.renew(self.attachments[0])
        self.attachments.append(renewed)
        self.release()

    def ping(self) -> str:
        """The daemon's boot id."""
        return self.client.ping()


def main() -> None:
    runtime_dir, name = sys.argv[1:]
    with Client(runtime_dir, name=name) as client:
        program = Program(client)
        for line in sys.stdin:
            command, arguments = json.loads(line)
            try:
                answer = [True, getattr(program, command)(**arguments)]
            except Exception as error:  # noqa: BLE001  told to the test
                answer = [False, f"{type(error).__name__}: {error}"]
            print(json.dumps(answer), flush=True)
        program.attachments.clear()


if __name__ == "__main__":
    main()
