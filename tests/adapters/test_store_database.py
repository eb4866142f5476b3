"""Opening a database, bringing its tables up to date, and what its errors come out as."""

import asyncio
import json
import random
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pydantic import ValidationError
from sqlalchemy import Connection, MetaData, insert, text
from sqlalchemy.exc import IntegrityError

from relay.adapters.clock import SystemClock
from relay.adapters.database import Database, DatabaseSettings, migrate, schema_version
from relay.adapters.migrations import upgrade
from relay.adapters.migrations.tables import NEWEST, VERSION_TABLE, collected_chats, collected_messages, metadata
from relay.adapters.store import open_store
from relay.core.errors import CorruptState, RelayError, Unavailable, WrongSettings
from relay.core.events import ChatRef
from relay.ports import Clock
from tests.adapters.broker import Proxy
from tests.adapters.test_claims import CHAT, CHILD, OTHER, claimed, first_save, working

HEAD = "0004"


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseSettings:
    """Not even tables."""
    if request.param == "sqlite":
        return DatabaseSettings(url=f"sqlite:///{tmp_path}/empty.db")
    return DatabaseSettings(url=request.getfixturevalue("postgres_database"))


def with_url(settings: DatabaseSettings, **parts: object) -> DatabaseSettings:
    return settings.model_copy(update={"url": type(settings.url)(_url(settings, **parts))})


def _url(settings: DatabaseSettings, **parts: object) -> str:
    return settings.parsed.set(**parts).render_as_string(hide_password=False)  # type: ignore[arg-type]


def impatient(settings: DatabaseSettings) -> DatabaseSettings:
    return settings.model_copy(update={"operation_timeout_seconds": 0.5})


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("postgresql://u:secret@host:5433/db?sslmode=require&password=secret", "postgresql://u:***@host:5433/db"),
        ("postgres://u:secret@host/db", "postgres://u:***@host/db"),
        ("postgresql+asyncpg://u@host/db", "postgresql+asyncpg://u@host/db"),
        ("sqlite:///relay.db", "sqlite:///relay.db"),
        ("sqlite+aiosqlite:////var/lib/relay.db", "sqlite+aiosqlite:////var/lib/relay.db"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, safe: str) -> None:
    settings = DatabaseSettings(url=url)
    assert settings.safe_url == safe
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("mysql://u:secret@host/db", "postgresql:// or sqlite:///"),
        ("u:secret@host/db", "not a database URL"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:///relay.db?mode=secret", "needs a file"),
        ("sqlite://secret/relay.db", "needs a file"),
    ],
)
def test_a_url_that_cannot_work_is_told_at_once_and_not_repeated(url: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=hint) as caught:
        DatabaseSettings(url=url)
    assert "secret" not in str(caught.value)


# --- migrations ----------------------------------------------------------------------------------------------------


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
    )
    return list(compare_metadata(context, metadata))


async def test_the_migrations_make_exactly_the_tables_that_the_code_uses(
    empty_database: DatabaseSettings, clock: Clock
) -> None:
    await migrate(empty_database, clock)
    async with Database(empty_database, clock) as database, database.reading() as connection:
        assert await connection.run_sync(differences) == []


def test_the_newest_migration_is_the_one_that_the_code_asks_for() -> None:
    assert upgrade.revisions()[0] == NEWEST == HEAD


async def test_opening_makes_the_tables(empty_database: DatabaseSettings, clock: Clock) -> None:
    assert await schema_version(empty_database, clock) is None
    async with open_store(empty_database, clock) as store:
        await store.check()
        await claimed(store)
    assert await schema_version(empty_database, clock) == HEAD
    async with open_store(empty_database, clock, migrate=False) as store:
        assert len(await store.records(CHAT.deployment)) == 1


async def test_without_leave_to_migrate_missing_tables_are_told(empty_database: DatabaseSettings, clock: Clock) -> None:
    with pytest.raises(WrongSettings, match=r"has schema none, this relay needs 0004: run `relay migrate`"):
        async with open_store(empty_database, clock, migrate=False):
            pass
    assert await schema_version(empty_database, clock) is None


