"""How much may be spent. Money is in micros: millionths of a US dollar."""

from uuid import UUID

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.enums import ChatUsageLimitPeriod
from relay.codersdk.model import CoderModel, Int64, Omit
from relay.codersdk.models_response import Response
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class ChatUsageLimitExceededResponse(Response):
    """The answer when a limit is used up. Go: `codersdk.ChatUsageLimitExceededResponse`."""

    spent_micros: Int64 = 0
    limit_micros: Int64 = 0
    resets_at: Timestamp = ZERO_TIME


class ChatUsageLimitConfig(CoderModel):
    """The limit of everyone who has none of their own. Go: `codersdk.ChatUsageLimitConfig`."""

    spend_limit_micros: Int64 | None = None
    """None: no limit."""
    period: ChatUsageLimitPeriod = ChatUsageLimitPeriod("")
    updated_at: Timestamp = ZERO_TIME


class ChatUsageLimitOverride(CoderModel):
    """One user's own limit. Go: `codersdk.ChatUsageLimitOverride`."""

    user_id: UUID = NIL_UUID
    username: str = ""
    name: str = ""
    avatar_url: str = ""
    spend_limit_micros: Int64 | None = None


class ChatUsageLimitGroupOverride(CoderModel):
    """One group's limit. Go: `codersdk.ChatUsageLimitGroupOverride`."""

    group_id: UUID = NIL_UUID
    group_name: str = ""
    group_display_name: str = ""
    group_avatar_url: str = ""
    member_count: Int64 = 0
    spend_limit_micros: Int64 | None = None


class UpsertChatUsageLimitOverrideRequest(CoderModel):
    """A user's limit to set. Go: `codersdk.UpsertChatUsageLimitOverrideRequest`."""

    spend_limit_micros: Int64 = 0
    """Greater than 0."""


UpdateChatUsageLimitOverrideRequest = UpsertChatUsageLimitOverrideRequest
"""An older name. Go: `codersdk.UpdateChatUsageLimitOverrideRequest`."""


class UpsertChatUsageLimitGroupOverrideRequest(CoderModel):
    """A group's limit to set. Go: `codersdk.UpsertChatUsageLimitGroupOverrideRequest`."""

    spend_limit_micros: Int64 = 0
    """Greater than 0."""


UpdateChatUsageLimitGroupOverrideRequest = UpsertChatUsageLimitGroupOverrideRequest
"""An older name. Go: `codersdk.UpdateChatUsageLimitGroupOverrideRequest`."""


class ChatUsageLimitStatus(CoderModel):
    """What a user has spent in the current period. Go: `codersdk.ChatUsageLimitStatus`."""

    is_limited: bool = False
    """Whether a limit applies, not whether it is reached."""
    period: Omit[ChatUsageLimitPeriod] = ChatUsageLimitPeriod("")
    spend_limit_micros: Omit[Int64 | None] = None
    current_spend: Int64 = 0
    period_start: Omit[Timestamp] = ZERO_TIME
    """Always in the JSON, as is `period_end`; the zero time when nothing is limited."""
    period_end: Omit[Timestamp] = ZERO_TIME


class ChatUsageLimitConfigResponse(ChatUsageLimitConfig):
    """All limits of the deployment. Go: `codersdk.ChatUsageLimitConfigResponse`."""

    unpriced_model_count: Int64 = 0
    """Models without a price: what they cost does not count."""
    overrides: list[ChatUsageLimitOverride] | None = None
    group_overrides: list[ChatUsageLimitGroupOverride] | None = None
