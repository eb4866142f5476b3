"""Every call of the chats API."""

from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar
from uuid import UUID

import pydantic

from relay.codersdk.enums import ChatInputPartType, ChatUsageLimitPeriod
from relay.codersdk.errors import InvalidAnswer, InvalidJSON, InvalidRequest
from relay.codersdk.model import CoderModel, read_json
from relay.codersdk.models_chat import (
    Chat,
    ChatDiffContents,
    ChatGitChange,
    CreateChatRequest,
    ListChatsOptions,
    StreamChatOptions,
    UpdateChatRequest,
    UploadChatFileResponse,
)
from relay.codersdk.models_costs import (
    ChatCost,
    ChatCostSummary,
    ChatCostSummaryOptions,
    ChatCostUsersOptions,
    ChatCostUsersResponse,
    UserAISpend,
)
from relay.codersdk.models_insights import PRInsightsResponse
from relay.codersdk.models_limits import (
    ChatUsageLimitConfig,
    ChatUsageLimitConfigResponse,
    ChatUsageLimitGroupOverride,
    ChatUsageLimitOverride,
    ChatUsageLimitStatus,
    UpsertChatUsageLimitGroupOverrideRequest,
    UpsertChatUsageLimitOverrideRequest,
)
from relay.codersdk.models_messages import (
    ChatInputPart,
    ChatMessage,
    ChatMessagesPaginationOptions,
    ChatMessagesResponse,
    ChatPrompt,
    ChatPromptsResponse,
    ChatToolResult,
    CreateChatMessageRequest,
    CreateChatMessageResponse,
    EditChatMessageRequest,
    SubmitChatToolResultsRequest,
)
from relay.codersdk.models_providers import (
    ChatModelCallConfig,
    ChatModelConfig,
    ChatModelsResponse,
    ChatProviderConfig,
    CreateChatModelConfigRequest,
    CreateChatProviderConfigRequest,
    UpdateChatModelConfigRequest,
    UpdateChatProviderConfigRequest,
)
from relay.codersdk.models_response import BuildInfo, User
from relay.codersdk.models_settings import (
    ChatAutoArchiveDaysResponse,
    ChatDesktopEnabledResponse,
    ChatRetentionDaysResponse,
    ChatSystemPrompt,
    ChatWorkspaceTTLResponse,
    UpdateChatDesktopEnabledRequest,
    UpdateChatWorkspaceTTLRequest,
    UserChatCustomPrompt,
)
from relay.codersdk.stream import READ_LIMIT, ChatStream, ChatWatch
from relay.codersdk.timestamp import ZERO_TIME, Timestamp
from relay.codersdk.urls import content_disposition, query

# What speaks to the network is loaded by the first client and the first stream: who only reads models does not wait.
if TYPE_CHECKING:
    import ssl

    from relay.codersdk.frames import FrameStream
    from relay.codersdk.transport import Answer, Content

T = TypeVar("T")
Model = TypeVar("Model", bound=CoderModel)

InputParts = str | Sequence[ChatInputPart] | None
"""What a user sends: parts, or one text. None is sent as null, which the server refuses."""

Moment = Timestamp | datetime
"""A datetime needs a time zone."""

CHATS_PATH = "/api/experimental/chats"
"""Where the chats API is until 2.37."""

CHATS_PATH_V2 = "/api/v2/chats"
"""Where it is since 2.37, and since 2.38 only there."""


class ChatFile(NamedTuple):
    """A file as the server keeps it."""

    data: bytes
    content_type: str


