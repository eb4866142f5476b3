"""What a broker says at a bad moment: in the middle of a frame, while others send, after a long silence."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator

import pamqp.frame
import pytest
from pamqp import commands

from relay.adapters.rabbit_link import Link, Opening
from relay.adapters.rabbit_outgoing import Outgoing
from relay.adapters.rabbit_publisher import PipelinedSender
from relay.adapters.rabbit_wire import Wire
from relay.core.errors import TooLarge, Unavailable
from tests.adapters.scripted_broker import ScriptedBroker
from tests.adapters.test_rabbit import sample
from tests.adapters.traffic import PROMPT

PATIENCE = 0.3


@pytest.fixture
async def broker() -> AsyncIterator[ScriptedBroker]:
    async with ScriptedBroker.running() as broker:
        yield broker


@pytest.fixture
async def sender(broker: ScriptedBroker) -> AsyncIterator[PipelinedSender]:
    async def prepare(_: object) -> None:
        """This broker has no topology."""

    link = Link(Opening([broker.url], PROMPT), "publisher", prepare=prepare, changed=lambda: None, make_protocol=Wire)
    sender = PipelinedSender(link, patience=PATIENCE, first_patience=PROMPT, size=2048)
    await sender.check()
    yield sender
    await link.close()


def outgoing(name: str, body: bytes = b"said") -> Outgoing:
    return Outgoing(name, None, "chats", "key", body, "type", 1)


async def blocked(broker: ScriptedBroker) -> None:
    broker.silent = True
    broker.send(commands.Connection.Blocked("low on memory"))
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("cut", range(1, 22))
async def test_a_frame_that_comes_in_pieces_among_confirms_is_read_whole(
    broker: ScriptedBroker, sender: PipelinedSender, cut: int
) -> None:
    broker.silent = True
    call = asyncio.create_task(sender.send([outgoing("1")]))
    async with asyncio.timeout(PROMPT):
        while not broker.published:
            await asyncio.sleep(0)
        frame = pamqp.frame.marshal(commands.Connection.Blocked("low on memory"), 0)
        broker.send_bytes(broker.confirm_all() + frame[:cut])
        await asyncio.sleep(0.02)
        broker.send_bytes(frame[cut:])
        broker.send(commands.Connection.Unblocked())
        broker.silent = False
        await call
        await sender.send([outgoing("2")])
    assert broker.connections == 1


async def test_tries_while_the_broker_blocks_publishers_leave_nothing_behind(
    broker: ScriptedBroker, sender: PipelinedSender
) -> None:
    await sender.send([outgoing("first")])
    await blocked(broker)

    tracemalloc.start()
    for turn in range(5):
        tries = [sender.send([outgoing(f"{turn} {number}", bytes(100_000))]) for number in range(60)]
        answers = await asyncio.gather(*tries, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}
    answers.clear()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 15_000_000, "of 30 MB"
    with pytest.raises(Unavailable, match="blocks publishers"):
        await sender.send([outgoing("last")])


async def test_messages_that_outlast_a_long_alarm_are_confirmed_on_their_channel(
    broker: ScriptedBroker, sender: PipelinedSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.adapters.rabbit_publisher._LOOK_SECONDS", PATIENCE / 10)
    broker.silent = True
    with pytest.raises(Unavailable):
        await sender.send([outgoing("1")])  # written, and not read for as long as the alarm lasts
    await blocked(broker)
    errors = sample("relay_publish_total", outcome="error")
    async with asyncio.timeout(PROMPT):
        for _ in range(4):
            with pytest.raises(Unavailable, match="blocks publishers"):
                await sender.send([outgoing("2")])
        broker.send(commands.Connection.Unblocked())
        call = asyncio.create_task(sender.send([outgoing("2")]))
        await asyncio.sleep(PATIENCE / 2)  # it takes the broker some time to read what has piled up
        broker.send_bytes(broker.confirm_all())
        await call
    assert sample("relay_publish_total", outcome="error") == errors
    assert broker.published == ["1", "2"], "nothing was sent again"


async def test_nothing_is_sent_on_a_channel_that_the_broker_has_closed(
    broker: ScriptedBroker, sender: PipelinedSender
) -> None:
    """It would end the connection, and with it what all others wait for."""
    broker.refused = 5000

    async def keep_sending() -> None:
        for number in range(2000):
            others.append(asyncio.create_task(sender.send([outgoing(f"other {number}")])))
            await asyncio.sleep(0)

    others: list[asyncio.Task[None]] = []
    sending = asyncio.create_task(keep_sending())
    await asyncio.sleep(0.01)
    with pytest.raises(TooLarge):
        await sender.send([outgoing("too large", bytes(5000))])
    await sending
    answers = await asyncio.gather(*others, return_exceptions=True)
    assert {type(answer) for answer in answers} <= {type(None), Unavailable}
    assert broker.after_close == []
    assert broker.connections == 1
    await sender.send([outgoing("next")])
