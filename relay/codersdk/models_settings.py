"""Settings of a deployment and of a user."""

from relay.codersdk.model import CoderModel, Int64


class ChatSystemPrompt(CoderModel):
    """The deployment's system prompt, asked and set. Go: `codersdk.ChatSystemPrompt`."""

    system_prompt: str = ""


class UserChatCustomPrompt(CoderModel):
    """A user's own prompt, asked and set. Go: `codersdk.UserChatCustomPrompt`."""

    custom_prompt: str = ""


class ChatDesktopEnabledResponse(CoderModel):
    """Whether agents get a desktop. Go: `codersdk.ChatDesktopEnabledResponse`."""

    enable_desktop: bool = False


class UpdateChatDesktopEnabledRequest(CoderModel):
    """Whether agents shall get a desktop. Go: `codersdk.UpdateChatDesktopEnabledRequest`."""

    enable_desktop: bool = False


class ChatWorkspaceTTLResponse(CoderModel):
    """How long chat workspaces live. Go: `codersdk.ChatWorkspaceTTLResponse`."""

    workspace_ttl_ms: Int64 = 0
    """Milliseconds; 0: the template decides."""


class UpdateChatWorkspaceTTLRequest(CoderModel):
    """How long chat workspaces shall live. Go: `codersdk.UpdateChatWorkspaceTTLRequest`."""

    workspace_ttl_ms: Int64 = 0
    """Milliseconds; 0: the template decides. The server takes a minute to 30 days."""


class ChatRetentionDaysResponse(CoderModel):
    """How long archived chats are kept. Since 2.33."""

    retention_days: Int64 = 0
    """After that many days an archived chat is deleted for good; 0: never."""


class ChatAutoArchiveDaysResponse(CoderModel):
    """When chats are archived by the server. Since 2.33."""

    auto_archive_days: Int64 = 0
    """After that many days without activity; 0: never."""