class CoderClient:
    """One user of one Coder server. Go: `codersdk.Client`.

        async with CoderClient("https://coder.example.com", token) as coder:
            chats = await coder.list_chats(query="archived:false")

    A call is one request: nothing is tried again, and few calls may be (a message that is sent twice is there twice).
    Proxies and certificates come from the environment (`HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`). The token is never
    sent to another host, nor shown.

    Args:
        url: Of the server. Its path does not count; a user and a password in it are sent as basic authentication.
        token: The session token.
        timeout: Seconds for connecting, and between two pieces of an answer.
        user_agent: How the client calls itself.
        ssl_context: Instead of the system's certificates.
        chats_path: Where the server has the API: `CHATS_PATH`, or `CHATS_PATH_V2` since 2.37.

    Raises:
        InvalidRequest: `url` or `token` cannot be used. So may every call: what it was given cannot be sent.
        APIError: Of every call: the server refused. `NotFound`, `Forbidden`, `RateLimited` and others are kinds of it.
        ConnectionFailed: Of every call: no answer.
        InvalidAnswer: Of every call: not an answer of this API.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout: float = 30.0,
        user_agent: str | None = None,
        ssl_context: "ssl.SSLContext | None" = None,
        chats_path: str = CHATS_PATH,
    ) -> None:
        from relay.codersdk.server import Server  # noqa: PLC0415
        from relay.codersdk.transport import Transport  # noqa: PLC0415

        self._server = Server(url, token, user_agent=user_agent, ssl_context=ssl_context)
        self._chats = chats_path.rstrip("/")
        self._timeout = timeout
        self._transport = Transport(self._server, timeout=timeout)

    def __repr__(self) -> str:
        return f"CoderClient({self._server.origin!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections that calls have left open; streams are closed by themselves."""
        await self._transport.close()

    # --- chats -----------------------------------------------------------------------------------------------------

    async def list_chats(
        self, *, query: str = "", after_id: UUID | None = None, limit: int = 0, offset: int = 0
    ) -> list[Chat]:
        """The user's own chats, last changed first. Go: `codersdk.Client.ListChats`.

        Args:
            query: `archived:true` for the archived ones alone; without it the others.
            after_id: The last chat of the page before.
            limit: 0 for the server's 50.
            offset: How many to pass over.
        """
        options = _checked(ListChatsOptions, query=query, after_id=after_id, limit=limit, offset=offset)
        return await self._get(list[Chat], self._chats + _query_of(options, query="q"))

    async def get_chat(self, chat_id: UUID) -> Chat:
        """One chat. Go: `codersdk.Client.GetChat`."""
        return await self._get(Chat, f"{self._chats}/{chat_id}")

    async def create_chat(
        self,
        content: InputParts,
        *,
        workspace_id: UUID | None = None,
        model_config_id: UUID | None = None,
        mcp_server_ids: Sequence[UUID] = (),
        organization_id: UUID | None = None,
    ) -> Chat:
        """Begin a chat. Go: `codersdk.Client.CreateChat`.

        Args:
            content: The first message.
            workspace_id: The workspace that the agent works in; without it the agent makes one when it needs to.
            model_config_id: From `list_chat_model_configs`. Plain members have to name one.
            mcp_server_ids: Servers that the agent may use.
            organization_id: Required since 2.33; older servers do not look at it.

        Raises:
            ChatUsageLimitExceeded: The user's limit is used up.
        """
        request = _checked(
            CreateChatRequest,
            content=_parts(content),
            workspace_id=workspace_id,
            model_config_id=model_config_id,
            mcp_server_ids=list(mcp_server_ids),
            organization_id=organization_id,
        )
        return await self._call(Chat, "POST", self._chats, request, success=201, may_be_limit=True)

    async def update_chat(self, chat_id: UUID, *, title: str | None = None, archived: bool | None = None) -> None:
        """Archive a chat or take it back; this server ignores the title. Go: `codersdk.Client.UpdateChat`."""
        request = _checked(UpdateChatRequest, title=title, archived=archived)
        await self._command("PATCH", f"{self._chats}/{chat_id}", request)

    async def archive_chat(self, chat_id: UUID) -> None:
        """Archive a chat and its sub-agents. Raises APIError (400) when it is archived already."""
        await self.update_chat(chat_id, archived=True)

    async def unarchive_chat(self, chat_id: UUID) -> None:
        """Take a chat, but not its sub-agents, back out of the archive. Raises APIError (400) when it is not in it."""
        await self.update_chat(chat_id, archived=False)

    async def interrupt_chat(self, chat_id: UUID) -> Chat:
        """Stop the agent; what it wrote so far is kept. Go: `codersdk.Client.InterruptChat`."""
        return await self._call(Chat, "POST", f"{self._chats}/{chat_id}/interrupt")

    async def get_chat_git_changes(self, chat_id: UUID) -> list[ChatGitChange]:
        """Files that changed; servers of this version answer 404. Go: `codersdk.Client.GetChatGitChanges`."""
        return await self._get(list[ChatGitChange], f"{self._chats}/{chat_id}/git-changes")

    async def get_chat_diff_contents(self, chat_id: UUID) -> ChatDiffContents:
        """The diff of a chat's branch or pull request. Go: `codersdk.Client.GetChatDiffContents`."""
        return await self._get(ChatDiffContents, f"{self._chats}/{chat_id}/diff")

    # --- messages --------------------------------------------------------------------------------------------------

    async def get_chat_messages(
        self, chat_id: UUID, *, before_id: int = 0, limit: int = 0, after_id: int = 0
    ) -> ChatMessagesResponse:
        """A page of messages, newest first. Go: `codersdk.Client.GetChatMessages`.

        Args:
            chat_id: The chat.
            before_id: The lowest id of the page before; 0 for the newest page, which alone has the queue.
            limit: 1 to 200; 0 for the server's 50.
            after_id: Since 2.33: those with a higher id, oldest first. Older servers ignore it, so look at the order.
        """
        options = _checked(ChatMessagesPaginationOptions, before_id=before_id, limit=limit, after_id=after_id)
        return await self._get(ChatMessagesResponse, f"{self._chats}/{chat_id}/messages{_query_of(options)}")

    async def create_chat_message(
        self,
        chat_id: UUID,
        content: InputParts,
        *,
        model_config_id: UUID | None = None,
        mcp_server_ids: Sequence[UUID] | None = None,
        busy_behavior: str = "",
    ) -> CreateChatMessageResponse:
        """Send a message; while the agent works it waits in the queue. Go: `codersdk.Client.CreateChatMessage`.

        Args:
            chat_id: The chat.
            content: The message.
            model_config_id: Another model than before.
            mcp_server_ids: Servers that the agent may use from now on; None leaves them as they are.
            busy_behavior: Since 2.32: `interrupt` stops an agent at work, `queue` waits for it.

        Raises:
            ChatUsageLimitExceeded: The limit of the chat's owner is used up.
        """
        request = _checked(
            CreateChatMessageRequest,
            content=_parts(content),
            model_config_id=model_config_id,
            mcp_server_ids=None if mcp_server_ids is None else list(mcp_server_ids),
            busy_behavior=busy_behavior,
        )
        path = f"{self._chats}/{chat_id}/messages"
        return await self._call(CreateChatMessageResponse, "POST", path, request, may_be_limit=True)

    async def edit_chat_message(self, chat_id: UUID, message_id: int, content: InputParts) -> ChatMessage:
        """Replace a user message, and drop all that came after it. Go: `codersdk.Client.EditChatMessage`.

        The new message has another id.

        Raises:
            ChatUsageLimitExceeded: The limit of the chat's owner is used up.
        """
        request = _checked(EditChatMessageRequest, content=_parts(content))
        path = f"{self._chats}/{chat_id}/messages/{message_id}"
        return await self._call(ChatMessage, "PATCH", path, request, may_be_limit=True)

    async def delete_chat_queued_message(self, chat_id: UUID, queued_message_id: int) -> None:
        """Take a message out of the queue; one that is not there is no error. The Go SDK has no call for it."""
        await self._command("DELETE", f"{self._chats}/{chat_id}/queue/{queued_message_id}")

    async def promote_chat_queued_message(self, chat_id: UUID, queued_message_id: int) -> ChatMessage:
        """Send a queued message now; what the agent is writing is lost. The Go SDK has no call for it."""
        return await self._call(ChatMessage, "POST", f"{self._chats}/{chat_id}/queue/{queued_message_id}/promote")

    async def submit_chat_tool_results(self, chat_id: UUID, results: Sequence[ChatToolResult]) -> None:
        """Give the results that a chat with status `requires_action` waits for, all at once. Since 2.33.

        Raises APIError (400) when one is missing, Conflict when the chat does not wait for any.
        """
        request = _checked(SubmitChatToolResultsRequest, results=list(results))
        await self._command("POST", f"{self._chats}/{chat_id}/tool-results", request)

    async def get_chat_prompts(self, chat_id: UUID) -> list[ChatPrompt]:
        """What the user sent in a chat, as text. Since 2.34."""
        answer = await self._get(ChatPromptsResponse, f"{self._chats}/{chat_id}/prompts")
        return answer.prompts or []

    # --- streams ---------------------------------------------------------------------------------------------------

    def stream_chat(
        self,
        chat_id: UUID,
        *,
        after_id: int | None = None,
        after_revision: int | None = None,
        read_limit: int = READ_LIMIT,
        ping_interval: float | None = 20.0,
        ping_timeout: float | None = 20.0,
    ) -> ChatStream:
        """The events of a chat: its messages so far, then what happens. Go: `codersdk.Client.StreamChat`.

            async with coder.stream_chat(chat.id) as events:
                async for event in events:
                    ...

        Args:
            chat_id: The chat.
            after_id: Leave out the messages up to this one.
            after_revision: About since 2.38: a `history_version` up to which all is known; older servers ignore it.
            read_limit: Bytes of the largest frame; a larger one ends the stream with an error.
            ping_interval: Seconds between two questions whether the server is still there; None asks never.
            ping_timeout: Seconds to wait for the answer.
        """
        frames = self.stream_chat_frames(
            chat_id,
            after_id=after_id,
            after_revision=after_revision,
            read_limit=read_limit,
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
        )
        return ChatStream(frames, chat_id)

    def stream_chat_frames(
        self,
        chat_id: UUID,
        *,
        after_id: int | None = None,
        after_revision: int | None = None,
        read_limit: int = READ_LIMIT,
        ping_interval: float | None = 20.0,
        ping_timeout: float | None = 20.0,
    ) -> "FrameStream":
        """As `stream_chat`, but the text of each frame, to be read by `StreamDecoder` or otherwise."""
        options = _checked(StreamChatOptions, after_id=after_id, after_revision=after_revision)
        asked = {name: str(value) for name, value in options if value is not None}
        path = f"{self._chats}/{chat_id}/stream{query(asked)}"
        return self._frames(path, read_limit, ping_interval, ping_timeout)

    def watch_chats(
        self,
        *,
        read_limit: int = READ_LIMIT,
        ping_interval: float | None = 20.0,
        ping_timeout: float | None = 20.0,
    ) -> ChatWatch:
        """What happens to the user's own chats, from now on. The Go SDK has no call for it."""
        return ChatWatch(self._frames(f"{self._chats}/watch", read_limit, ping_interval, ping_timeout))

    def _frames(
        self, path: str, read_limit: int, ping_interval: float | None, ping_timeout: float | None
    ) -> "FrameStream":
        from relay.codersdk.frames import FrameStream  # noqa: PLC0415

        return FrameStream(
            self._server,
            path,
            timeout=self._timeout,
            read_limit=read_limit,
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
        )

    # --- files -----------------------------------------------------------------------------------------------------

    async def upload_chat_file(
        self, organization_id: UUID, content_type: str, filename: str, data: "Content"
    ) -> UploadChatFileResponse:
        """Upload a picture for a message. Go: `codersdk.Client.UploadChatFile`.

        Args:
            organization_id: An organization of the user.
            content_type: `image/png`, `image/jpeg`, `image/gif` or `image/webp`.
            filename: May be empty.
            data: Up to 10 MiB: bytes, a file opened in binary mode, or pieces as they come.
        """
        headers = [("Content-Type", content_type)]
        if filename:
            headers.append(("Content-Disposition", content_disposition(filename)))
        path = f"{self._chats}/files?organization={organization_id}"
        answer = await self._transport.send("POST", path, data, headers)
        return _success(UploadChatFileResponse, answer, 201)

    async def get_chat_file(self, file_id: UUID) -> ChatFile:
        """An uploaded file. Go: `codersdk.Client.GetChatFile`."""
        answer = await self._transport.send("GET", f"{self._chats}/files/{file_id}")
        if answer.status_code != 200:
            raise answer.refusal()
        return ChatFile(answer.body, answer.content_type)

    # --- settings --------------------------------------------------------------------------------------------------

    async def get_chat_system_prompt(self) -> ChatSystemPrompt:
        """The deployment's system prompt. Go: `codersdk.Client.GetChatSystemPrompt`."""
        return await self._get(ChatSystemPrompt, f"{self._chats}/config/system-prompt")

    async def update_chat_system_prompt(self, system_prompt: str) -> None:
        """Set it, for chats to come; for administrators. Go: `codersdk.Client.UpdateChatSystemPrompt`."""
        request = _checked(ChatSystemPrompt, system_prompt=system_prompt)
        await self._command("PUT", f"{self._chats}/config/system-prompt", request)

    async def get_user_chat_custom_prompt(self) -> UserChatCustomPrompt:
        """The user's own prompt. Go: `codersdk.Client.GetUserChatCustomPrompt`."""
        return await self._get(UserChatCustomPrompt, f"{self._chats}/config/user-prompt")

    async def update_user_chat_custom_prompt(self, custom_prompt: str) -> UserChatCustomPrompt:
        """Set it; comes back as it was stored. Go: `codersdk.Client.UpdateUserChatCustomPrompt`."""
        request = _checked(UserChatCustomPrompt, custom_prompt=custom_prompt)
        return await self._call(UserChatCustomPrompt, "PUT", f"{self._chats}/config/user-prompt", request)

    async def get_chat_desktop_enabled(self) -> ChatDesktopEnabledResponse:
        """Whether agents get a desktop. Go: `codersdk.Client.GetChatDesktopEnabled`."""
        return await self._get(ChatDesktopEnabledResponse, f"{self._chats}/config/desktop-enabled")

    async def update_chat_desktop_enabled(self, enable_desktop: bool) -> None:
        """Set it; for administrators. Go: `codersdk.Client.UpdateChatDesktopEnabled`."""
        request = _checked(UpdateChatDesktopEnabledRequest, enable_desktop=enable_desktop)
        await self._command("PUT", f"{self._chats}/config/desktop-enabled", request)

    async def get_chat_workspace_ttl(self) -> ChatWorkspaceTTLResponse:
        """How long chat workspaces live. Go: `codersdk.Client.GetChatWorkspaceTTL`."""
        return await self._get(ChatWorkspaceTTLResponse, f"{self._chats}/config/workspace-ttl")

    async def update_chat_workspace_ttl(self, workspace_ttl_ms: int) -> None:
        """Set it in milliseconds, 0 or a minute to 30 days. Go: `codersdk.Client.UpdateChatWorkspaceTTL`."""
        request = _checked(UpdateChatWorkspaceTTLRequest, workspace_ttl_ms=workspace_ttl_ms)
        await self._command("PUT", f"{self._chats}/config/workspace-ttl", request)

    async def get_chat_retention_days(self) -> int:
        """Days after which an archived chat is deleted for good; 0: never. Since 2.33."""
        return (await self._get(ChatRetentionDaysResponse, f"{self._chats}/config/retention-days")).retention_days

    async def get_chat_auto_archive_days(self) -> int:
        """Days without activity after which the server archives a chat; 0: never. Since 2.33."""
        path = f"{self._chats}/config/auto-archive-days"
        return (await self._get(ChatAutoArchiveDaysResponse, path)).auto_archive_days

    # --- providers and models --------------------------------------------------------------------------------------

    async def list_chat_models(self) -> ChatModelsResponse:
        """The models that can be chosen. Go: `codersdk.Client.ListChatModels`."""
        return await self._get(ChatModelsResponse, f"{self._chats}/models")

    async def list_chat_providers(self) -> list[ChatProviderConfig]:
        """All providers that the server knows; for administrators. Go: `codersdk.Client.ListChatProviders`."""
        return await self._get(list[ChatProviderConfig], f"{self._chats}/providers")

    async def create_chat_provider(
        self,
        provider: str,
        *,
        display_name: str = "",
        api_key: str = "",
        base_url: str = "",
        enabled: bool | None = None,
    ) -> ChatProviderConfig:
        """Set up a provider; for administrators. Go: `codersdk.Client.CreateChatProvider`."""
        request = _checked(
            CreateChatProviderConfigRequest,
            provider=provider,
            display_name=display_name,
            api_key=api_key,
            base_url=base_url,
            enabled=enabled,
        )
        return await self._call(ChatProviderConfig, "POST", f"{self._chats}/providers", request, success=201)

    async def update_chat_provider(
        self,
        provider_id: UUID,
        *,
        display_name: str = "",
        api_key: str | None = None,
        base_url: str | None = None,
        enabled: bool | None = None,
    ) -> ChatProviderConfig:
        """Change a provider; None keeps what is there. Go: `codersdk.Client.UpdateChatProvider`."""
        request = _checked(
            UpdateChatProviderConfigRequest,
            display_name=display_name,
            api_key=api_key,
            base_url=base_url,
            enabled=enabled,
        )
        return await self._call(ChatProviderConfig, "PATCH", f"{self._chats}/providers/{provider_id}", request)

    async def delete_chat_provider(self, provider_id: UUID) -> None:
        """Delete a provider and its models. Go: `codersdk.Client.DeleteChatProvider`."""
        await self._command("DELETE", f"{self._chats}/providers/{provider_id}")

    async def list_chat_model_configs(self) -> list[ChatModelConfig]:
        """The models as they are set up; members see those in use. Go: `codersdk.Client.ListChatModelConfigs`."""
        return await self._get(list[ChatModelConfig], f"{self._chats}/model-configs")

    async def create_chat_model_config(
        self,
        provider: str,
        model: str,
        *,
        display_name: str = "",
        enabled: bool | None = None,
        is_default: bool | None = None,
        context_limit: int | None = None,
        compression_threshold: int | None = None,
        call_config: ChatModelCallConfig | None = None,
    ) -> ChatModelConfig:
        """Set up a model; for administrators. Go: `codersdk.Client.CreateChatModelConfig`.

        Args:
            provider, model: As the provider calls them.
            display_name: For people.
            enabled: None enables it.
            is_default: Take the place of the default one.
            context_limit: Tokens; the server wants it.
            compression_threshold: Percent of the context at which it is compacted; None is 70.
            call_config: How the model is called, and its prices.
        """
        request = _checked(
            CreateChatModelConfigRequest,
            provider=provider,
            model=model,
            display_name=display_name,
            enabled=enabled,
            is_default=is_default,
            context_limit=context_limit,
            compression_threshold=compression_threshold,
            call_config=call_config,
        )
        return await self._call(ChatModelConfig, "POST", f"{self._chats}/model-configs", request, success=201)

    async def update_chat_model_config(
        self,
        model_config_id: UUID,
        *,
        provider: str = "",
        model: str = "",
        display_name: str = "",
        enabled: bool | None = None,
        is_default: bool | None = None,
        context_limit: int | None = None,
        compression_threshold: int | None = None,
        call_config: ChatModelCallConfig | None = None,
    ) -> ChatModelConfig:
        """Change a model; what is empty or None stays. Go: `codersdk.Client.UpdateChatModelConfig`."""
        request = _checked(
            UpdateChatModelConfigRequest,
            provider=provider,
            model=model,
            display_name=display_name,
            enabled=enabled,
            is_default=is_default,
            context_limit=context_limit,
            compression_threshold=compression_threshold,
            call_config=call_config,
        )
        return await self._call(ChatModelConfig, "PATCH", f"{self._chats}/model-configs/{model_config_id}", request)

    async def delete_chat_model_config(self, model_config_id: UUID) -> None:
        """Delete a model; chats that use it go on with the default. Go: `codersdk.Client.DeleteChatModelConfig`."""
        await self._command("DELETE", f"{self._chats}/model-configs/{model_config_id}")

    # --- costs and limits ------------------------------------------------------------------------------------------

    async def get_chat_cost_summary(
        self, user: str | UUID = "me", *, start_date: Moment | None = None, end_date: Moment | None = None
    ) -> ChatCostSummary:
        """What a user's chats cost. Go: `codersdk.Client.GetChatCostSummary`.

        Args:
            user: `me`, an id or a username; goes into the path as it is.
            start_date, end_date: From the first to before the second, in whole seconds; None: the last 30 days.
        """
        options = _checked(ChatCostSummaryOptions, start_date=start_date, end_date=end_date)
        return await self._get(ChatCostSummary, f"{self._chats}/cost/{user}/summary{_query_of(options)}")

    async def get_chat_cost_users(
        self,
        *,
        start_date: Moment | None = None,
        end_date: Moment | None = None,
        username: str = "",
        limit: int = 0,
        offset: int = 0,
    ) -> ChatCostUsersResponse:
        """What each user's chats cost; for administrators. Go: `codersdk.Client.GetChatCostUsers`.

        Args:
            start_date, end_date: As in `get_chat_cost_summary`.
            username: A part of the username or of the name.
            limit: 0 for the server's 10.
            offset: How many to pass over.
        """
        options = _checked(
            ChatCostUsersOptions,
            start_date=start_date,
            end_date=end_date,
            username=username,
            limit=limit,
            offset=offset,
        )
        return await self._get(ChatCostUsersResponse, f"{self._chats}/cost/users{_query_of(options)}")

    async def get_chat_cost(self, chat_id: UUID) -> ChatCost:
        """What a chat with its sub-agents cost so far. Since 2.36."""
        return await self._get(ChatCost, f"{self._chats}/{chat_id}/cost")

    async def get_user_ai_spend(self, user: str | UUID = "me") -> UserAISpend:
        """What a user has spent of an AI Gateway budget. Since 2.36; Forbidden without a licence, else NotFound."""
        return await self._get(UserAISpend, f"/api/v2/users/{user}/ai/spend")

    async def get_pr_insights(
        self, *, start_date: Moment | None = None, end_date: Moment | None = None
    ) -> PRInsightsResponse:
        """Pull requests that chats made; for administrators and auditors. The Go SDK has no call for it."""
        options = _checked(ChatCostSummaryOptions, start_date=start_date, end_date=end_date)
        return await self._get(PRInsightsResponse, f"{self._chats}/insights/pull-requests{_query_of(options)}")

    async def get_my_chat_usage_limit_status(self) -> ChatUsageLimitStatus:
        """What the user has spent and may spend. Go: `codersdk.Client.GetMyChatUsageLimitStatus`."""
        return await self._get(ChatUsageLimitStatus, f"{self._chats}/usage-limits/status")

    async def get_chat_usage_limit_config(self) -> ChatUsageLimitConfigResponse:
        """All limits; for administrators and auditors. Go: `codersdk.Client.GetChatUsageLimitConfig`."""
        return await self._get(ChatUsageLimitConfigResponse, f"{self._chats}/usage-limits")

    async def update_chat_usage_limit_config(
        self,
        *,
        spend_limit_micros: int | None,
        period: ChatUsageLimitPeriod | str,
        updated_at: Moment = ZERO_TIME,
    ) -> ChatUsageLimitConfig:
        """Set everyone's limit; for administrators. Go: `codersdk.Client.UpdateChatUsageLimitConfig`.

        Args:
            spend_limit_micros: Millionths of a US dollar; None takes the limit away.
            period: In which that much may be spent.
            updated_at: Sent because Go sends it; the server does not look at it.
        """
        request = _checked(
            ChatUsageLimitConfig, spend_limit_micros=spend_limit_micros, period=period, updated_at=updated_at
        )
        return await self._call(ChatUsageLimitConfig, "PUT", f"{self._chats}/usage-limits", request)

    async def upsert_chat_usage_limit_override(self, user_id: UUID, spend_limit_micros: int) -> ChatUsageLimitOverride:
        """Give a user an own limit. Go: `codersdk.Client.UpsertChatUsageLimitOverride`."""
        request = _checked(UpsertChatUsageLimitOverrideRequest, spend_limit_micros=spend_limit_micros)
        return await self._call(
            ChatUsageLimitOverride, "PUT", f"{self._chats}/usage-limits/overrides/{user_id}", request
        )

    async def update_chat_user_usage_limit_override(
        self, user_id: UUID, spend_limit_micros: int
    ) -> ChatUsageLimitOverride:
        """An older name. Go: `codersdk.Client.UpdateChatUserUsageLimitOverride`."""
        return await self.upsert_chat_usage_limit_override(user_id, spend_limit_micros)

    async def delete_chat_usage_limit_override(self, user_id: UUID) -> None:
        """Take a user's own limit away. Go: `codersdk.Client.DeleteChatUsageLimitOverride`."""
        await self._command("DELETE", f"{self._chats}/usage-limits/overrides/{user_id}")

    async def delete_chat_user_usage_limit_override(self, user_id: UUID) -> None:
        """An older name. Go: `codersdk.Client.DeleteChatUserUsageLimitOverride`."""
        await self.delete_chat_usage_limit_override(user_id)

    async def upsert_chat_usage_limit_group_override(
        self, group_id: UUID, spend_limit_micros: int
    ) -> ChatUsageLimitGroupOverride:
        """Give a group a limit. Go: `codersdk.Client.UpsertChatUsageLimitGroupOverride`."""
        request = _checked(UpsertChatUsageLimitGroupOverrideRequest, spend_limit_micros=spend_limit_micros)
        path = f"{self._chats}/usage-limits/group-overrides/{group_id}"
        return await self._call(ChatUsageLimitGroupOverride, "PUT", path, request)

    async def delete_chat_usage_limit_group_override(self, group_id: UUID) -> None:
        """Take a group's limit away. Go: `codersdk.Client.DeleteChatUsageLimitGroupOverride`."""
        await self._command("DELETE", f"{self._chats}/usage-limits/group-overrides/{group_id}")

    # --- who and where ---------------------------------------------------------------------------------------------

    async def get_user(self, user: str | UUID = "me") -> User:
        """Whose token it is, or another user by id or username. Go: `codersdk.Client.User`."""
        return await self._get(User, f"/api/v2/users/{user}")

    async def get_build_info(self) -> BuildInfo:
        """Which version the server is. Go: `codersdk.Client.BuildInfo`."""
        return await self._get(BuildInfo, "/api/v2/buildinfo")

    # --- what they have in common ----------------------------------------------------------------------------------

    async def _get(self, kind: type[T], path: str) -> T:
        return await self._call(kind, "GET", path)

    async def _call(
        self,
        kind: type[T],
        method: str,
        path: str,
        request: CoderModel | None = None,
        *,
        success: int = 200,
        may_be_limit: bool = False,
    ) -> T:
        answer = await self._send(method, path, request)
        return _success(kind, answer, success, may_be_limit=may_be_limit)

    async def _command(self, method: str, path: str, request: CoderModel | None = None) -> None:
        answer = await self._send(method, path, request)
        if answer.status_code != 204:
            raise answer.refusal()

    async def _send(self, method: str, path: str, request: CoderModel | None) -> "Answer":
        if request is None:
            return await self._transport.send(method, path)
        try:
            body = f"{request.model_dump_json()}\n".encode()
        except ValueError as exc:
            raise InvalidRequest(f"encode body: {exc}") from exc
        return await self._transport.send(method, path, body, [("Content-Type", "application/json")])


