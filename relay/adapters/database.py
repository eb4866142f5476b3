"""The connection to PostgreSQL or SQLite: pool, transactions, deadlines, migrations, and what its errors mean.

What is stored is the business of `relay.adapters.store`.
"""

import asyncio
import inspect
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from datetime import datetime, timedelta
from typing import Self, TypeVar, cast

import asyncpg
from pydantic import BaseModel, PositiveFloat, PositiveInt, SecretStr, field_validator
from sqlalchemy import URL, ColumnElement, Connection, Table, bindparam, event, func, make_url, text
from sqlalchemy import inspect as inspector
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import AdaptedConnection, DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from relay.adapters.migrations.tables import NEWEST, VERSION_TABLE, Moment
from relay.core.errors import CorruptState, RelayError, Unavailable, WrongSettings
from relay.ports import Clock

T = TypeVar("T")

_POSTGRES = ("postgresql+asyncpg", "postgresql", "postgres")
_SQLITE = ("sqlite+aiosqlite", "sqlite")
_ADVISORY_LOCK = 0x52454C4159  # any number, the same in every process: one migrates at a time
_BUSY_TIMEOUT_MILLISECONDS = 100  # within SQLite, where a cancelled task waits for its end
_BUSY_PAUSE_SECONDS = 0.02
_GOODBYE_SECONDS = 0.5  # to have PostgreSQL cancel what it still does for a connection, and to close that
_PATIENCE_OF_SERVER = 2  # operations' time that PostgreSQL waits for the next word within a transaction


class DatabaseSettings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """Where the relay keeps its state.

    `url` is `postgresql://user:password@host/database` (also `postgres://` and `postgresql+asyncpg://`; the query is
    libpq's: `?sslmode=verify-full&sslrootcert=…`) or `sqlite:///file` (also `sqlite+aiosqlite:///file`; with four
    slashes an absolute path). SQLite serves one process that writes; more workers need PostgreSQL.
    """

    url: SecretStr = SecretStr("sqlite+aiosqlite:///relay.db")
    pool_size: PositiveInt = 5
    operation_timeout_seconds: PositiveFloat = 10.0

    @field_validator("url")
    @classmethod
    def _known(cls, value: SecretStr) -> SecretStr:
        try:
            url = make_url(value.get_secret_value())
        except ArgumentError:
            raise ValueError(
                "not a database URL: expected postgresql://user:password@host/name or sqlite:///file"
            ) from None
        if url.drivername in _SQLITE:
            if url.host or not url.database or url.database == ":memory:" or url.query:
                raise ValueError(
                    "SQLite needs a file and nothing else: sqlite:///relay.db or sqlite:////var/lib/relay.db"
                )
        elif url.drivername not in _POSTGRES:
            raise ValueError(f"unknown kind of database {url.drivername!r}: expected postgresql:// or sqlite:///")
        return value

    @property
    def parsed(self) -> URL:
        """The URL in parts."""
        return make_url(self.url.get_secret_value())

    @property
    def safe_url(self) -> str:
        """The URL for logs and errors: without password and query."""
        return self.parsed.set(query={}).render_as_string(hide_password=True)

    @property
    def sqlite(self) -> bool:
        """True for a file of this machine."""
        return self.parsed.drivername in _SQLITE


