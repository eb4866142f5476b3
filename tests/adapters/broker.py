"""What the tests do to a broker from outside: administer it, and stand between it and its clients."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import aiormq
from aiormq.abc import AbstractChannel

from relay.adapters.topology import TOPOLOGY, Binding


class Administrator:
    """A connection of its own to one vhost, past the proxy and the code under test."""

    def __init__(self, channel: AbstractChannel) -> None:
        self.channel = channel

    @classmethod
    @asynccontextmanager
    async def of(cls, url: str) -> AsyncIterator[Self]:
        connection = aiormq.Connection(url)
        await connection.connect()
        try:
            yield cls(await connection.channel(on_return_raises=True))
        finally:
            await connection.close()

    async def unbind(self, queue: str) -> None:
        bindings = [part for part in TOPOLOGY if isinstance(part, Binding) and part.queue == queue]
        assert bindings
        for binding in bindings:
            await self.channel.queue_unbind(queue=queue, exchange=binding.exchange, routing_key=binding.pattern)

    async def delete(self, queue: str) -> None:
        await self.channel.queue_delete(queue)


class Proxy:
    """A TCP proxy in front of the broker: it can cut, refuse, swallow what passes, or let it wait.

    `url` leads to the broker through it.
    """

    def __init__(self, url: str) -> None:
        self.swallowed = 0  # bytes that went nowhere
        self.sending, self.answering = asyncio.Event(), asyncio.Event()  # cleared: what clients, brokers send waits
        self.sending.set()
        self.answering.set()
        parts = urlsplit(url)
        self._broker = (parts.hostname or "", parts.port or 5672)
        self._parts = parts
        self._port = 0
        self._server: asyncio.Server | None = None
        self._passages: set[_Passage] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator[Self]:
        proxy = cls(url)
        await proxy.accept()
        try:
            yield proxy
        finally:
            await proxy.refuse()
            await asyncio.gather(*proxy._tasks)

    @property
    def url(self) -> str:
        account = self._parts.netloc.rpartition("@")[0]
        return urlunsplit(self._parts._replace(netloc=f"{account}@127.0.0.1:{self._port}"))

    async def accept(self) -> None:
        """Listen, on the same port each time."""
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> int:
        """Cut all connections and listen no more; how many were cut."""
        self.sending.set()
        self.answering.set()
        if self._server is not None:
            self._server.close()
        return self.cut()

    def cut(self) -> int:
        """Cut all connections; how many there were."""
        for passage in self._passages:
            passage.cut()
        return len(self._passages)

    def swallow(self) -> int:
        """Let nothing pass any more on the connections there are, and close none of them; how many there are."""
        for passage in self._passages:
            passage.swallowing = True
        return len(self._passages)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._broker)
        except OSError:
            writer.transport.abort()
            return
        passage = _Passage(self, writer, far_writer)
        self._passages.add(passage)
        try:
            await asyncio.gather(
                passage.pump(reader, far_writer, self.sending), passage.pump(far_reader, writer, self.answering)
            )
        finally:
            passage.cut()
            self._passages.discard(passage)


class _Passage:
    """One client's way to the broker and back."""

    def __init__(self, proxy: Proxy, *writers: asyncio.StreamWriter) -> None:
        self.swallowing = False
        self._proxy = proxy
        self._writers = writers

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await passing.wait()
                if self.swallowing:
                    self._proxy.swallowed += len(data)
                    continue
                writer.write(data)
                await writer.drain()
        if not self.swallowing:  # else the other side is not to hear of the end either
            self.cut()


class PrivateBroker:
    """A RabbitMQ node of one test's own, to be killed, started again and starved.

    Its data lives as long as the object; its limits are low (`max_message_size` is `LARGEST`).
    """

    LARGEST = 1_000_000
    _SCRIPTS = Path("/usr/lib/rabbitmq/bin")

    def __init__(self, directory: Path, ports: Sequence[int]) -> None:
        amqp, self._distribution, self._epmd_port = ports
        self.url = f"amqp://relay:secret@127.0.0.1:{amqp}/%2F"
        self._port = amqp
        self._directory = directory
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        (directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{amqp}\ndefault_user = relay\ndefault_pass = secret\n"
            f"max_message_size = {self.LARGEST}\ndisk_free_limit.absolute = 50MB\nraft.wal_max_size_bytes = 16000000\n"
            + self._tls(free_port())
        )
        (directory / "enabled_plugins").write_text("[].\n")
        self._environment = {
            "PATH": os.environ["PATH"] + ":/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(directory),
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": f"own{amqp}@localhost",
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none"
            ),
        }

    def _tls(self, port: int) -> str:
        """Make an authority and a certificate for localhost; the lines that have the node listen with it."""
        here = self._directory
        self.tls_url = f"amqps://relay:secret@localhost:{port}/%2F"
        self.authority = here / "authority.pem"
        authority = "-x509 -newkey rsa:2048 -nodes -days 2 -keyout authority.key -out authority.pem -subj /CN=authority"
        server = "-newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost"
        signed = "-req -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial -days 2 -out server.pem"
        (here / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        for command in (f"req {authority}", f"req {server}", f"x509 {signed} -extfile names"):
            subprocess.run(["openssl", *command.split()], cwd=here, check=True, capture_output=True)
        return (
            f"listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {self.authority}\n"
            f"ssl_options.certfile = {here}/server.pem\nssl_options.keyfile = {here}/server.key\n"
            "ssl_options.verify = verify_none\nssl_options.fail_if_no_peer_cert = false\n"
        )

    @classmethod
    def is_installed(cls) -> bool:
        return (cls._SCRIPTS / "rabbitmq-server").exists()

    def start(self) -> None:
        """Return when it takes connections."""
        if self._epmd is None:  # ours, or the node starts one that outlives it
            self._epmd = self._spawn("epmd", "-port", str(self._epmd_port))
            self._until_listening(self._epmd, self._epmd_port)
        self._node = self._spawn(str(self._SCRIPTS / "rabbitmq-server"))
        self._until_listening(self._node, self._port)

    def kill(self) -> None:
        """SIGKILL to the node with all its processes."""
        assert self._node is not None
        assert self._node.poll() is None
        os.killpg(self._node.pid, signal.SIGKILL)
        self._node.wait()
        while is_listening(self._port):  # the node itself is a grandchild, and ends a moment later
            time.sleep(0.05)

    def until_remembered(self) -> None:
        """Return once a restart would find the stream that was declared: a new node notes that some moments later."""
        notes = "mnesia/*/coordination/*/names.dets"
        while not any(b"rabbit_stream_coordinator" in path.read_bytes() for path in self._directory.glob(notes)):
            time.sleep(0.1)

    def stop(self) -> None:
        for process in (self._node, self._epmd):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def control(self, *arguments: str) -> None:
        """Run rabbitmqctl."""
        assert self._spawn(str(self._SCRIPTS / "rabbitmqctl"), *arguments).wait() == 0, arguments

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._directory / "output.log").open("ab") as log:
            return subprocess.Popen(
                command,
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _until_listening(self, process: subprocess.Popen[bytes], port: int) -> None:
        while True:
            assert process.poll() is None, (self._directory / "output.log").read_text()
            if is_listening(port):
                return
            time.sleep(0.1)


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
