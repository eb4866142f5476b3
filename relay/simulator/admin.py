"""The administrative side of the API: models, configuration, files, users."""

from uuid import UUID

from aiohttp import web

from relay.simulator.calls import Call, Handler, Refused, answer_json, no_content, not_found
from relay.simulator.state import Database, ModelConfig, StoredFile, User
from relay.simulator.wire import NIL_UUID, ZERO_TIME, JsonObject, parse_uuid, rfc3339

PROVIDERS = {
    "anthropic": "Anthropic",
    "azure": "Azure OpenAI",
    "bedrock": "AWS Bedrock",
    "google": "Google",
    "openai": "OpenAI",
    "openai-compat": "OpenAI Compatible",
    "openrouter": "OpenRouter",
    "vercel": "Vercel AI Gateway",
}
LONGEST_PROMPT = 131_072
LARGEST_FILE = 10_485_760
MEDIA_TYPES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
}


class AdminApi:
    """Handlers by route below `/api/experimental/chats`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.routes: list[tuple[str, str, Handler]] = [
            ("GET", "models", self.models),
            ("GET", "model-configs", self.model_configs),
            ("GET", "providers", self.providers),
            ("GET", "insights/pull-requests", self.insights),
            ("GET", "config/system-prompt", self.get_system_prompt),
            ("PUT", "config/system-prompt", self.put_system_prompt),
            ("GET", "config/user-prompt", self.get_user_prompt),
            ("PUT", "config/user-prompt", self.put_user_prompt),
            ("GET", "config/desktop-enabled", self.get_desktop),
            ("PUT", "config/desktop-enabled", self.put_desktop),
            ("GET", "config/workspace-ttl", self.get_ttl),
            ("PUT", "config/workspace-ttl", self.put_ttl),
            ("POST", "files", self.upload),
            ("GET", "files/{file}", self.download),
        ]

    # Models

    def _visible_configs(self, user: User) -> list[ModelConfig]:
        configs = [c for c in self._database.model_configs.values() if c.enabled or user.is_owner]
        configs.sort(key=lambda c: c.updated_at, reverse=True)
        return sorted(configs, key=lambda c: (c.provider, c.model))

    async def models(self, call: Call) -> web.StreamResponse:
        enabled = [config for config in self._database.model_configs.values() if config.enabled]
        answer = []
        for provider in PROVIDERS:
            models = {c.model.lower(): c for c in sorted(enabled, key=lambda c: c.updated_at) if c.provider == provider}
            if enabled and not models:
                continue
            answer.append(
                {
                    "provider": provider,
                    "available": bool(models),
                    **({} if models else {"unavailable_reason": "missing_api_key"}),
                    "models": [
                        {
                            "id": f"{provider}:{config.model}",
                            "provider": provider,
                            "model": config.model,
                            "display_name": config.display_name or config.model,
                        }
                        for _, config in sorted(models.items())
                    ],
                }
            )
        return answer_json({"providers": answer})

    async def model_configs(self, call: Call) -> web.StreamResponse:
        return answer_json([_model_config(config) for config in self._visible_configs(call.user)])

    async def providers(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        configured = {config.provider: config for config in self._database.model_configs.values()}
        answer = []
        for provider, name in PROVIDERS.items():
            config = configured.get(provider)
            answer.append(
                {
                    "id": str(_provider_id(config) if config else NIL_UUID),
                    "provider": provider,
                    "display_name": name,
                    "enabled": config is not None,
                    "has_api_key": config is not None,
                    **({"base_url": "http://127.0.0.1/v1"} if config else {}),
                    "source": "database" if config else "supported",
                    "created_at": rfc3339(config.created_at) if config else ZERO_TIME,
                    "updated_at": rfc3339(config.updated_at) if config else ZERO_TIME,
                }
            )
        return answer_json(answer)

    async def insights(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        names = (
            "total_prs_created", "total_prs_merged", "merge_rate", "total_additions", "total_deletions",
            "total_cost_micros", "cost_per_merged_pr_micros", "approval_rate", "prev_total_prs_created",
            "prev_total_prs_merged", "prev_merge_rate", "prev_cost_per_merged_pr_micros",
        )  # fmt: skip
        summary = dict.fromkeys(names, 0)
        return answer_json({"summary": summary, "time_series": [], "by_model": [], "recent_prs": []})

    # Configuration

    async def get_system_prompt(self, call: Call) -> web.StreamResponse:
        return answer_json({"system_prompt": self._database.system_prompt})

    async def put_system_prompt(self, call: Call) -> web.StreamResponse:
        text = _prompt((await call.body()).text("system_prompt"), "System prompt")
        if not call.user.is_owner:
            raise not_found()
        self._database.system_prompt = text
        return no_content()

    async def get_user_prompt(self, call: Call) -> web.StreamResponse:
        return answer_json({"custom_prompt": self._database.user_prompts.get(call.user.id, "")})

    async def put_user_prompt(self, call: Call) -> web.StreamResponse:
        text = _prompt((await call.body()).text("custom_prompt"), "Custom prompt")
        self._database.user_prompts[call.user.id] = text
        return answer_json({"custom_prompt": text})

    async def get_desktop(self, call: Call) -> web.StreamResponse:
        return answer_json({"enable_desktop": self._database.desktop_enabled})

    async def put_desktop(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        self._database.desktop_enabled = bool((await call.body()).flag("enable_desktop"))
        return no_content()

    async def get_ttl(self, call: Call) -> web.StreamResponse:
        return answer_json({"workspace_ttl_ms": self._database.workspace_ttl_ms})

    async def put_ttl(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        ttl = (await call.body()).integer("workspace_ttl_ms") or 0
        if ttl < 0:
            raise Refused(400, "Workspace TTL must be non-negative.")
        if 0 < ttl < 60_000:
            raise Refused(400, "Workspace TTL must not be less than 1 minute.")
        if ttl > 2_592_000_000:
            raise Refused(400, "Workspace TTL must not exceed 30 days.")
        self._database.workspace_ttl_ms = ttl
        return no_content()

    # Files

    async def upload(self, call: Call) -> web.StreamResponse:
        organization = call.query.get("organization", "")
        if not organization:
            raise Refused(400, "Missing organization query parameter.")
        try:
            parse_uuid(organization)
        except ValueError as exc:
            raise Refused(400, "Invalid organization ID.") from exc
        unsupported = Refused(
            400, "Unsupported file type.", "Allowed types: image/png, image/jpeg, image/gif, image/webp."
        )
        if call.request.content_type not in ("image/png", "image/jpeg", "image/gif", "image/webp"):
            raise unsupported
        data = await call.request.read()
        if len(data) > LARGEST_FILE:
            raise Refused(413, "File too large.", f"Maximum file size is {LARGEST_FILE} bytes.")
        media_type = next((kind for magic, kind in MEDIA_TYPES.items() if data.startswith(magic)), None)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            media_type = "image/webp"
        if media_type is None:
            raise unsupported
        disposition = call.request.headers.get("Content-Disposition", "")
        name = disposition.partition("filename=")[2].strip('"')[:255]
        stored = StoredFile(self._database.new_id(), call.user.id, name, media_type, data)
        self._database.files[stored.id] = stored
        return answer_json({"id": str(stored.id)}, 201)

    async def download(self, call: Call) -> web.StreamResponse:
        try:
            file_id = parse_uuid(call.names[0])
        except ValueError as exc:
            raise Refused(400, "Invalid file ID.", str(exc)) from exc
        stored = self._database.files.get(file_id)
        if stored is None or not (call.user.is_owner or stored.owner_id == call.user.id):
            raise not_found()
        headers = {
            "Content-Type": stored.media_type,
            "Content-Disposition": f"inline; filename={stored.name}" if stored.name else "inline",
            "Cache-Control": "private, max-age=31536000, immutable",
        }
        return web.Response(body=stored.data, headers=headers)


def find_user(database: Database, caller: User, name: str) -> User:
    """By `me`, id or name in any case; a plain member finds only themselves.

    Raises:
        Refused: 404.
    """
    if name == "me":
        return caller
    for user in database.users.values():
        if name.lower() in (user.username.lower(), str(user.id)) and (caller.is_owner or caller.id == user.id):
            return user
    raise not_found()


def user_json(user: User, organization_id: UUID) -> JsonObject:
    """A user of `/api/v2/users`."""
    created = rfc3339(user.created_at)
    return {
        "id": str(user.id),
        "username": user.username,
        "name": user.name,
        "email": f"{user.username}@example.com",
        "created_at": created,
        "updated_at": created,
        "last_seen_at": created,
        "status": "active",
        "login_type": "password",
        "organization_ids": [str(organization_id)],
        "roles": [{"name": "owner", "display_name": "Owner"}] if user.is_owner else [],
    }


def _model_config(config: ModelConfig) -> JsonObject:
    prices = {
        "input_price_per_million_tokens": config.input_price,
        "output_price_per_million_tokens": config.output_price,
        "cache_read_price_per_million_tokens": config.cache_read_price,
        "cache_write_price_per_million_tokens": config.cache_write_price,
    }
    cost = {name: format(price, "f") for name, price in prices.items() if price is not None}
    return {
        "id": str(config.id),
        "provider": config.provider,
        "model": config.model,
        "display_name": config.display_name,
        "enabled": config.enabled,
        "is_default": config.is_default,
        "context_limit": config.context_limit,
        "compression_threshold": config.compression_threshold,
        **({"model_config": {"cost": cost}} if cost else {}),
        "created_at": rfc3339(config.created_at),
        "updated_at": rfc3339(config.updated_at),
    }


def _provider_id(config: ModelConfig) -> UUID:
    """A provider's id needs only to be stable; the config's id, turned round, is."""
    return UUID(int=config.id.int ^ ((1 << 48) - 1))


def _prompt(text: str, what: str) -> str:
    text = text.strip()
    size = len(text.encode())
    if size > LONGEST_PROMPT:
        detail = f"Maximum length is {LONGEST_PROMPT} bytes, got {size}."
        raise Refused(400, f"{what} exceeds maximum length.", detail)
    return text
