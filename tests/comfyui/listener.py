"""What a ComfyUI server tells a browser over its WebSocket, recorded with times."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 2.0
# The first four bytes of a binary message.
PREVIEW, UNENCODED_PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 2, 3, 4


@dataclass(frozen=True)
class Event:
    """One message.

    ``name`` is its "type", or "preview" or "text" where it is binary: then ``binary`` has the type
    on the wire. ``at`` is of `time.monotonic`. A preview's ``image`` is a whole JPEG or PNG file.
    """

    at: float
    name: str
    data: dict[str, Any] = field(default_factory=dict)
    image: bytes = b""
    binary: int | None = None


class Listener:
    """A WebSocket connection in a thread of its own; ``client_id`` goes with the prompts.

    ``previews_with_metadata``: as today's front end asks for them, which tells the node. Without,
    previews arrive as older ones know them.
    """

    def __init__(self, port: int, *, previews_with_metadata: bool = True) -> None:
        self.client_id = uuid.uuid4().hex
        self._url = f"http://127.0.0.1:{port}/ws?clientId={self.client_id}"
        self._flags = {"supports_preview_metadata": previews_with_metadata}
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="ComfyUI listener")
        self._thread.start()
        try:
            self.wait_for(lambda event: event.name == "feature_flags", CONNECT_SECONDS)
        except AssertionError:
            self.close()
            raise

    @property
    def events(self) -> list[Event]:
        """All so far, oldest first."""
        with self._changed:
            return list(self._events)

    def named(self, name: str, prompt_id: str | None = None) -> list[Event]:
        """The events of that name, of that prompt."""
        return [
            event
            for event in self.events
            if event.name == name and prompt_id in (None, event.data.get("prompt_id"))
        ]

    def wait_for(self, wanted: Callable[[Event], bool], seconds: float = 30.0) -> Event:
        """The first event that is wanted, past ones included."""
        deadline = time.monotonic() + seconds
        seen = 0
        with self._changed:
            while True:
                for event in self._events[seen:]:
                    if wanted(event):
                        return event
                seen = len(self._events)
                left = deadline - time.monotonic()
                names = [event.name for event in self._events]
                assert left > 0, f"no such event in {seconds} s, only {names}"
                assert not self._closed, f"the connection ended after {names}"
                self._changed.wait(left)

    def wait_until_done(self, prompt_id: str, seconds: float = 10.0) -> Event:
        """The event that ends the prompt: nothing of it comes later."""
        return self.wait_for(
            lambda event: (
                event.name == "executing"
                and event.data["node"] is None
                and event.data.get("prompt_id") == prompt_id
            ),
            seconds,
        )

    def close(self) -> None:
        """End the connection and the thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._listen())
        except aiohttp.ClientError:
            pass  # no server, or it went away: who waits is told below
        finally:
            self._loop.close()
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    async def _listen(self) -> None:
        timeout = aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS)
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(self._url, max_msg_size=0, timeout=timeout) as socket,
        ):
            await socket.send_json({"type": "feature_flags", "data": self._flags})
            stop = asyncio.create_task(self._stop.wait())
            receive = asyncio.create_task(self._receive(socket))
            await asyncio.wait({stop, receive}, return_when=asyncio.FIRST_COMPLETED)
            for task in (stop, receive):
                task.cancel()
            await asyncio.gather(stop, receive, return_exceptions=True)

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                event = _parse_text(message.data)
            elif message.type == aiohttp.WSMsgType.BINARY:
                event = _parse_binary(message.data)
            else:
                return
            with self._changed:
                self._events.append(event)
                self._changed.notify_all()


def _parse_text(text: str) -> Event:
    message = json.loads(text)
    return Event(time.monotonic(), message["type"], message["data"])


def _parse_binary(message: bytes) -> Event:
    kind, number = struct.unpack_from(">II", message)
    rest = message[8:]
    now = time.monotonic()
    if kind == PREVIEW:
        data = {"image_type": {1: "image/jpeg", 2: "image/png"}[number]}
        return Event(now, "preview", data, rest, kind)
    if kind == PREVIEW_WITH_METADATA:
        return Event(now, "preview", json.loads(rest[:number]), rest[number:], kind)
    if kind == TEXT:
        data = {"node": rest[:number].decode(), "text": rest[number:].decode()}
        return Event(now, "text", data, binary=kind)
    return Event(now, "unknown", {}, message, kind)
