"""What was spent. Money is in micros: millionths of a US dollar."""

from uuid import UUID

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.model import CoderModel, Int64, Omit
from relay.codersdk.models_chat import Pagination
from relay.codersdk.models_limits import ChatUsageLimitStatus
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class ChatCostSummaryOptions(CoderModel):
    """Which period. Go: `codersdk.ChatCostSummaryOptions`.

    Zero times are not sent; the server then takes the last 30 days.
    """

    start_date: Timestamp = ZERO_TIME
    """Sent in whole seconds, as is `end_date`."""
    end_date: Timestamp = ZERO_TIME
    """Not part of the period itself."""


class ChatCostUsersOptions(Pagination):
    """Which period, users and page; zeros are not sent, `after_id` never is. Go: `codersdk.ChatCostUsersOptions`."""

    start_date: Timestamp = ZERO_TIME
    end_date: Timestamp = ZERO_TIME
    username: str = ""
    """A part of the username or of the name."""


class ChatCostModelBreakdown(CoderModel):
    """What one model cost. Go: `codersdk.ChatCostModelBreakdown`."""

    model_config_id: UUID = NIL_UUID
    display_name: str = ""
    provider: str = ""
    model: str = ""
    total_cost_micros: Int64 = 0
    message_count: Int64 = 0
    total_input_tokens: Int64 = 0
    total_output_tokens: Int64 = 0
    total_cache_read_tokens: Int64 = 0
    total_cache_creation_tokens: Int64 = 0


class ChatCostChatBreakdown(CoderModel):
    """What one chat and its sub-agents cost. Go: `codersdk.ChatCostChatBreakdown`."""

    root_chat_id: UUID = NIL_UUID
    chat_title: str = ""
    total_cost_micros: Int64 = 0
    message_count: Int64 = 0
    total_input_tokens: Int64 = 0
    total_output_tokens: Int64 = 0
    total_cache_read_tokens: Int64 = 0
    total_cache_creation_tokens: Int64 = 0


class ChatCostUserRollup(CoderModel):
    """What one user's chats cost. Go: `codersdk.ChatCostUserRollup`."""

    user_id: UUID = NIL_UUID
    username: str = ""
    name: str = ""
    avatar_url: str = ""
    total_cost_micros: Int64 = 0
    message_count: Int64 = 0
    chat_count: Int64 = 0
    total_input_tokens: Int64 = 0
    total_output_tokens: Int64 = 0
    total_cache_read_tokens: Int64 = 0
    total_cache_creation_tokens: Int64 = 0


class ChatCostSummary(CoderModel):
    """What one user's chats cost in a period. Go: `codersdk.ChatCostSummary`."""

    start_date: Timestamp = ZERO_TIME
    end_date: Timestamp = ZERO_TIME
    total_cost_micros: Int64 = 0
    priced_message_count: Int64 = 0
    unpriced_message_count: Int64 = 0
    total_input_tokens: Int64 = 0
    total_output_tokens: Int64 = 0
    total_cache_read_tokens: Int64 = 0
    total_cache_creation_tokens: Int64 = 0
    by_model: list[ChatCostModelBreakdown] | None = None
    by_chat: list[ChatCostChatBreakdown] | None = None
    usage_limit: Omit[ChatUsageLimitStatus | None] = None


class ChatCostUsersResponse(CoderModel):
    """What each user's chats cost in a period, the most expensive first. Go: `codersdk.ChatCostUsersResponse`."""

    start_date: Timestamp = ZERO_TIME
    end_date: Timestamp = ZERO_TIME
    count: Int64 = 0
    """Users that match, on all pages."""
    users: list[ChatCostUserRollup] | None = None


class ChatCost(CoderModel):
    """What a chat and the chats of its sub-agents cost; each of them tells the sum of all. Since 2.36.

    Falls to 0 when the gateway forgets the requests, after 60 days by default.
    """

    chat_id: UUID = NIL_UUID
    total_cost_micros: Int64 = 0
    priced_message_count: Omit[Int64] = 0
    """In 2.36 only, as is the next."""
    unpriced_messages_having_usage_count: Omit[Int64] = 0
    request_count: Omit[Int64] = 0
    """Since 2.37, as is the next."""
    unpriced_request_count: Omit[Int64] = 0


class UserAIBudget(CoderModel):
    """What a user may spend in a month. Since 2.36, with a licence for the AI Gateway."""

    spend_limit_micros: Int64 | None = None
    limit_source: str = ""


class UserAISpend(CoderModel):
    """What a user has spent through the AI Gateway in this calendar month, UTC. Since 2.36, with a licence for it."""

    user_id: UUID = NIL_UUID
    effective_group_id: UUID | None = None
    effective_budget: UserAIBudget | None = None
    """None: no limit."""
    period_start: Timestamp = ZERO_TIME
    period_end: Timestamp = ZERO_TIME
    current_spend_micros: Int64 = 0
