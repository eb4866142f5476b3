"""What the queues promise about dead letters hangs on arguments that a broker takes without a word when one lacks."""

import pytest

from relay.adapters.topology import DELIVERY_LIMIT, NEVER, QUEUES, TOPOLOGY, Binding, Queue
from relay.core.events import CONTRACT, EXCHANGE

WORKED_OFF = [queue for queue in QUEUES.values() if queue.dead_letters is not None]


def test_meter_and_archivist_have_dead_letters() -> None:
    assert {queue.name for queue in WORKED_OFF} == {"relay.meter", "relay.archivist"}


@pytest.mark.parametrize("queue", WORKED_OFF, ids=lambda queue: queue.name)
def test_a_dead_letter_is_kept_until_its_own_queue_has_confirmed_it(queue: Queue) -> None:
    """Quorum queues fall back to at most once, silently, unless all of this is said together."""
    assert queue.arguments["x-queue-type"] == "quorum"
    assert queue.arguments["x-dead-letter-strategy"] == "at-least-once"
    assert queue.arguments["x-overflow"] == "reject-publish"
    assert queue.arguments["x-dead-letter-exchange"] == ""
    assert "x-max-length" not in queue.arguments
    assert "x-message-ttl" not in queue.arguments


@pytest.mark.parametrize("queue", WORKED_OFF, ids=lambda queue: queue.name)
def test_poison_is_given_up_and_its_letter_outlives_every_look(queue: Queue) -> None:
    assert queue.arguments["x-delivery-limit"] == DELIVERY_LIMIT == 20
    dead = QUEUES[str(queue.dead_letters)]
    assert dead.arguments == {"x-queue-type": "quorum", "x-delivery-limit": NEVER}
    assert NEVER > 10**6


def test_while_the_topology_is_made_nothing_that_a_queue_takes_goes_past_the_log() -> None:
    """Somebody deleted all queues, and another worker publishes between two steps: it is not returned any more."""
    places = {part.queue: place for place, part in reversed(list(enumerate(TOPOLOGY))) if isinstance(part, Binding)}
    assert min(places, key=places.__getitem__) == "relay.log"
    assert all(place < min(places.values()) for place, part in enumerate(TOPOLOGY) if isinstance(part, Queue))


def test_every_durable_event_has_a_queue_that_takes_it() -> None:
    """Or it would be returned, and the relay would stand still."""
    everything = [part for part in TOPOLOGY if isinstance(part, Binding) and part.pattern == "#"]
    assert [(part.exchange, part.queue) for part in everything] == [(EXCHANGE, "relay.log")]
    assert QUEUES["relay.log"].is_stream
    assert any(not row.transient for row in CONTRACT)
