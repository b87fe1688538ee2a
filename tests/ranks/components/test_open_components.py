"""What a rank holds of the components that it has open."""

from __future__ import annotations

from pathlib import Path

import components
import torch
from daemon_process import running_daemon
from xdit_sidecar.daemon.ranks.components import OpenComponent


def test_components_in_host_memory_are_copied_for_another_device(tmp_path: Path) -> None:
    tensors = components.random_tensors(3)
    with running_daemon(tmp_path) as daemon, daemon.client() as client:
        held = client.hand_over(
            components.describe(tensors, "encoder"),
            "cpu",
            lambda writer: writer.copy_tensors(tensors),
        )

        def opened(device: str) -> OpenComponent:
            found = OpenComponent(held.component, held.hold(), torch.device(device))
            found.copy()
            return found

        assert opened("cpu").copied_bytes == 0
        # As a GPU: another device, to which everything has to be moved.
        moved = opened("meta")
        assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
        assert moved.copied_bytes == sum(tensor.nbytes for tensor in tensors.values())
        held.release()