def first_tables(connection: Connection) -> None:
    config = upgrade._config()
    config.attributes["connection"] = connection
    command.upgrade(config, "0001")


def second_tables(connection: Connection) -> None:
    config = upgrade._config()
    config.attributes["connection"] = connection
    command.upgrade(config, "0002")


async def test_claims_of_an_older_database_wait_for_a_worker_with_all_that_was_saved(
    empty_database: DatabaseSettings, clock: Clock
) -> None:
    async with Database(empty_database, clock) as database, database.writing() as connection:
        await connection.run_sync(second_tables)
        older = MetaData()
        await connection.run_sync(lambda sync: older.reflect(sync, only=["claims", "known_messages"]))
        lease = 1_772_366_400_000_000 if database.sqlite else datetime(2026, 3, 1, 12, tzinfo=UTC)
        for chat, held in ((CHAT, True), (CHILD, False)):
            key = {"deployment": chat.deployment, "chat_id": chat.chat_id.hex if database.sqlite else chat.chat_id}
            row = key | {"session": 7, "seen": "digest", "clean": not held, "resume": b'{"after": 5}'}
            row |= {"worker": "old" if held else None, "lease_until": lease if held else None}
            row |= {"owner_id": chat.owner_id.hex, "root_chat_id": chat.root_chat_id.hex}
            await connection.execute(insert(older.tables["claims"]).values(row))
            await connection.execute(insert(older.tables["known_messages"]).values(key | {"message_id": 5}))
    async with open_store(empty_database, clock) as store:
        await working(store, "new")
        records = await store.records(CHAT.deployment)
        assert [(r.seen, r.worker, r.clean) for r in records] == [("digest", None, False), ("digest", None, True)]
        (claim,) = await store.adopt("new", limit=9)
        assert (claim.chat, claim.session, claim.resume.clean) == (CHAT, 8, False)
        rested = await claimed(store, chat=CHILD)
        assert [c.resume.known | {c.resume.after} for c in (claim, rested)] == [{5}, {5}]


async def test_archived_chats_of_an_older_database_get_the_time_of_their_archiving(
    empty_database: DatabaseSettings, clock: Clock
) -> None:
    async with Database(empty_database, clock) as database, database.writing() as connection:
        await connection.run_sync(first_tables)
    rows = [
        (1, True, {"updated_at": "2026-02-01T12:00:00.123456789+02:00"}),
        (2, False, {"updated_at": "2026-02-01T10:00:00Z"}),
        (3, True, {"updated_at": "soon"}),
        (4, True, None),
    ]
    zeros = {f"{aspect}_{half}": 1 for aspect in ("history", "status", "lifecycle") for half in ("session", "position")}
    async with Database(empty_database, clock) as database, database.writing() as connection:
        for number, archived, chat in rows:
            values = {
                "deployment": "https://coder.example",
                "chat_id": UUID(int=number),
                "owner_id": UUID(int=9),
                "root_chat_id": UUID(int=number),
                "archived": archived,
                "chat": None if chat is None else json.dumps(chat).encode(),
                "changed_at": clock.now(),
                **zeros,
            }
            await connection.execute(database.insert(collected_chats).values(values))
    async with open_store(empty_database, clock) as store:
        found = await store.endangered("https://coder.example", archived_before=datetime(2999, 1, 1, tzinfo=UTC))
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    at = datetime(2026, 2, 1, 10, 0, 0, 123456, tzinfo=UTC)
    assert {each.chat.chat_id.int: each.archived_at for each in found} == {1: at, 3: epoch, 4: epoch}


@pytest.mark.parametrize("may_migrate", [True, False])
async def test_a_database_of_a_newer_relay_is_left_alone(
    empty_database: DatabaseSettings, clock: Clock, may_migrate: bool
) -> None:
    await migrate(empty_database, clock)
    async with Database(empty_database, clock) as database, database.writing() as connection:
        await connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(WrongSettings, match=r"newer relay \(schema 9999\): upgrade the relay"):
        async with open_store(empty_database, clock, migrate=may_migrate):
            pass


