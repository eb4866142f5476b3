"""What the chats of a feeder say: real frames, all but ids and times of them encoded once and for all.

A chat is turn after turn of the same shape, so that any message can be made again from its number, and a turn is one
`%` of a template. The frames are those of the simulator's oldest dialect, one message a frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from uuid import UUID

from relay.simulator.dialect import DIALECTS, EVENTS_PER_FRAME, EXPERIMENTAL, MessageEvent, StatusEvent
from relay.simulator.state import Chat, Message, Part, Usage
from relay.simulator.wire import go_json

CHATS_PATH = EXPERIMENTAL
OWNER = UUID(int=0xA000_0000_0000_4000_8000_0000_0000_0001)
TOOL_ROUNDS = 12  # of a turn, if nothing else is said: an assistant's call and the tool's result
STAMP = b"sent at "  # stands in every message before the nanoseconds of the machine's monotonic clock, 20 digits

_DIALECT = DIALECTS["d0"]
_MODEL = UUID(int=0xA000_0000_0000_4000_8000_0000_0000_0002)
_MOMENT = datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
_MOMENT_TEXT = "2026-01-01T00:00:00.000001Z"
_FIRST_ID = 10_000_000  # ids have eight digits, so that every frame of a kind is as long as the others
_SENT = STAMP.decode() + "0" * 20


def chat_id(number: int) -> UUID:
    """The id of the chat of that number."""
    return UUID(int=(0xB000_0000_0000_4000 << 64) | (0x8000 << 48) | number)


def websocket_frame(payload: bytes) -> bytes:
    """A whole unmasked text frame, as a server sends it (RFC 6455)."""
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 1 << 16:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


_SENTENCES = (
    "The build of the login page fails since the last merge, because the session helper moved to another package.",
    "Two of the tests depend on the order in which the rows come back; with an index on the time they do not.",
    "I have looked at the release notes as well: the flag was renamed, and the old name is read no more.",
    "So the smallest change is to import the helper from where it is now, and to sort the rows before comparing.",
)


def _part(kind: str, **more: object) -> Part:
    return Part(kind, **more)  # type: ignore[arg-type]


def _turn_messages(chat: UUID, rounds: int, *, brief: bool) -> list[Message]:
    """One turn: a prompt, tool calls with their results, and an answer, of 500 to 1,100 bytes each, or of about 400."""
    messages: list[Message] = []
    sentences = ["Done."] * 4 if brief else _SENTENCES

    def add(role: str, *content: Part, usage: Usage | None = None) -> None:
        owner = OWNER if role == "user" else None
        number = _FIRST_ID + len(messages)
        messages.append(Message(number, chat, role, content, _MOMENT, owner, _MODEL, usage))

    add("user", _part("text", text=f"Please look into the failing build. {sentences[0]} {_SENT}"))
    for step in range(rounds):
        call = f"call_{step:012x}"
        tool = ("read_file", "execute", "edit_files")[step % 3]
        usage = Usage(12_400 + 211 * step, 180 + step, 12_580 + 212 * step, 64, 0, 11_900, 100_000)
        said = _part("text", text=f"{sentences[step % 4]} {_SENT}")
        args = {"path": f"/home/coder/project/src/module_{step}.py", "limit": 200, "offset": step}
        add("assistant", said, _part("tool-call", tool_call_id=call, tool_name=tool, args=args), usage=usage)
        lines = [f"{line}: {sentences[(step + line) % 4]}" for line in range(4)]
        result = {"output": "\n".join(lines), "exit_code": 0, "note": _SENT}
        add("tool", _part("tool-result", tool_call_id=call, tool_name=tool, result=result))
    add("assistant", _part("text", text=f"{' '.join(sentences)} {_SENT}"), usage=Usage(15_000, 420, 15_420))
    return messages


@dataclass(frozen=True, slots=True)
class _Template:
    """Text with holes: of each message its id (`%d`), time (`%b`), and when it was sent (`%020d`)."""

    text: bytes
    first: int  # which messages of the turn
    count: int

    @classmethod
    def of(cls, text: str, messages: Sequence[Message], *, framed: bool) -> "_Template":
        encoded = text.encode()
        if framed:
            encoded = websocket_frame(encoded)
        encoded = encoded.replace(b"%", b"%%")
        for message in messages:
            encoded = encoded.replace(b'"id":%d' % message.id, b'"id":%d', 1)
        encoded = encoded.replace(_MOMENT_TEXT.encode(), b"%b").replace(_SENT.encode(), STAMP + b"%020d")
        return cls(encoded, messages[0].id - _FIRST_ID if messages else 0, len(messages))

    def filled(self, first_id: int, created_at: bytes, sent_at: int) -> bytes:
        values: list[int | bytes] = []
        for number in range(first_id + self.first, first_id + self.first + self.count):
            values += (number, created_at, sent_at)
        return self.text % tuple(values)


def now_text(moment: datetime) -> bytes:
    """A time as the frames have it, always with six digits."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()


