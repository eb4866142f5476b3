"""What all runs share, and what a run is."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.chaos.fork_server import ForkServer
from tests.chaos.servers import Servers, new_name


class Broken(AssertionError):
    """A wait for a fact came to its end, or a fault did not happen."""


@dataclass(frozen=True)
class Run:
    """One seed of a plan against one age of server. `small`: with fewer chats and deeds, for who has little time."""

    plan: str
    seed: int
    dialect: str
    small: bool = False

    def __str__(self) -> str:
        return f"{self.plan} seed {self.seed} {self.dialect}"

    @property
    def command(self) -> str:
        small = " --small" if self.small else ""
        return f'make chaos ARGS="--plan {self.plan} --seed {self.seed} --dialect {self.dialect}{small}"'


@dataclass
class Stage:
    """What all runs share: servers, a fork server, a database to copy.

    `patience`: how much more time than on a machine at ease leases, answers and ends may take.
    """

    servers: Servers
    forks: ForkServer
    template: str
    directory: Path
    patience: float = 1.0

    @classmethod
    @asynccontextmanager
    async def open(cls, directory: Path, *, patience: float = 1.0) -> AsyncIterator[Self]:
        directory.mkdir(parents=True, exist_ok=True)
        with Servers.started() as servers:
            async with AsyncExitStack() as stack:
                forks = await stack.enter_async_context(ForkServer.started())
                template = new_name()
                database = await stack.enter_async_context(servers.database(template))
                child = await forks.start(
                    "migrate", settings={"RELAY_DATABASE__URL": database}, log=directory / "migrate.log"
                )
                await child.ended.wait()
                if child.code != 0:
                    raise Broken((directory / "migrate.log").read_text())
                yield cls(servers, forks, template, directory, patience)