async def test_a_database_with_other_tables_of_our_names_is_not_touched(
    empty_database: DatabaseSettings, clock: Clock
) -> None:
    async with Database(empty_database, clock) as database, database.writing() as connection:
        await connection.execute(text("CREATE TABLE alerts (of_somebody_else INTEGER)"))
    with pytest.raises(WrongSettings, match="alerts"):
        await migrate(empty_database, clock)
    assert await schema_version(empty_database, clock) is None
    async with Database(empty_database, clock) as database, database.reading() as connection:
        assert await connection.run_sync(lambda sync: sync.dialect.get_table_names(sync)) == ["alerts"]


OPEN = """
import asyncio, sys
from relay.adapters.clock import SystemClock
from relay.adapters.store import DatabaseSettings, open_store

async def main():
    url = sys.stdin.readline().strip()
    async with open_store(DatabaseSettings(url=url, operation_timeout_seconds=60), SystemClock()) as store:
        await store.check()

asyncio.run(main())
"""


async def test_processes_that_start_at_once_make_the_tables_once(empty_database: DatabaseSettings) -> None:
    url = empty_database.url.get_secret_value().encode()
    pipe = asyncio.subprocess.PIPE
    started = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", OPEN, stdin=pipe, stderr=pipe) for _ in range(3)
    ]
    errors = await asyncio.gather(*(process.communicate(url) for process in started))
    assert [(process.returncode, error) for process, (_, error) in zip(started, errors, strict=True)] == [(0, b"")] * 3


async def test_tasks_that_start_at_once_make_the_tables_once(empty_database: DatabaseSettings, clock: Clock) -> None:
    await asyncio.gather(*(migrate(empty_database, clock) for _ in range(5)))
    assert await schema_version(empty_database, clock) == HEAD


# --- errors of both ------------------------------------------------------------------------------------------------


async def test_an_error_of_ours_shows_no_message_text(behind: Database) -> None:
    orphan = {"deployment": "x", "chat_id": CHAT.chat_id, "message_id": 1, "by_user": True, "session": 1, "position": 1}
    with pytest.raises(IntegrityError) as caught:
        async with behind.writing() as connection:
            await connection.execute(insert(collected_messages).values(orphan | {"body": b"the plan is secret"}))
    assert "plan" not in str(caught.value)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34])
async def test_an_operation_cancelled_at_any_point_leaves_the_store_usable(
    database_settings: DatabaseSettings, turns: int
) -> None:
    async with open_store(database_settings, SystemClock()) as store:
        claim = await claimed(store)
        save = asyncio.create_task(store.save(claim, first_save(1)))
        for _ in range(turns):
            await asyncio.sleep(0)
        save.cancel()
        await asyncio.wait([save])
        await store.save(claim, first_save(2))
        known = (await claimed(store)).resume.known
        assert known == {1, 2} if not save.cancelled() else known in ({2}, {1, 2})


async def test_many_operations_cancelled_at_once_leave_no_lock_behind(empty_database: DatabaseSettings) -> None:
    """As followers are, when their worker stops."""
    chance = random.Random(3)
    async with open_store(empty_database, SystemClock()) as store:
        for name in range(8):
            await working(store, str(name))
        for _ in range(60):
            claims = [asyncio.create_task(store.claim(CHAT, str(name))) for name in range(8)]
            await asyncio.sleep(chance.uniform(0, 0.01))
            for claim in claims:
                claim.cancel()
            await asyncio.wait(claims)
            await store.resign("nobody")