class TalkingChat:
    """One chat, and how many frames of it were told so far.

    The frames of a turn are the prompt, `running`, all other messages, `waiting`.
    """

    def __init__(self, number: int, rounds: int = TOOL_ROUNDS, *, brief: bool = False) -> None:
        self.id = chat_id(number)
        self.told = 0
        self._brief = brief
        self._rounds = rounds
        self._in_turn = 2 * rounds + 2
        self._row: dict[str, bytes] = {}  # by the status that it tells

    @property
    def frames_per_turn(self) -> int:
        return self._in_turn + 2

    # Made when the chat first says something: most of fifty thousand never do.

    @cached_property
    def _messages(self) -> list[_Template]:
        rows = self._rows()
        return [_Template.of(go_json(_DIALECT.message(row)), [row], framed=False) for row in rows]

    def _rows(self) -> list[Message]:
        return _turn_messages(self.id, self._rounds, brief=self._brief)

    @cached_property
    def _frames(self) -> list[_Template]:
        def frame(event: MessageEvent | StatusEvent, *about: Message) -> _Template:
            return _Template.of(_DIALECT.stream_frame(self.id, [event]), about, framed=True)

        prompt, *others = (frame(MessageEvent(row), row) for row in self._rows())
        return [prompt, frame(StatusEvent("running")), *others, frame(StatusEvent("waiting"))]

    @cached_property
    def _turn(self) -> _Template:
        return _Template(b"".join(template.text for template in self._frames), 0, self._in_turn)

    @property
    def status(self) -> str:
        """The chat's status after the frames that were told."""
        return "waiting" if self.told % self.frames_per_turn < 2 else "running"

    @property
    def messages(self) -> int:
        """How many messages it has."""
        turns, place = divmod(self.told, self.frames_per_turn)
        return turns * self._in_turn + min(place, 1) + max(0, min(place, self.frames_per_turn - 1) - 2)

    @property
    def last_id(self) -> int:
        """Of its newest message."""
        return _FIRST_ID + self.messages - 1

    def next_frame(self, created_at: bytes, sent_at: int) -> bytes:
        """One frame more, ready for the socket."""
        turns, place = divmod(self.told, self.frames_per_turn)
        self.told += 1
        return self._frames[place].filled(_FIRST_ID + turns * self._in_turn, created_at, sent_at)

    def next_turn(self, created_at: bytes, sent_at: int) -> bytes:
        """What is left of the turn, or a whole one."""
        turns, place = divmod(self.told, self.frames_per_turn)
        if place:
            return b"".join(self.next_frame(created_at, sent_at) for _ in range(self.frames_per_turn - place))
        self.told += self.frames_per_turn
        return self._turn.filled(_FIRST_ID + turns * self._in_turn, created_at, sent_at)

    def message(self, number: int, created_at: bytes) -> bytes:
        """A message again, by its number from 0, as JSON."""
        turns, place = divmod(number, self._in_turn)
        return self._messages[place].filled(_FIRST_ID + turns * self._in_turn, created_at, 0)

    def snapshot(self, after_id: int, created_at: bytes) -> list[bytes]:
        """The frames with which a connection begins: the status, and the messages above the cursor."""
        about = str(self.id).encode()
        events = [b'{"type":"status","chat_id":"%b","status":{"status":"%b"}}' % (about, self.status.encode())]
        events += [
            b'{"type":"message","chat_id":"%b","message":%b}' % (about, self.message(number, created_at))
            for number in range(max(0, after_id + 1 - _FIRST_ID), self.messages)
        ]
        pieces = [events[start : start + EVENTS_PER_FRAME] for start in range(0, len(events), EVENTS_PER_FRAME)]
        return [websocket_frame(b'{"type":"data","data":[' + b",".join(piece) + b"]}\n") for piece in pieces]

    def page(self, before_id: int | None, limit: int, created_at: bytes) -> bytes:
        """The newest messages below an id, newest first, as REST gives them."""
        end = self.messages if before_id is None else max(0, min(self.messages, before_id - _FIRST_ID))
        start = max(0, end - limit)
        rows = b",".join(self.message(number, created_at) for number in range(end - 1, start - 1, -1))
        more = b"true" if start else b"false"
        return b'{"messages":[%b],"queued_messages":[],"has_more":%b}\n' % (rows, more)

    @property
    def row(self) -> bytes:
        """The chat as REST gives it. Kept: writing a list of fifty thousand holds up all other answers."""
        status = self.status
        if status not in self._row:
            chat = Chat(self.id, OWNER, "Look into the failing build", _MODEL, _MOMENT, _MOMENT, status=status)
            self._row = {status: go_json(_DIALECT.chat(chat)).encode()}
        return self._row[status]
