"""Chats, their diffs, and what is asked about them."""

from typing import Annotated
from uuid import UUID

from pydantic import Field

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.enums import ChatStatus
from relay.codersdk.last_error import ChatLastError
from relay.codersdk.model import CoderModel, Int32, Int64, Omit, Since
from relay.codersdk.models_messages import ChatInputPart
from relay.codersdk.raw_json import RawJSON
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class ChatDiffStatus(CoderModel):
    """What is known of a chat's branch or pull request. Go: `codersdk.ChatDiffStatus`."""

    chat_id: UUID = NIL_UUID
    url: Omit[str | None] = None
    """Of the pull request, or of a page about the branch."""
    pull_request_state: Omit[str | None] = None
    pull_request_title: str = ""
    pull_request_draft: bool = False
    changes_requested: bool = False
    additions: Int32 = 0
    deletions: Int32 = 0
    changed_files: Int32 = 0
    author_login: Omit[str | None] = None
    author_avatar_url: Omit[str | None] = None
    base_branch: Omit[str | None] = None
    head_branch: Omit[str | None] = None
    pr_number: Omit[Int32 | None] = None
    commits: Omit[Int32 | None] = None
    approved: Omit[bool | None] = None
    reviewer_count: Omit[Int32 | None] = None
    refreshed_at: Omit[Timestamp | None] = None
    stale_at: Omit[Timestamp | None] = None


class Chat(CoderModel):
    """A chat with an agent. Go: `codersdk.Chat`."""

    id: UUID = NIL_UUID
    owner_id: UUID = NIL_UUID
    workspace_id: Omit[UUID | None] = None
    parent_chat_id: Omit[UUID | None] = None
    """Of a sub-agent's chat only."""
    root_chat_id: Omit[UUID | None] = None
    """The chat's own id, when it is a root."""
    last_model_config_id: UUID = NIL_UUID
    title: str = ""
    status: ChatStatus = ChatStatus("")
    last_error: ChatLastError | None = None
    """A text, which since 2.34 has an `error` with more."""
    diff_status: Omit[ChatDiffStatus | None] = None
    created_at: Timestamp = ZERO_TIME
    updated_at: Timestamp = ZERO_TIME
    archived: bool = False
    mcp_server_ids: list[UUID] | None = None
    build_id: Annotated[Omit[UUID | None], Since("2.32")] = None
    """Since 2.32, as are the fields down to `warnings`."""
    agent_id: Annotated[Omit[UUID | None], Since("2.32")] = None
    pin_order: Annotated[Omit[Int32], Since("2.32")] = 0
    """0: not pinned."""
    labels: Annotated[Omit[dict[str, str]], Since("2.32")] = Field(default_factory=dict)
    has_unread: Annotated[Omit[bool], Since("2.32")] = False
    """Only in lists: `get_chat` always says false."""
    files: Annotated[Omit[list[RawJSON] | None], Since("2.32")] = None
    """As the server sends them."""
    warnings: Annotated[Omit[list[str] | None], Since("2.32")] = None
    organization_id: Annotated[Omit[UUID | None], Since("2.33")] = None
    """Since 2.33, as are the fields down to `children`."""
    client_type: Annotated[Omit[str], Since("2.33")] = ""
    """`api` or `ui`."""
    plan_mode: Annotated[Omit[str], Since("2.33")] = ""
    children: Annotated[Omit[list["Chat"] | None], Since("2.33")] = None
    """Chats of sub-agents. None: the server is older, and lists them beside the others."""
    owner_username: Annotated[Omit[str], Since("2.34")] = ""
    """Since 2.34, as are the fields down to `last_turn_summary`."""
    owner_name: Annotated[Omit[str], Since("2.34")] = ""
    last_turn_summary: Annotated[Omit[str | None], Since("2.34")] = None
    shared: Annotated[Omit[bool], Since("2.35")] = False
    """Since 2.35, as is `context`."""
    context: Annotated[Omit[RawJSON], Since("2.35")] = RawJSON()
    """As the server sends it."""
    summary: Annotated[Omit[str | None], Since("2.36")] = None
    """Of the whole chat. Since 2.36."""
    queued_for_capacity: Annotated[Omit[RawJSON], Since("2.37")] = RawJSON()
    """Whether it waits for other chats to end; in `get_chat` only, as the server sends it. Since 2.37."""


class CreateChatRequest(CoderModel):
    """A chat to begin, with its first message. Go: `codersdk.CreateChatRequest`."""

    content: list[ChatInputPart] | None = None
    workspace_id: Omit[UUID | None] = None
    model_config_id: Omit[UUID | None] = None
    """None takes the deployment's default, which only the owner role may look up."""
    mcp_server_ids: Omit[list[UUID]] = Field(default_factory=list)
    organization_id: Annotated[Omit[UUID | None], Since("2.33")] = None
    """Required since 2.33."""


class UpdateChatRequest(CoderModel):
    """What to change of a chat; the server honours `archived` alone. Go: `codersdk.UpdateChatRequest`."""

    title: Omit[str | None] = None
    archived: Omit[bool | None] = None


class Pagination(CoderModel):
    """Which page of a list; zeros are not sent. Go: `codersdk.Pagination`."""

    after_id: UUID = NIL_UUID
    limit: Int64 = 0
    offset: Int64 = 0


class ListChatsOptions(Pagination):
    """Which chats to list; zeros are not sent. Go: `codersdk.ListChatsOptions`."""

    query: str = ""
    """E.g. `archived:true`."""


class StreamChatOptions(CoderModel):
    """Where a stream begins. Go: `codersdk.StreamChatOptions`."""

    after_id: Int64 | None = None
    """Messages up to this id are left out of the snapshot."""
    after_revision: Annotated[Int64 | None, Since("2.38")] = None
    """A `history_version` that is known whole: what has not changed since is left out. About since 2.38."""


class ChatGitChange(CoderModel):
    """A file that changed while a chat ran; this server never sends one. Go: `codersdk.ChatGitChange`."""

    id: UUID = NIL_UUID
    chat_id: UUID = NIL_UUID
    file_path: str = ""
    change_type: str = ""
    """`added`, `modified`, `deleted` or `renamed`."""
    old_path: Omit[str | None] = None
    diff_summary: Omit[str | None] = None
    detected_at: Timestamp = ZERO_TIME


class ChatDiffContents(CoderModel):
    """The text of a chat's diff. Go: `codersdk.ChatDiffContents`."""

    chat_id: UUID = NIL_UUID
    provider: Omit[str | None] = None
    remote_origin: Omit[str | None] = None
    branch: Omit[str | None] = None
    pull_request_url: Omit[str | None] = None
    diff: Omit[str] = ""


class UploadChatFileResponse(CoderModel):
    """The id under which an uploaded file is kept. Go: `codersdk.UploadChatFileResponse`."""

    id: UUID = NIL_UUID