async def test_an_operation_cancelled_while_it_waits_for_a_writer_is_gone(
    database_settings: DatabaseSettings, behind: Database
) -> None:
    async with open_store(database_settings, SystemClock()) as store:
        claim = await claimed(store)
        async with behind.writing() as connection:
            await connection.execute(text("UPDATE claims SET seen = 'x'"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(store.save(claim, first_save(1)), timeout=0.2)
        await store.save(claim, first_save(2))
        assert (await claimed(store)).resume.known == {2}


async def test_more_tasks_than_connections_wait_for_each_other(database_settings: DatabaseSettings) -> None:
    few = database_settings.model_copy(update={"pool_size": 2})
    chats = [ChatRef("https://x", UUID(int=n), CHAT.owner_id, CHAT.root_chat_id) for n in range(40)]
    async with open_store(few, SystemClock()) as store:
        await working(store, "a")

        async def follow(chat: ChatRef) -> frozenset[int]:
            claim = await claimed(store, chat=chat)
            for number in (1, 2, 3):
                await store.save(claim, first_save(number))
            return (await claimed(store, chat=chat)).resume.known

        assert await asyncio.gather(*map(follow, chats)) == [{1, 2, 3}] * 40


async def test_another_writer_that_does_not_end_is_not_waited_for_for_ever(
    database_settings: DatabaseSettings, behind: Database
) -> None:
    async with open_store(impatient(database_settings), SystemClock()) as store:
        claim = await claimed(store)
        async with behind.writing() as connection:
            await connection.execute(text("UPDATE claims SET seen = 'x'"))
            with pytest.raises(Unavailable):
                await store.save(claim, first_save(1))
        await store.save(claim, first_save(1))


# --- PostgreSQL ----------------------------------------------------------------------------------------------------


async def test_a_server_that_is_down_is_unavailable(
    postgres_settings: DatabaseSettings, clock: Clock, unused_tcp_port: int
) -> None:
    down = with_url(postgres_settings, port=unused_tcp_port, password="secret")
    with pytest.raises(Unavailable, match=r"cannot be reached") as caught:
        async with open_store(down, clock):
            pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "hint"),
    [
        pytest.param({"username": "nobody_here", "password": "secret"}, "check user and password", id="unknown user"),
        pytest.param({"database": "nothing_here"}, "create the database", id="unknown database"),
        pytest.param({"query": {"sslmode": "maybe"}}, "check the URL", id="an option that does not exist"),
        pytest.param({"query": {"no_such_setting": "1"}}, "check the URL", id="a setting that does not exist"),
    ],
)
async def test_a_server_that_refuses_us_tells_what_to_correct(
    postgres_settings: DatabaseSettings, clock: Clock, parts: dict[str, object], hint: str
) -> None:
    with pytest.raises(WrongSettings, match=hint) as caught:
        async with open_store(with_url(postgres_settings, **parts), clock):
            pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("option", ["sslmode=prefer", "ssl=prefer", "application_name=mine"])
async def test_a_url_may_carry_options(postgres_settings: DatabaseSettings, clock: Clock, option: str) -> None:
    name, value = option.split("=")
    async with open_store(with_url(postgres_settings, query={name: value}), clock) as store:
        await store.check()


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("08006", Unavailable),  # connection failure
        ("57P01", Unavailable),  # the administrator stops the server
        ("57P03", Unavailable),  # it is starting
        ("53300", Unavailable),  # too many connections
        ("40001", Unavailable),  # serialization failure
        ("40P01", Unavailable),  # deadlock
        ("25006", Unavailable),  # read only: a replica
        ("58030", Unavailable),  # its disk
        ("28P01", WrongSettings),  # password
        ("42501", WrongSettings),  # rights
        ("42P01", CorruptState),  # a table is missing
    ],
)
async def test_what_an_error_of_postgres_means(
    postgres_settings: DatabaseSettings, clock: Clock, state: str, error: type[RelayError]
) -> None:
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '{state}'; END $$"
    async with Database(postgres_settings, clock) as database:
        with pytest.raises(error, match="made up"):
            async with database.writing() as connection:
                await connection.exec_driver_sql(raising)


async def end_connections(settings: DatabaseSettings) -> None:
    """As a restart of the server does."""
    server = await asyncpg.connect(_url(settings, drivername="postgresql"))
    try:
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        await server.execute(f"SELECT pg_terminate_backend(pid) {others}")
        while await server.fetchval(f"SELECT count(*) {others}"):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # the ends of the connections are heard by now
    finally:
        await server.close()


