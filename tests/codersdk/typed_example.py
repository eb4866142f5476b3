"""User code, checked by mypy: every `assert_type` is a type that the library promises."""

from decimal import Decimal
from typing import assert_type
from uuid import UUID

from relay.codersdk import (
    Chat,
    ChatMessage,
    ChatMessagePart,
    ChatMessagePartType,
    ChatStatus,
    ChatStreamEvent,
    ChatUsageLimitExceeded,
    ChatWatchEvent,
    CoderClient,
    ModelCostConfig,
    NotFound,
    RawJSON,
    Timestamp,
    read_json,
)


async def use(coder: CoderClient, chat_id: UUID) -> None:
    chats = await coder.list_chats(query="archived:true", limit=10)
    assert_type(chats, list[Chat])
    assert_type(chats[0].status, ChatStatus)
    assert_type(chats[0].workspace_id, UUID | None)
    assert_type(chats[0].created_at, Timestamp)
    assert_type(chats[0].mcp_server_ids, list[UUID] | None)

    page = await coder.get_chat_messages(chat_id)
    assert_type(page.messages, list[ChatMessage] | None)

    async with coder.stream_chat(chat_id, after_id=5) as events:
        async for event in events:
            assert_type(event, ChatStreamEvent)
            if event.message_part is not None:
                assert_type(event.message_part.part, ChatMessagePart)
                assert_type(event.message_part.part.args, RawJSON)
    async for frame in coder.stream_chat_frames(chat_id):
        assert_type(frame, str)
    async with coder.watch_chats() as watch:
        async for seen in watch:
            assert_type(seen, ChatWatchEvent)

    try:
        await coder.create_chat_message(chat_id, "hello")
    except ChatUsageLimitExceeded as exc:
        assert_type(exc.resets_at, Timestamp)
        assert_type(exc.spent_micros, int)
    except NotFound as exc:
        assert_type(exc.message, str)

    data, content_type = await coder.get_chat_file(chat_id)
    assert_type(data, bytes)
    assert_type(content_type, str)

    part = ChatMessagePart(type=ChatMessagePartType.TEXT, text="hello")
    assert_type(part.file_id, UUID | None)
    assert_type(ModelCostConfig().input_price_per_million_tokens, Decimal | None)
    assert_type(read_json(list[Chat], b"[]"), list[Chat])
    assert_type(Chat.model_validate_json("{}"), Chat)
