"""Streams: what the server pushes, frame by frame."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import UUID

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.enums import ChatStreamEventType, ServerSentEventType
from relay.codersdk.errors import InvalidAnswer, InvalidJSON, StreamBroken
from relay.codersdk.json_text import SPACE, as_text
from relay.codersdk.model import read_json
from relay.codersdk.models_response import Response
from relay.codersdk.models_stream import ChatStreamError, ChatStreamEvent, ChatWatchEvent, StreamEnvelope
from relay.codersdk.raw_json import RawJSON
from relay.codersdk.urls import quoted

if TYPE_CHECKING:
    from relay.codersdk.frames import FrameStream  # which needs a library that a program without streams does not load

READ_LIMIT = 1 << 22
"""Bytes of the largest frame that the Go SDK takes. One message travels in one frame, whatever its size."""

_NORMAL, _NOT_JSON = 1000, 1007
_LOOKED_AT = 64  # characters of a frame, to see what it begins with
_FIRST_FRAME_SECONDS = 1.0  # for the ping with which a server before 2.33 begins a watch

# What Go's strings.TrimSpace takes off; Python's strip also takes four control characters.
_GO_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class StreamDecoder:
    """Turn the frames of one chat's stream into its events, without a socket. Go: `codersdk.Client.StreamChat`.

    A frame is an envelope around the events or, since 2.33, the bare array of them; both may come from one decoder.
    It makes up an event of type "error" where Go's client does: for a frame that cannot be read or says that it is an
    error, and when `broken` is called. That is the last one: `ended` is true then, and later frames give nothing.
    """

    def __init__(self, chat_id: UUID) -> None:
        self._chat_id = chat_id
        self.ended = False
        self.close_code = _NORMAL
        """With what the client shall close when it has ended."""
        self.close_reason = ""

    def feed(self, frame: str | bytes) -> list[ChatStreamEvent]:
        """The events of a frame, in their order."""
        if self.ended:
            return []
        if _begins(frame) == "[":
            return self._batch(RawJSON.unchecked(as_text(frame)))
        try:
            envelope = read_json(StreamEnvelope, frame)
        except InvalidJSON as exc:
            self.close_code, self.close_reason = _NOT_JSON, "failed to unmarshal JSON"
            return self._end(f"read chat stream: failed to read JSON message: failed to unmarshal JSON: {exc}")
        kind: str = envelope.type  # any word, not only those with a name
        match kind:
            case ServerSentEventType.PING:
                return []
            case ServerSentEventType.DATA:
                return self._batch(envelope.data)
            case ServerSentEventType.ERROR:
                return self._end(_message_of(envelope.data))
        return self._end(f"unknown chat stream event type {quoted(envelope.type)}")

    def broken(self, cause: StreamBroken) -> list[ChatStreamEvent]:
        """The last event of a stream that the server did not end."""
        return [] if self.ended else self._end(f"read chat stream: {cause}")

    def _batch(self, data: RawJSON) -> list[ChatStreamEvent]:
        try:
            events = read_json(list[ChatStreamEvent], data)
        except InvalidJSON as exc:
            return self._end(f"decode chat stream event batch: {exc}")
        for event in events:
            if event.chat_id == NIL_UUID:
                event.chat_id = self._chat_id
        return events

    def _end(self, message: str) -> list[ChatStreamEvent]:
        self.ended = True
        error = ChatStreamError(message=message)
        return [ChatStreamEvent(type=ChatStreamEventType.ERROR, chat_id=self._chat_id, error=error)]


def _message_of(data: RawJSON) -> str:
    """Go: `codersdk.formatChatStreamResponseError`."""
    try:
        response = read_json(Response, data) if data else Response()
    except InvalidJSON:
        return data.strip(_GO_SPACE)
    texts = [text for text in (response.message.strip(_GO_SPACE), response.detail.strip(_GO_SPACE)) if text]
    return ": ".join(texts) or "chat stream returned an error"


def _begins(frame: str | bytes) -> str:
    """The first character that is no space."""
    return as_text(frame[:_LOOKED_AT]).lstrip(SPACE)[:1]


class ChatStream:
    """The events of one chat, the history first. Go: `codersdk.Client.StreamChat`.

    Opening, closing and its end are those of `FrameStream`, but where that raises `StreamBroken`, the last event here
    is an error that the client made up. It does not open itself again.
    """

    def __init__(self, frames: "FrameStream", chat_id: UUID) -> None:
        self._frames = frames
        self._chat_id = chat_id

    async def __aenter__(self) -> Self:
        await self._frames.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Say goodbye and close; harmless when it is closed."""
        await self._frames.aclose()

    async def __aiter__(self) -> AsyncIterator[ChatStreamEvent]:
        decoder = StreamDecoder(self._chat_id)
        async with self._frames.while_open():
            while not decoder.ended:
                try:
                    frame = await self._frames.next_frame()
                except StreamBroken as exc:
                    events = decoder.broken(exc)
                else:
                    if frame is None:
                        return
                    events = decoder.feed(frame)
                    self._frames.goodbye = (decoder.close_code, decoder.close_reason)
                for event in events:
                    yield event
            await self._frames.aclose()


class ChatWatch:
    """What happens to the user's own chats, from now on. The Go SDK has no call for it.

    Opened, it has heard from the server that nothing will be missed from then on, or waited for a second: since 2.33
    servers do not say so. List the chats after that. Nothing is replayed, and the server may drop events without a
    sign: list them again from time to time.

    Raises:
        StreamBroken: It ended without goodbye, or the server says that it cannot watch.
        InvalidAnswer: A frame cannot be read.
    """

    def __init__(self, frames: "FrameStream") -> None:
        self._frames = frames
        self._first: ChatWatchEvent | None = None

    async def __aenter__(self) -> Self:
        import asyncio  # noqa: PLC0415  # it loads TLS, for which who only decodes frames need not wait

        await self._frames.open()
        try:
            async with asyncio.timeout(_FIRST_FRAME_SECONDS):
                frame = await self._frames.next_frame()
            self._first = None if frame is None else _watched(frame)
        except TimeoutError:
            pass
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Say goodbye and close; harmless when it is closed."""
        await self._frames.aclose()

    async def __aiter__(self) -> AsyncIterator[ChatWatchEvent]:
        async with self._frames.while_open():
            if self._first is not None:
                first, self._first = self._first, None
                yield first
            while (frame := await self._frames.next_frame()) is not None:
                if event := _watched(frame):
                    yield event


def _watched(frame: bytes) -> ChatWatchEvent | None:
    try:
        envelope = read_json(StreamEnvelope, frame)
        if not envelope.type and envelope.model_extra and "kind" in envelope.model_extra:
            return read_json(ChatWatchEvent, frame)
        match envelope.type:
            case ServerSentEventType.PING:
                return None
            case ServerSentEventType.DATA:
                return read_json(ChatWatchEvent, envelope.data)
            case ServerSentEventType.ERROR:
                raise StreamBroken(_message_of(envelope.data))
    except InvalidJSON as exc:
        raise InvalidAnswer(f"a frame of the watch stream cannot be read: {exc}") from exc
    raise InvalidAnswer(f"unknown type of a watch frame: {quoted(envelope.type)}")