def _checked(kind: type[Model], **values: Any) -> Model:
    """A request, or the error that says which value cannot be sent."""
    try:
        return kind(**values)
    except pydantic.ValidationError as exc:
        raise InvalidRequest(str(exc)) from exc


def _parts(content: InputParts) -> list[ChatInputPart] | None:
    if isinstance(content, str):
        return [ChatInputPart(type=ChatInputPartType.TEXT, text=content)]
    return None if content is None else list(content)


def _query_of(options: CoderModel, **other_names: str) -> str:
    """The query of a call: what is set, times in whole seconds."""
    values = {}
    for name in type(options).model_fields:
        value = getattr(options, name)
        if isinstance(value, Timestamp):
            text = "" if value.is_zero() else _rfc3339(value)
        elif isinstance(value, UUID):
            text = str(value) if value.int else ""
        elif isinstance(value, int):
            text = str(value) if value > 0 else ""
        else:
            text = value
        if text:
            values[other_names.get(name, name)] = text
    return query(values)


def _rfc3339(moment: Timestamp) -> str:
    try:
        return moment.rfc3339()
    except ValueError as exc:
        raise InvalidRequest(str(exc)) from exc


def _success(kind: type[T], answer: "Answer", success: int, *, may_be_limit: bool = False) -> T:
    if answer.status_code != success:
        raise answer.refusal(may_be_limit=may_be_limit)
    try:
        return read_json(kind, answer.body, only_first=True)
    except InvalidJSON as exc:
        raise InvalidAnswer(f"{answer.method} {answer.url}: {exc}", answer.status_code) from exc
