"""What only RabbitMQ has: declaration, refusals, what travels beside the body, limits, metrics."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from itertools import count
from typing import NoReturn, cast
from urllib.parse import quote, urlsplit, urlunsplit

import httpx
import pytest
from aiormq.abc import DeliveredMessage
from msgspec import structs
from prometheus_client import REGISTRY
from pydantic import ValidationError

from relay.adapters.rabbit import RabbitBus, RabbitSettings, open_rabbit
from relay.adapters.topology import ARCHIVIST, DEAD_FRAMES, LOG, METER, QUEUES, TOPOLOGY, Binding, definitions
from relay.core.errors import TooLarge, Unavailable, Unroutable, WrongSettings
from tests.adapters.broker import Administrator
from tests.adapters.traffic import CHAT, PROMPT, message, preview, until_depth


@pytest.fixture
async def management(rabbit_management_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=rabbit_management_url) as client:
        yield client


@pytest.fixture
def publisher(request: pytest.FixtureRequest) -> str:
    """The way of publishing; `both_ways` runs a test with each."""
    return str(getattr(request, "param", "pipelined"))


both_ways = pytest.mark.parametrize(
    "publisher", ["pipelined", pytest.param("plain", marks=pytest.mark.long)], indirect=True
)


@pytest.fixture
async def bus(rabbit_vhost: str, publisher: str) -> AsyncIterator[RabbitBus]:
    async with open_rabbit(settings(rabbit_vhost, publisher=publisher)) as bus:
        yield bus


@pytest.fixture
async def administrator(rabbit_vhost: str) -> AsyncIterator[Administrator]:
    async with Administrator.of(rabbit_vhost) as administrator:
        yield administrator


def settings(url: str, **more: object) -> RabbitSettings:
    return RabbitSettings.model_validate({"url": url, **more})


def vhost_of(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


def with_account(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}"))


def sample(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, "a series that starts at its first rise is missed by increase()"
    return value


async def publish_for_ever(bus: RabbitBus) -> NoReturn:
    async with asyncio.timeout(PROMPT):
        for number in count(1000):
            await bus.publish([message(number)])
    raise AssertionError


async def read_stream(administrator: Administrator, number: int) -> list[DeliveredMessage]:
    """The first messages of `relay.log`."""
    channel = await administrator.channel.connection.channel()
    arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
    await channel.basic_qos(prefetch_count=number)
    await channel.basic_consume(LOG, arrived.put, arguments={"x-stream-offset": "first"})
    async with asyncio.timeout(PROMPT):
        messages = [await arrived.get() for _ in range(number)]
    await channel.close()
    return messages


# --- topology ------------------------------------------------------------------------------------------------------


async def test_the_topology_on_the_broker_is_the_one_in_the_list(
    bus: RabbitBus, rabbit_vhost: str, management: httpx.AsyncClient
) -> None:
    vhost = vhost_of(rabbit_vhost)
    queues = (await management.get(f"/api/queues/{vhost}")).json()
    assert {q["name"]: q["arguments"] for q in queues} == {q.name: dict(q.arguments) for q in QUEUES.values()}
    assert all(q["durable"] and not q["exclusive"] and not q["auto_delete"] for q in queues)
    bindings = (await management.get(f"/api/exchanges/{vhost}/coder.chats/bindings/source")).json()
    expected = {(part.queue, part.pattern) for part in TOPOLOGY if isinstance(part, Binding)}
    assert {(b["destination"], b["routing_key"]) for b in bindings} == expected
    exchange = (await management.get(f"/api/exchanges/{vhost}/coder.chats")).json()
    assert (exchange["type"], exchange["durable"]) == ("topic", True)


async def test_exported_definitions_are_the_same_topology(rabbit_vhost: str, management: httpx.AsyncClient) -> None:
    vhost = vhost_of(rabbit_vhost)
    parts = cast(Mapping[str, list[dict[str, object]]], definitions(vhost))
    unbound = {kind: [{k: v for k, v in one.items() if k != "vhost"} for one in some] for kind, some in parts.items()}
    (await management.post(f"/api/definitions/{vhost}", json=unbound)).raise_for_status()
    async with open_rabbit(settings(rabbit_vhost)) as bus:  # an argument that differs would be refused
        await bus.publish([message(1)])
        await until_depth(bus, METER, 1)


async def test_opening_twice_keeps_what_is_in_the_queues(rabbit_vhost: str) -> None:
    async with open_rabbit(settings(rabbit_vhost)) as bus:
        await bus.publish([message(1)])
    async with open_rabbit(settings(rabbit_vhost)) as bus:
        await until_depth(bus, ARCHIVIST, 1)


async def test_a_queue_with_other_arguments_is_named_and_what_to_do(
    administrator: Administrator, rabbit_vhost: str
) -> None:
    await administrator.channel.queue_declare(METER, durable=True)  # a classic one
    with pytest.raises(WrongSettings, match=rf"{METER} .*delete it"):
        async with open_rabbit(settings(rabbit_vhost)):
            pass


async def test_a_queue_deleted_unnoticed_is_missed_once_and_made_anew(
    bus: RabbitBus, administrator: Administrator
) -> None:
    assert await bus.depth(METER) == 0
    await administrator.delete(METER)
    with pytest.raises(Unavailable, match=f"no queue '{METER}'"):
        await bus.depth(METER)
    assert await bus.depth(METER) == 0


async def test_the_log_holds_every_event_previews_too(bus: RabbitBus, administrator: Administrator) -> None:
    events = [message(1), preview(2), structs.replace(message(3), family="usage", event="charged", detail="user")]
    await bus.publish(events)
    assert [m.body for m in await read_stream(administrator, 3)] == [e.encode() for e in events]


# --- refusals ------------------------------------------------------------------------------------------------------


async def test_a_refused_password_is_a_wrong_setting_and_is_not_repeated(rabbit_url: str) -> None:
    with pytest.raises(WrongSettings, match="refused user 'stranger'") as caught:
        async with open_rabbit(settings(with_account(rabbit_url, "stranger", "hunter2"))):
            pass
    assert "hunter2" not in str(caught.value) + repr(caught.value)


async def test_a_vhost_that_is_not_there_is_a_wrong_setting(rabbit_url: str) -> None:
    with pytest.raises(WrongSettings, match="vhost 'no such place'"):
        async with open_rabbit(settings(urlunsplit(urlsplit(rabbit_url)._replace(path="/no%20such%20place")))):
            pass


@pytest.fixture
async def newcomer(rabbit_vhost: str, management: httpx.AsyncClient) -> AsyncIterator[str]:
    """URL of a user without any permission on the vhost."""
    name = f"newcomer-{vhost_of(rabbit_vhost)}"
    (await management.put(f"/api/users/{name}", json={"password": "secret", "tags": ""})).raise_for_status()
    yield with_account(rabbit_vhost, name, "secret")
    (await management.delete(f"/api/users/{name}")).raise_for_status()


async def test_a_user_without_permission_for_the_vhost_is_a_wrong_setting(newcomer: str) -> None:
    with pytest.raises(WrongSettings, match="did not let user 'newcomer-"):
        async with open_rabbit(settings(newcomer)):
            pass


async def test_a_user_who_may_not_declare_is_told_what_is_missing(newcomer: str, management: httpx.AsyncClient) -> None:
    path = f"/api/permissions/{vhost_of(newcomer)}/{quote(urlsplit(newcomer).username or '')}"
    reader = {"configure": "^$", "write": ".*", "read": ".*"}
    (await management.put(path, json=reader)).raise_for_status()
    with pytest.raises(WrongSettings, match="permission"):
        async with open_rabbit(settings(newcomer)):
            pass


async def test_the_permissions_that_the_error_asks_for_are_enough(newcomer: str, management: httpx.AsyncClient) -> None:
    path = f"/api/permissions/{vhost_of(newcomer)}/{quote(urlsplit(newcomer).username or '')}"
    (await management.put(path, json={"configure": "^$", "write": "", "read": ""})).raise_for_status()
    with pytest.raises(WrongSettings) as caught:
        async with open_rabbit(settings(newcomer)):
            pass
    pattern = str(caught.value).rpartition(" for ")[2]
    everything = {"configure": pattern, "write": pattern, "read": pattern}
    (await management.put(path, json=everything)).raise_for_status()
    async with open_rabbit(settings(newcomer)) as bus, bus.tap("#") as tapped:
        await bus.publish([message(1)])
        await bus.park_frame(CHAT, b"?", "bad_json")
        async with asyncio.timeout(PROMPT):
            await anext(tapped)
        async with bus.deliveries(METER, prefetch=1) as deliveries:
            await (await anext(deliveries)).dead_letter("poison")
        await until_depth(bus, f"{METER}.dead", 1)


async def test_a_port_where_nobody_listens_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="Connect call failed"):
            async with open_rabbit(settings(f"amqp://127.0.0.1:{unused.getsockname()[1]}/")):
                pass


async def test_a_host_that_does_not_exist_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        async with open_rabbit(settings("amqp://broker.invalid/")):
            pass


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
async def test_a_port_that_says_nothing_is_given_up_in_time(scheme: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/"
        async with asyncio.timeout(PROMPT):
            with pytest.raises(Unavailable, match="did not answer"):
                async with open_rabbit(settings(url, connect_timeout_seconds=0.2)):
                    pass


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(b"", id="hangs up"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="is a web server"),
        pytest.param(b"AMQP\x00\x01\x00\x00", id="speaks AMQP 1.0 only"),
        pytest.param(b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x0b\xce", id="says nonsense"),
    ],
)
async def test_a_port_that_is_no_rabbitmq_is_unavailable(greeting: bytes) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        with pytest.raises(Unavailable):
            async with open_rabbit(settings(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}/")):
                pass


async def test_tls_to_a_port_without_it_is_a_wrong_setting(rabbit_url: str) -> None:
    with pytest.raises(WrongSettings, match="no TLS with"):
        async with open_rabbit(settings(urlunsplit(urlsplit(rabbit_url)._replace(scheme="amqps")))):
            pass


# --- settings ------------------------------------------------------------------------------------------------------


def test_the_password_shows_nowhere() -> None:
    made = settings("amqps://user:hunter2@rabbit.example:5671/chats?cafile=/etc/ca.pem")
    assert made.safe_url == "amqps://user:***@rabbit.example:5671/chats"
    assert "hunter2" not in f"{made}{made!r}"


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("amqp://user:hunter2@:port/", id="no URL"),
        pytest.param("http://user:hunter2@rabbit/", id="another scheme"),
        pytest.param("amqp:///vhost?password=hunter2", id="no host"),
    ],
)
def test_a_wrong_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(url)
    assert "hunter2" not in str(caught.value)


# --- on the wire ---------------------------------------------------------------------------------------------------


@both_ways
async def test_properties_say_what_the_body_says(bus: RabbitBus, administrator: Administrator) -> None:
    durable, transient = message(1, "user"), structs.replace(preview(2), time="0001-01-01T00:00:00Z")
    await bus.publish([durable, transient])
    told, live = [m.header.properties for m in await read_stream(administrator, 2)]
    assert told.message_id == str(durable.id)
    assert told.message_type == "io.chatrelay.chat.message.v1"
    assert told.app_id == "coder-chat-relay"
    assert told.content_type == "application/cloudevents+json"
    assert told.timestamp is not None
    assert told.timestamp.isoformat() == "2026-03-01T12:00:00+00:00"
    assert (told.delivery_mode, live.delivery_mode) == (2, 1)
    assert set(told.headers or {}) <= {"x-stream-offset"}
    assert live.timestamp is not None
    assert live.timestamp.year == 1970  # nothing earlier fits


@both_ways
async def test_a_parked_frame_says_whose_it_is(bus: RabbitBus, administrator: Administrator) -> None:
    await bus.park_frame(CHAT, b"{", "bad_json")
    await until_depth(bus, DEAD_FRAMES, 1)
    parked = await administrator.channel.basic_get(DEAD_FRAMES, no_ack=True)
    assert parked.body == b"{"
    assert parked.header.properties.delivery_mode == 2
    headers = parked.header.properties.headers or {}
    assert {name: value for name, value in headers.items() if not name.startswith("x-")} == {
        "deployment": CHAT.deployment,
        "chat_id": str(CHAT.chat_id),
        "owner_id": str(CHAT.owner_id),
        "reason": "bad_json",
    }


@both_ways
async def test_a_body_of_64_megabytes_passes_or_is_refused_for_its_size(
    bus: RabbitBus, administrator: Administrator
) -> None:
    raw = bytes(64_000_000)
    refused: TooLarge | None = None
    try:
        await bus.park_frame(CHAT, raw, "schema")
    except TooLarge as exc:
        refused = exc
    if refused is not None:  # RabbitMQ 4 takes 16 MiB unless told otherwise
        assert refused.limit < refused.size == len(raw)
    else:
        parked = await administrator.channel.basic_get(DEAD_FRAMES, no_ack=True)
        assert parked.body == raw


# --- unroutable, refused, counted ----------------------------------------------------------------------------------


@both_ways
async def test_each_copy_in_flight_of_an_event_that_nobody_takes_is_told(
    bus: RabbitBus, administrator: Administrator
) -> None:
    for queue in (METER, ARCHIVIST, LOG):
        await administrator.unbind(queue)
    same = message(1)
    returned = sample("relay_publish_total", outcome="returned")
    # Returned messages are known by their id only: the return of one copy must not be booked on another.
    answers = await asyncio.gather(*(bus.publish([same]) for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unroutable] * 3
    assert sample("relay_publish_total", outcome="returned") == returned + 3


@both_ways
async def test_a_queue_unbound_in_full_flow_loses_nothing_in_silence(
    bus: RabbitBus, administrator: Administrator
) -> None:
    for queue in (ARCHIVIST, LOG):
        await administrator.unbind(queue)
    publishing = [asyncio.create_task(bus.publish([message(number)])) for number in range(512)]
    unbinding = asyncio.create_task(administrator.unbind(METER))
    while not unbinding.done():
        publishing.append(asyncio.create_task(bus.publish([message(len(publishing))])))
        await asyncio.sleep(0)
    publishing.append(asyncio.create_task(bus.publish([message(len(publishing))])))
    answers = await asyncio.gather(*publishing, return_exceptions=True)
    unroutable = sum(isinstance(answer, Unroutable) for answer in answers)
    assert all(answer is None or isinstance(answer, Unroutable) for answer in answers)
    assert unroutable > 0, "the queue was unbound in time"
    await until_depth(bus, METER, len(answers) - unroutable)


@both_ways
async def test_a_queue_that_takes_no_more_is_unavailable(
    bus: RabbitBus, rabbit_vhost: str, management: httpx.AsyncClient
) -> None:
    full = {"pattern": f"^{METER}$", "definition": {"max-length": 3}, "apply-to": "queues"}
    (await management.put(f"/api/policies/{vhost_of(rabbit_vhost)}/full", json=full)).raise_for_status()
    nacked = sample("relay_publish_total", outcome="nacked")
    with pytest.raises(Unavailable, match="could not store"):
        await publish_for_ever(bus)
    assert sample("relay_publish_total", outcome="nacked") == nacked + 1


@both_ways
async def test_what_cannot_be_written_at_all_is_no_fault_of_the_broker(bus: RabbitBus) -> None:
    with pytest.raises(UnicodeEncodeError):
        await bus.park_frame(CHAT, b"{", "\ud800")  # Unavailable would have it tried for ever
    await bus.publish([message(1)])
    await until_depth(bus, METER, 1)


@both_ways
async def test_what_is_published_is_counted(bus: RabbitBus) -> None:
    before = {
        "confirmed": sample("relay_publish_total", outcome="confirmed"),
        "message": sample("relay_events_published_total", family="message"),
        "usage": sample("relay_events_published_total", family="usage"),
        "timed": sample("relay_publish_confirm_duration_seconds_count"),
        "bytes": sample("relay_message_size_bytes_sum"),
    }
    events = [message(1), message(2), structs.replace(message(3), family="usage", event="charged", detail="user")]
    await bus.publish(events)
    assert sample("relay_publish_total", outcome="confirmed") == before["confirmed"] + 3
    assert sample("relay_events_published_total", family="message") == before["message"] + 2
    assert sample("relay_events_published_total", family="usage") == before["usage"] + 1
    assert sample("relay_publish_confirm_duration_seconds_count") == before["timed"] + 3
    assert sample("relay_message_size_bytes_sum") == before["bytes"] + sum(len(e.encode()) for e in events)
    assert sample("relay_publish_inflight") == 0


def test_every_series_of_a_closed_label_is_there_from_the_start() -> None:
    for outcome in ("confirmed", "nacked", "returned", "timeout", "error"):
        sample("relay_publish_total", outcome=outcome)
    for reason in ("closed_by_broker", "heartbeat", "network_error", "auth_error"):
        sample("relay_broker_reconnects_total", reason=reason)
    for family in ("message", "history", "status", "turn", "error", "retry", "queue", "lifecycle", "action", "preview"):
        sample("relay_events_published_total", family=family)
    for family in ("usage", "archive"):
        sample("relay_events_published_total", family=family)
