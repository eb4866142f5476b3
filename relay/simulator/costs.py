"""What was spent, and what may be: cost reports and usage limits."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from aiohttp import web

from relay.simulator import spend
from relay.simulator.admin import find_user
from relay.simulator.calls import Call, Handler, Refused, answer_json, no_content
from relay.simulator.dialect import Features
from relay.simulator.state import Chat, Database, Message, User
from relay.simulator.wire import JsonObject, parse_int, parse_uuid, rfc3339

TOKEN_TOTALS = {
    "total_input_tokens": "input_tokens",
    "total_output_tokens": "output_tokens",
    "total_cache_read_tokens": "cache_read_tokens",
    "total_cache_creation_tokens": "cache_creation_tokens",
}


class CostsApi:
    """Handlers by route below the chats; which of them there are depends on the server's age."""

    def __init__(self, database: Database, features: Features) -> None:
        self._database = database
        self._features = features
        self.routes: list[tuple[str, str, Handler]] = [("GET", "{chat}/cost", self.chat_cost)]
        if not features.chat_cost:
            self.routes = []
        if not features.native_limits:
            return
        self.routes += [
            ("GET", "cost/users", self.cost_users),
            ("GET", "cost/{user}/summary", self.cost_summary),
            ("GET", "usage-limits", self.get_limits),
            ("PUT", "usage-limits", self.put_limits),
            ("GET", "usage-limits/status", self.limit_status),
            ("PUT", "usage-limits/overrides/{user}", self.put_override),
            ("DELETE", "usage-limits/overrides/{user}", self.delete_override),
        ]

    # Costs

    async def chat_cost(self, call: Call) -> web.StreamResponse:
        """Of the whole tree of the chat: a root and its sub-agents all tell the same."""
        root_id = call.chat.root_id or call.chat.id
        tree = [chat for chat in self._database.chats.values() if root_id in (chat.id, chat.root_id)]
        messages = [m for chat in tree for m in chat.messages if m.role == "assistant" and m.usage is not None]
        return answer_json(
            {
                "chat_id": str(call.chat.id),
                "total_cost_micros": sum(message.cost_micros or 0 for message in messages),
                "request_count": len(messages),
                "unpriced_request_count": sum(1 for message in messages if message.cost_micros is None),
            }
        )

    async def cost_users(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        start, end = self._window(call, ("username", "limit", "offset"))
        paging = _paging(call)
        wanted = call.query.get("username", "").lower()
        rollups: list[JsonObject] = []
        for user in self._database.users.values():
            messages = spend.charged(self._database, user.id, start, end)
            if messages and (wanted in user.username.lower() or wanted in user.name.lower()):
                chats = {self._root_of(message) for message in messages}
                total, counted, tokens = self._sums(messages)
                rollups.append(
                    {
                        "user_id": str(user.id),
                        "username": user.username,
                        "name": user.name,
                        "avatar_url": "",
                        "total_cost_micros": total,
                        "message_count": counted,
                        "chat_count": len(chats),
                        **tokens,
                    }
                )
        rollups.sort(key=lambda rollup: (-rollup["total_cost_micros"], rollup["username"]))
        limit, offset = paging
        page = rollups[offset : offset + limit]
        dates = {"start_date": rfc3339(start), "end_date": rfc3339(end)}
        return answer_json({**dates, "count": len(rollups), "users": page})

    async def cost_summary(self, call: Call) -> web.StreamResponse:
        user = find_user(self._database, call.user, call.names[0])
        start, end = self._window(call, ())
        messages = spend.charged(self._database, user.id, start, end)
        priced = [message for message in messages if message.cost_micros is not None]
        total, counted, tokens = self._sums(messages)
        answer: JsonObject = {
            "start_date": rfc3339(start),
            "end_date": rfc3339(end),
            "total_cost_micros": total,
            "priced_message_count": len(priced),
            "unpriced_message_count": counted - len(priced),
            **tokens,
            "by_model": self._by_model(messages),
            "by_chat": self._by_chat(messages),
        }
        if spend.limit_of(self._database, user.id) is not None:
            answer["usage_limit"] = spend.limit_status(self._database, user.id)
        return answer_json(answer)

    def _by_model(self, messages: list[Message]) -> list[JsonObject]:
        groups = []
        for model_id, group in _grouped(messages, lambda message: message.model_config_id):
            config = self._database.model_configs.get(model_id)
            if config is not None:
                total, counted, tokens = self._sums(group)
                groups.append(
                    {
                        "model_config_id": str(model_id),
                        "display_name": config.display_name or config.model,
                        "provider": config.provider,
                        "model": config.model,
                        "total_cost_micros": total,
                        "message_count": counted,
                        **tokens,
                    }
                )
        return sorted(groups, key=lambda group: -group["total_cost_micros"])

    def _by_chat(self, messages: list[Message]) -> list[JsonObject]:
        groups = []
        for root_id, group in _grouped(messages, self._root_of):
            root = self._database.chats.get(root_id)
            total, counted, tokens = self._sums(group)
            groups.append(
                {
                    "root_chat_id": str(root_id),
                    "chat_title": root.title if root else "",
                    "total_cost_micros": total,
                    "message_count": counted,
                    **tokens,
                }
            )
        return sorted(groups, key=lambda group: -group["total_cost_micros"])

    def _sums(self, messages: list[Message]) -> tuple[int, int, JsonObject]:
        """Cost, how many messages have any token count, and the totals: tokens, and the run's time where it is kept."""
        totals: JsonObject = {
            total: sum(getattr(message.usage, name) for message in messages if message.usage)
            for total, name in TOKEN_TOTALS.items()
        }
        if self._features.labels:
            totals["total_runtime_ms"] = sum(message.runtime_ms for message in messages)
        counted = sum(1 for message in messages if message.usage and message.usage.counts_tokens)
        return sum(message.cost_micros or 0 for message in messages), counted, totals

    def _root_of(self, message: Message) -> UUID:
        chat: Chat = self._database.chats[message.chat_id]
        return chat.root_id or chat.id

    def _window(self, call: Call, others: Iterable[str]) -> tuple[datetime, datetime]:
        """The half-open window of the query, by default the last thirty days."""
        allowed = {"start_date", "end_date", *others}
        errors = [(name, f'"{name}" is not a valid query param') for name in call.query if name not in allowed]
        dates: dict[str, datetime] = {}
        for name in ("start_date", "end_date"):
            text = call.query.get(name, "")
            if text:
                try:
                    dates[name] = datetime.fromisoformat(text)
                    if dates[name].tzinfo is None or "T" not in text:
                        raise ValueError("no zone")  # noqa: TRY301 -- the same answer as for any other bad date
                except ValueError:
                    layout = "2006-01-02T15:04:05Z07:00"
                    detail = (
                        f'Query param "{name}" must be a valid date format ({layout}): parsing time "{text}" '
                        f'as "{layout}": cannot parse "{text}" as "2006"'
                    )
                    errors.append((name, detail))
        if errors:
            raise Refused(400, "Invalid query parameters.", validations=errors)
        end = dates.get("end_date", self._database.clock.now()).astimezone(UTC)
        return dates.get("start_date", end - timedelta(days=30)).astimezone(UTC), end

    # Limits

    async def get_limits(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        configs = self._database.model_configs.values()
        unpriced = [c for c in configs if c.enabled and c.input_price is None and c.output_price is None]
        limits = self._database.limits
        overrides = [
            _override(self._database.users[user_id], micros)
            for user_id, micros in sorted(
                limits.overrides.items(), key=lambda item: self._database.users[item[0]].username
            )
        ]
        return answer_json(
            {
                **self._limit_config(),
                "unpriced_model_count": len(unpriced),
                "overrides": overrides,
                "group_overrides": [],
            }
        )

    async def put_limits(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        body = await call.body()
        micros, period = body.integer("spend_limit_micros"), body.text("period")
        if micros is not None and micros <= 0:
            raise Refused(400, "Invalid chat usage limit spend limit.", "Spend limit must be greater than 0.")
        if micros is None and not period:
            period = "month"
        if period not in spend.PERIODS:
            raise Refused(400, "Invalid chat usage limit period.", "Period must be one of: day, week, month.")
        limits = self._database.limits
        limits.spend_limit_micros, limits.period = micros, period
        limits.updated_at = self._database.clock.now()
        return answer_json(self._limit_config())

    def _limit_config(self) -> JsonObject:
        limits = self._database.limits
        return {
            "spend_limit_micros": limits.spend_limit_micros,
            "period": limits.period,
            "updated_at": rfc3339(limits.updated_at),
        }

    async def limit_status(self, call: Call) -> web.StreamResponse:
        return answer_json(spend.limit_status(self._database, call.user.id))

    async def put_override(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        user_id = _limit_user_id(call)
        micros = (await call.body()).integer("spend_limit_micros") or 0
        if micros <= 0:
            raise Refused(400, "Invalid chat usage limit override.", "Spend limit must be greater than 0.")
        user = self._database.users.get(user_id)
        if user is None:
            raise Refused(404, "User not found.")
        self._database.limits.overrides[user_id] = micros
        return answer_json(_override(user, micros))

    async def delete_override(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        user_id = _limit_user_id(call)
        if user_id not in self._database.users:
            raise Refused(400, "User not found.")
        if self._database.limits.overrides.pop(user_id, None) is None:
            raise Refused(400, "Chat usage limit override not found.")
        return no_content()


def _paging(call: Call) -> tuple[int, int]:
    numbers: dict[str, int] = {}
    errors: list[tuple[str, str]] = []
    for name in ("limit", "offset"):
        text = call.query.get(name, "")
        try:
            numbers[name] = parse_int(text) if text else 0
        except ValueError as exc:
            errors.append((name, f'Query param "{name}" must be a valid integer: {exc}'))
    if numbers.get("offset", 0) < 0:
        errors.append(("offset", "Must be greater than or equal to 0."))
    if numbers.get("offset", 0) > 2_147_483_647:
        errors.append(("offset", "Must be less than or equal to 2147483647."))
    if errors:
        raise Refused(400, "Invalid query parameters.", validations=errors)
    return numbers["limit"] if numbers["limit"] > 0 else 10, numbers["offset"]


def _grouped(messages: list[Message], key: Callable[[Message], Any]) -> list[tuple[Any, list[Message]]]:
    groups: dict[Any, list[Message]] = {}
    for message in messages:
        groups.setdefault(key(message), []).append(message)
    return list(groups.items())


def _override(user: User, micros: int) -> JsonObject:
    return {
        "user_id": str(user.id),
        "username": user.username,
        "name": user.name,
        "avatar_url": "",
        "spend_limit_micros": micros,
    }


def _limit_user_id(call: Call) -> UUID:
    try:
        return parse_uuid(call.names[0])
    except ValueError as exc:
        raise Refused(400, "Invalid chat usage limit user ID.", str(exc)) from exc