class Database:
    """Transactions on one database. Each ends within the operation's deadline and raises what its errors mean.

    Nothing is repeated here: after `Unavailable` the caller does the same again, on a new connection if the old died.
    """

    def __init__(self, settings: DatabaseSettings, clock: Clock) -> None:
        self.safe_url = settings.safe_url
        self.sqlite = settings.sqlite
        self._file = settings.parsed.database if settings.sqlite else None
        self._clock = clock
        self._deadline = settings.operation_timeout_seconds
        self._engine = _sqlite_engine(settings) if settings.sqlite else _postgres_engine(settings)
        # What one reading transaction sees belongs together: sums and the rows that they rest on.
        self._reader = (
            self._engine if self.sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )
        self._writer = self._engine.execution_options(writes=True)
        self._alone = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        # SQLite has one writer: tasks of this process queue here, in order.
        self._writers: AbstractAsyncContextManager[object] = asyncio.Lock() if self.sqlite else nullcontext()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads."""
        with database_errors(self.safe_url):
            async with asyncio.timeout(self._deadline), self._transaction(self._reader) as connection:
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: all of it is stored when the block ends, nothing if it raises.

        `Unavailable` at its very end leaves open which of the two it was.
        """
        with database_errors(self.safe_url):
            async with (
                asyncio.timeout(self._deadline),
                self._writers,
                self._transaction(self._writer) as connection,
            ):
                yield connection

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[AsyncConnection]:
        """For one statement that is a transaction by itself, so that it needs no round trips for BEGIN and COMMIT.

        In SQLite, which has no round trips, it can only read.
        """
        engine = self._reader if self.sqlite else self._alone
        with database_errors(self.safe_url):
            async with asyncio.timeout(self._deadline), self._transaction(engine) as connection:
                yield connection

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        async with AsyncExitStack() as stack:
            connection = await _begin(engine, stack)
            yield connection
            await connection.commit()  # else the exit rolls it back

    def now(self, *, plus_seconds: float = 0.0) -> ColumnElement[datetime]:
        """The time as SQL: PostgreSQL's own clock, because workers' clocks differ; SQLite's process has one clock."""
        if self.sqlite:
            later = timedelta(seconds=plus_seconds)  # than the statement is executed
            return bindparam(None, callable_=lambda: self._clock.now() + later, type_=Moment)
        # Not `now()`, which is when the transaction began: it may have waited for a lock since.
        moment = func.clock_timestamp(type_=Moment)
        return moment + func.make_interval(0, 0, 0, 0, 0, 0, plus_seconds) if plus_seconds else moment

    def insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """An INSERT that knows ON CONFLICT."""
        return sqlite.insert(table) if self.sqlite else postgresql.insert(table)

    async def prepare(self, *, migrate: bool) -> None:
        """Make sure that the tables are those of this code; bring older ones there when asked to.

        Raises:
            WrongSettings: They are not, and may not or cannot be changed.
        """
        found = await self.version()
        if found == NEWEST:
            return
        from relay.adapters.migrations import upgrade  # noqa: PLC0415  # Alembic is slow to import, and seldom needed

        if found is not None and found not in upgrade.revisions():
            raise WrongSettings(
                f"database {self.safe_url} is of a newer relay (schema {found}): upgrade the relay,"
                " or restore the database that belongs to this version"
            )
        if not migrate:
            raise WrongSettings(
                f"database {self.safe_url} has schema {found or 'none'}, this relay needs {NEWEST}: run `relay migrate`"
            )
        with database_errors(self.safe_url, opening=True):
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self._deadline):  # not for the migration itself: large tables take long
                    connection = await _begin(self._writer, stack)
                    if not self.sqlite:  # there, BEGIN IMMEDIATE was the lock
                        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                await connection.run_sync(upgrade.to_newest)
                await connection.commit()

    async def version(self) -> str | None:
        """Revision of the tables; None for an empty database."""
        with database_errors(self.safe_url, opening=True):
            if self._file is not None:
                # A file that cannot be opened is found here: aiosqlite would leave a thread behind that outlives the
                # loop and ends with a traceback, right after the clear error.
                await asyncio.to_thread(lambda file: sqlite3.connect(file).close(), self._file)
            async with asyncio.timeout(self._deadline), self._transaction(self._reader) as connection:
                return await connection.run_sync(_revision)


@asynccontextmanager
async def open_database(settings: DatabaseSettings, clock: Clock, *, migrate: bool) -> AsyncIterator[Database]:
    """A database with the tables of this code.

    Raises:
        Unavailable: It is down, or still starting. Wait and repeat.
        WrongSettings: It refuses the password, does not exist, or has other tables.
    """
    async with Database(settings, clock) as database:
        await database.prepare(migrate=migrate)
        yield database


async def migrate(settings: DatabaseSettings, clock: Clock) -> None:
    """Bring the tables of an older or empty database to those of this code.

    Raises: as `open_database`.
    """
    async with open_database(settings, clock, migrate=True):
        pass