async def test_after_a_restart_of_the_server_calls_work_again(
    postgres_settings: DatabaseSettings, clock: Clock
) -> None:
    async with open_store(postgres_settings, clock) as store:
        claim = await claimed(store)
        await asyncio.gather(*(store.check() for _ in range(10)))  # several connections, now idle
        await end_connections(postgres_settings)
        await store.save(claim, first_save(1))
        await asyncio.gather(*(store.check() for _ in range(10)))


async def test_a_connection_lost_in_a_transaction_is_unavailable(
    postgres_settings: DatabaseSettings, clock: Clock
) -> None:
    async with Database(postgres_settings, clock) as database:

        async def begin_and_lose_it() -> None:
            async with database.writing() as connection:
                await connection.execute(text("SELECT 1"))
                await end_connections(postgres_settings)
                await connection.execute(text("SELECT 1"))

        with pytest.raises(Unavailable):
            await begin_and_lose_it()
        async with database.reading() as connection:
            assert (await connection.execute(text("SELECT 1"))).scalar() == 1


async def test_a_server_that_does_not_answer_is_unavailable(postgres_settings: DatabaseSettings, clock: Clock) -> None:
    async with Database(impatient(postgres_settings), clock) as database:
        with pytest.raises(Unavailable, match="did not answer in time"):
            async with asyncio.timeout(10), database.reading() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))
        async with database.reading() as connection:
            assert (await connection.execute(text("SELECT 1"))).scalar() == 1


