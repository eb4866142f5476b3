"""The administrative side of the API: models, configuration, files, users."""

from uuid import UUID

from aiohttp import web

from relay.simulator.calls import Call, Handler, Refused, answer_json, no_content, not_found
from relay.simulator.dialect import Features
from relay.simulator.provider import PROVIDERS
from relay.simulator.state import Database, ModelConfig, StoredFile, User
from relay.simulator.wire import NIL_UUID, ZERO_TIME, JsonObject, parse_uuid, rfc3339

LONGEST_PROMPT = 131_072
LARGEST_FILE = 10_485_760
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
PLAIN = "text/plain"
PROVIDERS_ARE_GONE = "Legacy chat provider APIs were removed. Use AI provider APIs instead."
SEE_THE_DOCS = "See https://coder.com/docs/ai-coder/agents/models#providers for AI provider configuration."
KEY_POLICIES = {
    "central_api_key_enabled": True,
    "allow_user_api_key": False,
    "allow_central_api_key_fallback": False,
}
MEDIA_TYPES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
}


class AdminApi:
    """Handlers by route, below the chats and below `/api/v2`. Which of them there are depends on the server's age."""

    def __init__(self, database: Database, features: Features) -> None:
        self._database = database
        self._features = features
        self.site_routes: list[tuple[str, str, Handler]] = []
        if not features.legacy_providers:
            self.site_routes.append(("GET", "ai/providers", self.ai_providers))
        if features.organization_models:
            self.site_routes.append(("GET", "organizations/{organization}/chats/models", self.organization_models))
        self.routes: list[tuple[str, str, Handler]] = [
            ("GET", "models", self.models),
            ("GET", "model-configs", self.model_configs),
            ("GET", "providers", self.providers),
            ("POST", "providers", self.providers),
            ("GET", "insights/pull-requests", self.insights),
            ("GET", "config/system-prompt", self.get_system_prompt),
            ("PUT", "config/system-prompt", self.put_system_prompt),
            ("GET", "config/user-prompt", self.get_user_prompt),
            ("PUT", "config/user-prompt", self.put_user_prompt),
            ("GET", "config/workspace-ttl", self.get_ttl),
            ("PUT", "config/workspace-ttl", self.put_ttl),
            ("POST", "files", self.upload),
            ("GET", "files/{file}", self.download),
        ]
        if features.desktop:
            self.routes += [
                ("GET", "config/desktop-enabled", self.get_desktop),
                ("PUT", "config/desktop-enabled", self.put_desktop),
            ]
        if features.retention:
            self.routes += [
                ("GET", "config/retention-days", self.get_retention),
                ("PUT", "config/retention-days", self.put_retention),
                ("GET", "config/auto-archive-days", self.get_auto_archive),
                ("PUT", "config/auto-archive-days", self.put_auto_archive),
            ]

    # Models

    def _visible_configs(self, user: User) -> list[ModelConfig]:
        configs = [c for c in self._database.model_configs.values() if c.enabled or user.is_owner]
        configs.sort(key=lambda c: c.updated_at, reverse=True)
        return sorted(configs, key=lambda c: (c.provider, c.model))

    async def models(self, call: Call) -> web.StreamResponse:
        answer: JsonObject = {"providers": self._providers_with_models()}
        if self._features.unsupported_providers:
            answer["unsupported_providers"] = []
        return answer_json(answer)

    async def organization_models(self, call: Call) -> web.StreamResponse:
        """
        Raises:
            Refused: 404, another organization.
        """
        if call.names[0] not in ("default", str(self._database.organization_id)):
            raise not_found()
        return answer_json(
            {
                "models": [self._model_config(config) for config in self._visible_configs(call.user)],
                "providers": self._providers_with_models(),
                "unsupported_providers": [],
            }
        )

    def _providers_with_models(self) -> list[JsonObject]:
        enabled = [config for config in self._database.model_configs.values() if config.enabled]
        answer: list[JsonObject] = []
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
                            "display_name": config.display_name,
                        }
                        for _, config in sorted(models.items())
                    ],
                }
            )
        return answer

    async def model_configs(self, call: Call) -> web.StreamResponse:
        return answer_json([self._model_config(config) for config in self._visible_configs(call.user)])

    async def providers(self, call: Call) -> web.StreamResponse:
        if not self._features.legacy_providers:
            raise Refused(410, PROVIDERS_ARE_GONE, SEE_THE_DOCS)
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
                    **(KEY_POLICIES if self._features.labels else {}),
                    **({"base_url": "http://127.0.0.1/v1"} if config else {}),
                    "source": "database" if config else "supported",
                    "created_at": rfc3339(config.created_at) if config else ZERO_TIME,
                    "updated_at": rfc3339(config.updated_at) if config else ZERO_TIME,
                }
            )
        return answer_json(answer)

    async def ai_providers(self, call: Call) -> web.StreamResponse:
        """What replaced the providers of the chats."""
        call.need_owner()
        answer = []
        for config in {config.provider: config for config in self._database.model_configs.values()}.values():
            created, updated = rfc3339(config.created_at), rfc3339(config.updated_at)
            key = {"id": str(_provider_id(config)), "masked": "...", "created_at": created}
            answer.append(
                {
                    "id": str(_provider_id(config)),
                    "type": config.provider,
                    "name": "lab",
                    "display_name": "Lab",
                    **({"icon": ""} if self._features.chat_summaries else {}),
                    "enabled": True,
                    "base_url": "http://127.0.0.1/v1",
                    "api_keys": [key],
                    "settings": None,
                    "created_at": created,
                    "updated_at": updated,
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

    def _model_config(self, config: ModelConfig) -> JsonObject:
        has = self._features
        prices = {
            "input_price_per_million_tokens": config.input_price,
            "output_price_per_million_tokens": config.output_price,
            "cache_read_price_per_million_tokens": config.cache_read_price,
            "cache_write_price_per_million_tokens": config.cache_write_price,
        }
        cost = {name: format(price, "f") for name, price in prices.items() if price is not None and has.priced_models}
        return {
            "id": str(config.id),
            **({} if has.unsupported_providers else {"provider": config.provider}),
            **({} if has.legacy_providers else {"ai_provider_id": str(_provider_id(config))}),
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

    # Configuration

    async def get_system_prompt(self, call: Call) -> web.StreamResponse:
        answer: JsonObject = {"system_prompt": self._database.system_prompt}
        if self._features.labels:
            if not call.user.is_owner:
                raise not_found()
            answer |= {"include_default_system_prompt": True, "default_system_prompt": "You are the Coder agent."}
        return answer_json(answer)

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

    async def get_retention(self, call: Call) -> web.StreamResponse:
        return answer_json({"retention_days": self._database.retention_days})

    async def put_retention(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        self._database.retention_days = (await call.body()).integer("retention_days") or 0
        return no_content()

    async def get_auto_archive(self, call: Call) -> web.StreamResponse:
        return answer_json({"auto_archive_days": self._database.auto_archive_days})

    async def put_auto_archive(self, call: Call) -> web.StreamResponse:
        call.need_owner()
        self._database.auto_archive_days = (await call.body()).integer("auto_archive_days") or 0
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
        allowed = self._allowed_files()
        unsupported = Refused(400, "Unsupported file type.", f"Allowed types: {', '.join(allowed)}.")
        if call.request.content_type not in allowed:
            raise unsupported
        data = await call.request.read()
        if len(data) > LARGEST_FILE:
            raise Refused(413, "File too large.", f"Maximum file size is {LARGEST_FILE} bytes.")
        media_type = next((kind for magic, kind in MEDIA_TYPES.items() if data.startswith(magic)), None)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            media_type = "image/webp"
        if media_type is None and not call.request.content_type.startswith("image/"):
            media_type = call.request.content_type
        if media_type is None:
            raise unsupported
        disposition = call.request.headers.get("Content-Disposition", "")
        name = disposition.partition("filename=")[2].strip('"')[:255]
        stored = StoredFile(self._database.new_id(), call.user.id, name, media_type, data)
        self._database.files[stored.id] = stored
        return answer_json({"id": str(stored.id)}, 201)

    def _allowed_files(self) -> tuple[str, ...]:
        """Media types in the order in which a refusal names them."""
        has = self._features
        if has.retention:
            return tuple(sorted((*IMAGES, "application/json", "application/pdf", "text/csv", "text/markdown", PLAIN)))
        return tuple(sorted((*IMAGES, PLAIN))) if has.labels else IMAGES

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