async def schema_version(settings: DatabaseSettings, clock: Clock) -> str | None:
    """Revision of the database's tables; None when it has none of ours."""
    async with Database(settings, clock) as database:
        return await database.version()


async def _begin(engine: AsyncEngine, stack: AsyncExitStack) -> AsyncConnection:
    """A connection that began a transaction; `stack` closes it.

    While another process has SQLite's lock it tries again. SQLite could wait by itself, but not be cancelled.
    """
    while True:
        connection = engine.connect()
        if engine.dialect.name == "sqlite":
            connection = cast(AsyncConnection, _Uninterrupted(connection))
        stack.push_async_callback(_close, connection)
        try:
            await connection.start()
            await connection.begin()
            return connection
        except DBAPIError as exc:
            if _sqlite_code(exc.orig) != sqlite3.SQLITE_BUSY:
                raise
            await stack.aclose()
        await asyncio.sleep(_BUSY_PAUSE_SECONDS)


async def _close(connection: AsyncConnection) -> None:
    if connection.sync_connection is not None:  # it was started
        await connection.close()


class _Uninterrupted:
    """A connection to SQLite whose calls are seen to their end, however soon the task is cancelled.

    They run in a thread. SQLAlchemy gives up a connection whose call was interrupted, and sometimes the thread goes on
    to begin a transaction that nobody ends: the file is locked from then on. No call takes longer than the busy
    timeout.
    """

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def begin(self) -> None:
        await _finished(self._connection.begin().start())

    def __getattr__(self, name: str) -> object:
        attribute = getattr(self._connection, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute

        async def call(*args: object, **named: object) -> object:
            return await _finished(attribute(*args, **named))

        return call


async def _finished(work: Coroutine[object, object, T]) -> T:
    """Its result; a cancellation takes effect when the work is done."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        task.exception()  # nobody asks for it any more
        raise cancelled
    return task.result()


# --- engines -------------------------------------------------------------------------------------------------------


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no type hints
    """One that fell silent is closed all the same, and soon.

    SQLAlchemy would wait for its last word: 2 s after its user was cancelled, who may have a lease to renew on another
    connection, and without end when the pool is closed.
    """

    async def close(self, **_: object) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await super().close()  # aborts it when cancelled


def _postgres_engine(settings: DatabaseSettings) -> AsyncEngine:
    url = settings.parsed
    query = {"sslmode" if name == "ssl" else name: value for name, value in url.query.items()}
    arguments: dict[str, object] = {
        # asyncpg reads the URL itself, to understand all that libpq does.
        "dsn": url.set(drivername="postgresql", query=query).render_as_string(hide_password=False),
        "connection_class": _Connection,
    }
    if "application_name" not in query:
        arguments["server_settings"] = {"application_name": "coder-chat-relay"}
    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args=arguments,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.operation_timeout_seconds,
        hide_parameters=True,  # else message text gets into errors
    )
    patience = settings.operation_timeout_seconds * _PATIENCE_OF_SERVER
    # Of a client that is gone without a word the server learns after hours, and as long its rows stay locked. Its own
    # limit does not count once a statement is prepared and not yet executed: then only the link can tell.
    limits = {
        "idle_in_transaction_session_timeout": int(patience * 1000),
        "tcp_user_timeout": int(patience * 1000),  # while an answer is on its way
        "tcp_keepalives_idle": max(1, int(patience / 2)),
        "tcp_keepalives_interval": max(1, int(patience / 6)),
        "tcp_keepalives_count": 3,
    }

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: DBAPIConnection, _: object) -> None:
        adapted = cast(AdaptedConnection, connection)
        adapted.run_async(lambda driver: driver.execute(";".join(f"SET {name} = {limits[name]}" for name in limits)))

    @event.listens_for(engine.sync_engine, "checkout")
    def checkout(connection: DBAPIConnection, _: object, __: object) -> None:
        # Those of before a restart of the server are replaced, not handed out. The socket tells; a ping (SQLAlchemy's
        # `pool_pre_ping`) would be three round trips before each operation, twice as long as what most of them take.
        if cast(AdaptedConnection, connection).driver_connection.is_closed():
            raise InvalidatePoolError("the server has closed the connection")

    return engine


def _sqlite_engine(settings: DatabaseSettings) -> AsyncEngine:
    engine = create_async_engine(
        settings.parsed.set(drivername="sqlite+aiosqlite"),
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.operation_timeout_seconds,
        hide_parameters=True,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: DBAPIConnection, _: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions late, and none for DDL
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MILLISECONDS}")
        cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for each other
        cursor.execute("PRAGMA synchronous = FULL")  # what was acknowledged outlives a power cut
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that first reads and then writes would fail, not wait, when another wrote in between.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _revision(connection: Connection) -> str | None:
    if not inspector(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one_or_none()  # noqa: S608
    return found


# --- errors --------------------------------------------------------------------------------------------------------

# By SQLSTATE, the longest prefix first.
_STATES: dict[str, tuple[type[RelayError], str]] = {
    "28": (WrongSettings, "check user and password"),
    "3D000": (WrongSettings, "create the database, or correct its name"),
    "42501": (WrongSettings, "grant the user the rights to create and use tables there"),
    "42P01": (CorruptState, "a table is missing; restore the database"),
    "42703": (CorruptState, "a column is missing; restore the database"),
    "08": (Unavailable, "connection lost"),
    "0A000": (Unavailable, "the tables were changed meanwhile"),  # a cached plan of before a migration
    "25006": (Unavailable, "it takes no writes now"),  # a replica, until the failover is through
    "40": (Unavailable, "it gave way to another transaction"),
    "53": (Unavailable, "it is out of resources"),
    "55P03": (Unavailable, "a lock was not free in time"),
    "57": (Unavailable, "it is starting, stopping or cancelled the query"),
    "58": (Unavailable, "its disk failed"),
}

# By SQLite's primary result code.
_CODES: dict[int, tuple[type[RelayError], str]] = {
    sqlite3.SQLITE_BUSY: (Unavailable, "another process writes"),
    sqlite3.SQLITE_LOCKED: (Unavailable, "another connection writes"),
    sqlite3.SQLITE_NOMEM: (Unavailable, "out of memory"),
    sqlite3.SQLITE_READONLY: (WrongSettings, "make the file and its directory writable"),
    sqlite3.SQLITE_IOERR: (Unavailable, "its disk failed"),
    sqlite3.SQLITE_CORRUPT: (CorruptState, "the file is damaged; restore it"),
    sqlite3.SQLITE_FULL: (Unavailable, "its disk is full"),
    sqlite3.SQLITE_CANTOPEN: (WrongSettings, "its directory must exist and be writable"),
    sqlite3.SQLITE_NOTADB: (WrongSettings, "the file is no SQLite database"),
}


@contextmanager
def database_errors(safe_url: str, *, opening: bool = False) -> Iterator[None]:
    """Raise what an error of the database means. While opening, any other of its errors is one of the settings."""
    try:
        yield
    except (TimeoutError, PoolTimeout) as exc:
        raise Unavailable(f"database {safe_url} did not answer in time") from exc
    except OSError as exc:
        raise Unavailable(f"database {safe_url} cannot be reached: {exc.strerror or type(exc).__name__}") from exc
    except (DBAPIError, sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        meaning = _meaning(exc)
        if meaning is None and opening:
            meaning = WrongSettings, "check the URL"
        if meaning is None:
            raise
        kind, hint = meaning
        cause = exc.orig if isinstance(exc, DBAPIError) else exc
        raise kind(f"database {safe_url}: {str(cause).rpartition('>: ')[2]} ({hint})") from exc


def _meaning(exc: BaseException) -> tuple[type[RelayError], str] | None:
    if isinstance(exc, DBAPIError) and exc.connection_invalidated:
        return _STATES["08"]
    cause: BaseException | None = exc.orig if isinstance(exc, DBAPIError) else exc
    while cause is not None:
        state = getattr(cause, "sqlstate", None)
        if isinstance(state, str):
            return next((_STATES[state[:size]] for size in (5, 2) if state[:size] in _STATES), None)
        code = _sqlite_code(cause)
        if code is not None:
            return _CODES.get(code)
        cause = cause.__cause__
    return None


def _sqlite_code(exc: BaseException | None) -> int | None:
    """SQLite's primary result code, None for any other error."""
    code = getattr(exc, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None