async def test_a_port_that_accepts_and_stays_silent_is_unavailable(
    postgres_settings: DatabaseSettings, clock: Clock
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = with_url(postgres_settings, host="127.0.0.1", port=silent.getsockname()[1])
        with pytest.raises(Unavailable, match="did not answer in time"):
            async with asyncio.timeout(10), open_store(impatient(there), clock):
                pass


async def ask(database: Database) -> None:
    async with database.writing() as connection:
        await connection.execute(text("SELECT 1"))


@pytest.fixture
async def proxy(postgres_settings: DatabaseSettings) -> AsyncIterator[Proxy]:
    async with Proxy.to(postgres_settings.url.get_secret_value()) as proxy:
        yield proxy


async def test_a_connection_that_fell_silent_costs_hardly_more_than_the_time_it_was_given(
    proxy: Proxy, clock: Clock
) -> None:
    """Who has a lease to renew needs the rest of it for another connection."""
    async with Database(DatabaseSettings(url=proxy.url), clock) as database:
        await ask(database)
        assert proxy.swallow() == 1
        async with asyncio.timeout(1.5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(database), timeout=0.1)
        await ask(database)


async def test_a_connection_that_fell_silent_does_not_hold_up_the_end(proxy: Proxy, clock: Clock) -> None:
    async with asyncio.timeout(10), Database(DatabaseSettings(url=proxy.url), clock) as database:
        await ask(database)
        assert proxy.swallow() == 1


async def test_who_claims_chats_waits_for_no_row_that_another_changes(
    postgres_settings: DatabaseSettings, clock: Clock
) -> None:
    """The other may wait for a row that was just locked here."""
    async with open_store(postgres_settings, clock) as store, Database(postgres_settings, clock) as behind:
        await claimed(store)
        async with behind.writing() as connection:
            await connection.execute(text("UPDATE claims SET seen = 'x'"))
            async with asyncio.timeout(5):
                answers = await asyncio.gather(*(store.claim(chat, "a") for chat in (CHILD, CHAT, OTHER)))
        assert [claim and claim.chat for claim in answers] == [CHILD, None, OTHER]


# --- SQLite --------------------------------------------------------------------------------------------------------


async def test_a_file_in_no_directory_tells_what_to_do(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(WrongSettings, match=r"nowhere/relay\.db.*its directory must exist"):
        async with open_store(DatabaseSettings(url=f"sqlite:///{tmp_path}/nowhere/relay.db"), clock):
            pass


async def test_a_file_of_another_kind_is_not_touched(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear Sir or Madam, " * 100)
    with pytest.raises(WrongSettings, match="no SQLite database"):
        async with open_store(DatabaseSettings(url=f"sqlite:///{file}"), clock):
            pass
    assert file.read_text() == "Dear Sir or Madam, " * 100


async def test_a_damaged_file_stops_the_relay(sqlite_settings: DatabaseSettings, clock: Clock) -> None:
    file = Path(sqlite_settings.parsed.database or "")
    pages = file.read_bytes()
    file.write_bytes(pages[:4096] + b"\xff" * (len(pages) - 4096))
    with pytest.raises(CorruptState, match="damaged"):
        async with open_store(sqlite_settings, clock) as store:
            await claimed(store)


async def test_a_full_disk_is_unavailable(sqlite_settings: DatabaseSettings, clock: Clock) -> None:
    async with Database(sqlite_settings, clock) as database:

        async def fill() -> None:
            async with database.writing() as connection:
                await connection.execute(text("PRAGMA max_page_count = 1"))  # SQLite raises it to the present size
                await connection.execute(text("CREATE TABLE big AS SELECT randomblob(10000000) AS x"))

        with pytest.raises(Unavailable, match="full"):
            await fill()


async def test_what_another_process_may_see_while_one_writes(sqlite_settings: DatabaseSettings, clock: Clock) -> None:
    async with open_store(sqlite_settings, clock) as store, Database(sqlite_settings, clock) as database:
        await claimed(store, chat=CHAT)
        async with database.writing() as connection:
            await connection.execute(text("DELETE FROM claims"))
            with sqlite3.connect(sqlite_settings.parsed.database or "") as reader:
                assert reader.execute("SELECT count(*) FROM claims").fetchone() == (1,)
            reader.close()
        await claimed(store, chat=CHILD)
        assert [record.chat for record in await store.records(CHAT.deployment)] == [CHILD]


async def test_writers_that_wait_leave_the_connections_to_readers(
    sqlite_settings: DatabaseSettings, clock: Clock
) -> None:
    few = impatient(sqlite_settings).model_copy(update={"pool_size": 2})
    async with Database(few, clock) as database:

        async def write() -> None:
            async with database.writing() as connection:
                await connection.execute(text("UPDATE claims SET seen = 'x'"))

        async with database.writing():
            writers = [asyncio.create_task(write()) for _ in range(5)]
            await asyncio.sleep(0)  # now they wait for this one
            async with database.reading() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar() == 1
        await asyncio.gather(*writers)


async def test_the_lease_in_sqlite_follows_the_clock_of_the_process(
    sqlite_settings: DatabaseSettings, clock: Clock
) -> None:
    async with open_store(sqlite_settings, clock) as store:
        await working(store, "b")
        await working(store, "a", lease_seconds=15)
        assert await store.claim(CHAT, "a") is not None
        await clock.sleep(14.999999)
        assert await store.claim(CHAT, "b") is None
        await clock.sleep(0.000001)
        assert await store.claim(CHAT, "b") is not None


async def test_a_client_that_fell_silent_in_a_transaction_lets_go_of_its_rows(postgres_database: str) -> None:
    settings = DatabaseSettings(url=postgres_database, operation_timeout_seconds=1.5)
    async with Database(settings, SystemClock()) as database, database.reading() as connection:
        limit = (await connection.execute(text("SHOW idle_in_transaction_session_timeout"))).scalar_one()
    assert limit == "3s"


async def test_the_server_looks_whether_a_client_that_says_nothing_is_there(postgres_database: str) -> None:
    """Once a statement is prepared and not executed it knows no other limit, and rows stay locked."""
    settings = DatabaseSettings(url=postgres_database, operation_timeout_seconds=6.0)
    async with Database(settings, SystemClock()) as database, database.reading() as connection:
        found = await connection.execute(text("SELECT name, setting FROM pg_settings WHERE name LIKE 'tcp\\_%'"))
        assert {name: int(setting) for name, setting in found} == {
            "tcp_user_timeout": 12_000,
            "tcp_keepalives_idle": 6,
            "tcp_keepalives_interval": 2,
            "tcp_keepalives_count": 3,
        }
