"""A follower of a chat that does anything a chat can do, over connections and lives that end anywhere."""

import random
from typing import Any

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from relay.core.events import Event
from relay.core.frames import Message
from relay.core.resume import ResumePoint
from relay.core.tail import Batch, ChatTail, Reconcile
from relay.core.transcript import differences
from relay.core.turn import Turn
from tests.core.chat_server import ChatServer
from tests.core.episode_server import EpisodeServer
from tests.core.frames import AT, REF, frame
from tests.core.laws import assert_copies_agree, assert_no_event_twice, assert_positions_grow, data_of, fold, turns
from tests.core.recorded_follower import stored_and_loaded

TEXTS = ["do it", "again", "and this"]  # prompts that look the same are told apart by more


class FollowedChat:
    """`events` is all that any life published and the broker confirmed."""

    def __init__(self, server: ChatServer | EpisodeServer, *, lossy: bool, upgrades: bool = False) -> None:
        self.lossy = lossy
        self.upgrades = upgrades
        self.server = server
        self.events: list[Event] = []
        self.saved = [ResumePoint()]
        self.session = 0
        self.wanted: Reconcile | None = None
        self.begin(clean=True)

    # --- the follower -------------------------------------------------------------------------------------------------

    def begin(self, *, clean: bool) -> None:
        self.session += 1
        self.wanted = None
        self.tail = ChatTail(REF, self.session, stored_and_loaded(self.saved[-1], clean=clean))

    def open(self, chance: random.Random) -> None:
        after = self.tail.after
        self.tail.connected(after)
        self.keep(self.tail.feed(frame(self.server.open(after, self.tail.revision, chance)), AT))

    def keep(self, batch: Batch) -> None:
        self.events += batch.events
        self.wanted = batch.wants
        if any(not event.transient for event in batch.events):
            self.saved.append(self.tail.commit().onto(self.saved[-1].known))
        if batch.reconnect is not None:
            self.close()

    def close(self) -> None:
        self.wanted = None
        self.server.disconnect()
        self.tail.disconnected()

    def answer(self) -> None:
        assert self.wanted is not None
        page, complete = self.server.page(self.wanted.down_to)
        self.keep(self.tail.answered(self.server.chat(), page, complete=complete, at=AT))

    @property
    def listening(self) -> bool:
        return self.server.wire is not None and self.wanted is None

    # --- what may happen, and how often -------------------------------------------------------------------------------

    def possible(self) -> list[str]:
        """Names of methods, each as often as it is likely."""
        server = self.server
        odds = server.odds() | {
            "deliver": 24 * (self.listening and not server.nothing_on_the_way),
            "rest_answers": 8 * (self.wanted is not None),
            "silence": 8
            * (self.listening and self.tail.settling and not server.stopping and server.nothing_on_the_way),
            "look": self.listening and not server.stopping,
            "cut": self.listening,
            "connect": 8 * (server.wire is None),
            "restart": self.wanted is None,
            "crash": 1,
            "upgrade": self.upgrades and isinstance(server, ChatServer) and not server.stopping,
        }
        if not self.lossy:
            del odds["lose_a_part"]
        return [name for name, weight in odds.items() for _ in range(weight)]

    def happen(self, chance: random.Random) -> None:
        name = chance.choice(self.possible())
        note(name)
        act = getattr(self, name, None)
        if act is not None:
            act(chance)
        else:
            getattr(self.server, name)()

    def prompt(self, chance: random.Random) -> None:
        self.server.prompt(chance.choice(TEXTS))

    def unqueue(self, chance: random.Random) -> None:
        self.server.unqueue(chance.randint(0, len(self.server.queue) - 1))

    def promote(self, chance: random.Random) -> None:
        self.server.promote(chance.randint(0, len(self.server.queue) - 1), queue_first=chance.random() < 0.5)

    def edit(self, chance: random.Random) -> None:
        prompt = chance.choice(self.server.prompts)
        earlier = sum(key < prompt for key in self.server.messages)
        waiting = [entry["content"][0]["text"] for entry in self.server.queue]
        text = chance.choice([text for text in [*TEXTS, "better"] if text not in waiting])
        self.server.edit(prompt, text, sent_again=chance.randint(0, earlier))

    def speak(self, chance: random.Random) -> None:
        self.server.speak(chance.choice(["text", "text", "reasoning"]))

    def ask(self, chance: random.Random) -> None:
        self.server.ask(chance.randint(0, 2))

    def fail(self, chance: random.Random) -> None:
        self.server.fail(told=chance.random() < 0.5)

    def go_down(self, _: random.Random) -> None:
        self.server.go_down()
        self.close()

    def deliver(self, chance: random.Random) -> None:
        """The next frame; now and then its last fact once more."""
        ready = self.server.ready(chance)
        if not ready:
            return
        self.keep(self.tail.feed(frame(ready), AT))
        facts = [one for one in ready if one["type"] in ("message", "queue_update")]
        once_more = facts and self.listening and isinstance(self.server, ChatServer)
        if once_more and chance.randint(0, 9) == 9:
            self.keep(self.tail.feed(frame(facts[-1]), AT))

    def upgrade(self, chance: random.Random) -> None:
        """A new server takes over the database."""
        assert isinstance(self.server, ChatServer)
        self.close()
        self.server = EpisodeServer(revisions=chance.random() < 0.5, old=self.server)

    def rest_answers(self, _: random.Random) -> None:
        self.answer()

    def silence(self, _: random.Random) -> None:
        self.keep(self.tail.settled(AT))

    def look(self, _: random.Random) -> None:
        self.keep(self.tail.recheck(AT))

    def cut(self, _: random.Random) -> None:
        self.close()

    def connect(self, chance: random.Random) -> None:
        self.open(chance)

    def restart(self, _: random.Random) -> None:
        clean = self.tail.commit().point.clean
        self.close()
        self.begin(clean=clean)

    def crash(self, chance: random.Random) -> None:
        """Some of what was told may not have been saved."""
        self.close()
        unsaved = chance.randint(0, 2)
        del self.saved[max(1, len(self.saved) - unsaved) :]
        self.begin(clean=False)

    def lose_a_part(self, _: random.Random) -> None:
        self.server.lose_part()

    # --- what must hold -----------------------------------------------------------------------------------------------

    def live_text_is_honest(self) -> None:
        if self.lossy and isinstance(self.server, ChatServer):
            return
        starts = {said.text.split(" ", 1)[0]: said.text for said in self.server.said if said.text}
        told: dict[tuple[int, int], str] = {}
        for event in self.events:
            if event.event != "preview":
                continue
            data = data_of(event)
            step = (event.session, data["step"])
            if event.detail == "reset":
                told.pop(step, None)
            elif event.detail == "text":
                assert data["offset"] == len(told.get(step, ""))
                told[step] = told.get(step, "") + data["part"]["text"]
        for text in told.values():
            assert starts.get(text.split(" ", 1)[0], "").startswith(text), "told what no attempt ever said"
        for session in {step[0] for step in told}:
            mine = [text.split(" ", 1)[0] for step, text in told.items() if step[0] == session]
            assert len(mine) == len(set(mine)), "told twice in one session"

    def all_is_well(self) -> None:
        self.come_to_rest()
        truth = self.server.messages
        assert differences(fold(self.events), truth) == []
        assert self.tail.idle or not truth or self.server.status == "pending"
        assert_copies_agree(self.events)
        assert_positions_grow(self.events)
        for session in range(1, self.session + 1):
            assert_no_event_twice([event for event in self.events if event.session == session])
        self.each_prompt_has_its_turn()
        self.queue_and_status_are_the_servers()

    def come_to_rest(self) -> None:
        """The server works off what there is; the follower hears all of it."""
        self.server.come_to_rest()
        sober = random.Random(0)
        if self.server.wire is None:
            self.open(sober)
        for _ in range(1000):
            if self.wanted is not None:
                self.answer()
            elif self.server.wire is None:
                self.open(sober)
            elif not self.server.nothing_on_the_way:
                self.keep(self.tail.feed(frame(self.server.rest()), AT))
            elif self.tail.settling:
                self.keep(self.tail.settled(AT))
            else:
                return
        raise AssertionError("the follower does not come to rest")

    def each_prompt_has_its_turn(self) -> None:
        first = {event.id: event for event in reversed(self.events) if event.event == "turn"}.values()
        ended = turns(list(first))
        told = {data_of(event)["message_ids"][0]: data_of(event)["message_ids"] for event in first}
        prompts = self.server.prompts
        assert set(prompts) <= ended.keys()
        for at, prompt in enumerate(prompts):
            end = prompts[at + 1] if at + 1 < len(prompts) else max(self.server.messages) + 1
            whole = Turn(prompt)
            for key, raw in self.server.messages.items():
                if prompt <= key < end:
                    whole.add(Message.of(raw))
            assert told[prompt] == whole.message_ids
            right = "failed" if prompt in self.server.failed else "completed" if whole.closable else "interrupted"
            assert ended[prompt] == right or (right == "failed" and ended[prompt] == "interrupted")

    def queue_and_status_are_the_servers(self) -> None:
        """For those the highest `(session, position)` wins."""
        last: dict[str, Any] = {event.event: data_of(event) for event in self.events}
        assert last.get("queue", {"queued_messages": []})["queued_messages"] == self.server.queue
        assert last["status"]["status"] == self.server.status


def live_through(chat: FollowedChat, steps: int, chance: random.Random) -> None:
    for _ in range(steps):
        chat.happen(chance)
        chat.live_text_is_honest()
    chat.all_is_well()
    chat.live_text_is_honest()


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 80), st.booleans(), st.randoms(use_true_random=False))
def test_whatever_happens_the_events_tell_it(steps: int, lossy: bool, chance: random.Random) -> None:
    live_through(FollowedChat(ChatServer(), lossy=lossy), steps, chance)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 80), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_the_same_from_servers_with_episodes(steps: int, lossy: bool, revisions: bool, chance: random.Random) -> None:
    live_through(FollowedChat(EpisodeServer(revisions=revisions), lossy=lossy), steps, chance)


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 80), st.randoms(use_true_random=False))
def test_a_server_that_is_upgraded_changes_nothing(steps: int, chance: random.Random) -> None:
    live_through(FollowedChat(ChatServer(), lossy=False, upgrades=True), steps, chance)
