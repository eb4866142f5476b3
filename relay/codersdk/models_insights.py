"""Pull requests that chats made."""

from uuid import UUID

from pydantic import Field

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.model import CoderModel, Float64, Int32, Int64, Omit
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class PRInsightsSummary(CoderModel):
    """Pull requests of a period, and of the one before. Costs in micros. Go: `codersdk.PRInsightsSummary`."""

    total_prs_created: Int64 = 0
    total_prs_merged: Int64 = 0
    merge_rate: Float64 = 0.0
    total_additions: Int64 = 0
    total_deletions: Int64 = 0
    total_cost_micros: Int64 = 0
    cost_per_merged_pr_micros: Int64 = 0
    approval_rate: Float64 = 0.0
    prev_total_prs_created: Int64 = 0
    prev_total_prs_merged: Int64 = 0
    prev_merge_rate: Float64 = 0.0
    prev_cost_per_merged_pr_micros: Int64 = 0


class PRInsightsTimeSeriesEntry(CoderModel):
    """One day. Go: `codersdk.PRInsightsTimeSeriesEntry`."""

    date: Timestamp = ZERO_TIME
    prs_created: Int64 = 0
    prs_merged: Int64 = 0
    prs_closed: Int64 = 0


class PRInsightsModelBreakdown(CoderModel):
    """Pull requests of one model. Go: `codersdk.PRInsightsModelBreakdown`."""

    model_config_id: UUID = NIL_UUID
    display_name: str = ""
    provider: str = ""
    total_prs: Int64 = 0
    merged_prs: Int64 = 0
    merge_rate: Float64 = 0.0
    total_additions: Int64 = 0
    total_deletions: Int64 = 0
    total_cost_micros: Int64 = 0
    cost_per_merged_pr_micros: Int64 = 0


class PRInsightsPullRequest(CoderModel):
    """One pull request and its chat. Go: `codersdk.PRInsightsPullRequest`."""

    chat_id: UUID = NIL_UUID
    pr_title: str = ""
    pr_url: Omit[str | None] = None
    pr_number: Omit[Int32 | None] = None
    state: str = ""
    draft: bool = False
    additions: Int32 = 0
    deletions: Int32 = 0
    changed_files: Int32 = 0
    commits: Omit[Int32 | None] = None
    approved: Omit[bool | None] = None
    changes_requested: bool = False
    reviewer_count: Omit[Int32 | None] = None
    author_login: Omit[str | None] = None
    author_avatar_url: Omit[str | None] = None
    base_branch: str = ""
    model_display_name: str = ""
    cost_micros: Int64 = 0
    created_at: Timestamp = ZERO_TIME


class PRInsightsResponse(CoderModel):
    """Pull requests that chats made in a period. Go: `codersdk.PRInsightsResponse`."""

    summary: PRInsightsSummary = Field(default_factory=PRInsightsSummary)
    time_series: list[PRInsightsTimeSeriesEntry] | None = None
    by_model: list[PRInsightsModelBreakdown] | None = None
    recent_prs: list[PRInsightsPullRequest] | None = None
    """At most 20, newest chat first."""
