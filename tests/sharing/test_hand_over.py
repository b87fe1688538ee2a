"""A component is handed over once and mapped by everybody, on every platform."""

from __future__ import annotations

import os

import components
import pytest
import torch
from daemon_process import DaemonProcess
from platforms import Platform
from xdit_sidecar.protocol.errors import InUse, UnknownComponent
from xdit_sidecar.protocol.regions.table import process_regions


def test_the_first_client_fills_and_the_second_attaches(
    daemon: DaemonProcess, platform: Platform
) -> None:
    sources = components.random_tensors()
    component = components.describe(sources)
    with daemon.client("first") as first, daemon.client("second") as second:
        filled = first.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(sources)
        )
        attached = second.hand_over(component, platform.device, components.must_not_fill)
        for attachment in (filled, attached):
            views = attachment.tensors()
            assert views.keys() == sources.keys()
            for name, view in views.items():
                assert torch.equal(view.cpu(), sources[name])
                assert view.stride() == sources[name].stride()
                assert not view.numel() or attachment.contains(view.data_ptr())
        (copy,) = first.status().components
        assert (copy.state, len(copy.sessions)) == ("resident", 2)
        # One process opens a region once, however many attachments it has.
        assert filled.mapping is attached.mapping
        assert len(process_regions) == 1
        del views, view
        filled.release()
        attached.release()
    assert len(process_regions) == 0


def test_an_unknown_fingerprint_is_not_attached(daemon: DaemonProcess, platform: Platform) -> None:
    with daemon.client() as client:
        assert client.attach("file:" + os.urandom(32).hex(), platform.device) is None
        with pytest.raises(UnknownComponent):
            client.evict("file:" + os.urandom(32).hex(), platform.device)


def test_a_resident_component_is_not_opened_to_fill(
    daemon: DaemonProcess, platform: Platform
) -> None:
    sources = components.random_tensors()
    component = components.describe(sources)
    with daemon.client() as client:
        client.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(sources)
        ).release()
        with pytest.raises(InUse, match="attach it"):
            client.open_fill(component, platform.device)
        daemon.wait_for_status(lambda s: not s.components[0].sessions)
