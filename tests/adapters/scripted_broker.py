"""A broker that does what a test tells it to, at the moment that the test chooses.

It speaks as much AMQP 0-9-1 as a publisher needs and stores nothing. What a real broker does belongs into tests with a
real one; here stands what cannot be timed there.
"""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

import pamqp.frame
from pamqp import commands
from pamqp.common import FieldTable
from pamqp.frame import FrameTypes
from pamqp.header import ContentHeader
from yarl import URL

_FRAME = struct.Struct(">BHI")
_CAPABILITIES: FieldTable = {"publisher_confirms": True, "basic.nack": True, "connection.blocked": True}


class ScriptedBroker:
    """One at a port of its own. It confirms each message at once, unless `silent`.

    `refused` is the size of a body for which the channel is closed, as one over `max_message_size` has it.
    """

    def __init__(self) -> None:
        self.silent = False
        self.refused = -1
        self.connections = 0
        self.published: list[str] = []  # message ids
        self.after_close: list[str] = []  # names of frames that came on a channel when the client had agreed to its end
        self._writer: asyncio.StreamWriter | None = None
        self._tag = 0
        self._url = URL()

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator[Self]:
        broker = cls()
        server = await asyncio.start_server(broker._serve, "127.0.0.1", 0)
        broker._url = URL(f"amqp://relay:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}/?heartbeat=60")
        async with server:
            yield broker
            if broker._writer is not None:
                broker._writer.close()

    @property
    def url(self) -> URL:
        return self._url

    def send(self, frame: FrameTypes, channel: int = 0) -> None:
        self.send_bytes(pamqp.frame.marshal(frame, channel))

    def send_bytes(self, raw: bytes) -> None:
        assert self._writer is not None
        self._writer.write(raw)

    def confirm_all(self) -> bytes:
        """The frame that confirms everything."""
        return pamqp.frame.marshal(commands.Basic.Ack(self._tag, multiple=True), 1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.connections += 1
        closing = closed = False
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readexactly(8)
            self.send(commands.Connection.Start(0, 9, {"capabilities": _CAPABILITIES}, "PLAIN", "en_US"))
            while True:
                head = await reader.readexactly(_FRAME.size)
                _, channel, size = _FRAME.unpack(head)
                _, _, frame = pamqp.frame.unmarshal(head + await reader.readexactly(size + 1))
                if closed and channel == 1 and not isinstance(frame, commands.Channel.Open):
                    self.after_close.append(frame.name)
                match frame:
                    case commands.Connection.StartOk():
                        self.send(commands.Connection.Tune(2047, 131072, 60))
                    case commands.Connection.Open():
                        self.send(commands.Connection.OpenOk())
                    case commands.Connection.Close():
                        self.send(commands.Connection.CloseOk())
                    case commands.Channel.Open():
                        closing = closed = False
                        self._tag = 0
                        self.send(commands.Channel.OpenOk(), channel)
                    case commands.Channel.Close():
                        self.send(commands.Channel.CloseOk(), channel)
                    case commands.Channel.CloseOk():
                        closed = True
                    case commands.Confirm.Select():
                        self.send(commands.Confirm.SelectOk(), channel)
                    case ContentHeader() if not closing and frame.body_size == self.refused:
                        closing = True
                        why = f"PRECONDITION_FAILED - message size {self.refused} is larger than configured max size 1"
                        self.send(commands.Channel.Close(406, why, 60, 40), channel)
                    case ContentHeader() if not closing:
                        self.published.append(str(frame.properties.message_id))
                        self._tag += 1
                        if not self.silent:
                            self.send(commands.Basic.Ack(self._tag, multiple=False), channel)
