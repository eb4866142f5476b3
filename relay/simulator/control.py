"""The control endpoint `/_simulator`: faults on demand and what the simulator knows, as JSON in and out."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from aiohttp import web

from relay.simulator.calls import answer_json
from relay.simulator.dialect import DIALECTS
from relay.simulator.faults import KINDS, BadFault, Fault
from relay.simulator.wire import JsonObject, parse_uuid

if TYPE_CHECKING:
    from relay.simulator.server import Simulator

ACTIONS = {
    "cut": "drop sockets abruptly {chat?, watches?}",
    "close": "close sockets {code, reason?, chat?, watches?}",
    "zombie": "`dropped messages`, then nothing {chat?}",
    "silence": "nothing for a while or for ever {chat?, seconds?, watches?}",
    "inject": "a raw text as a frame {raw, chat?}",
    "replay_parts": "the part buffer again {chat?}",
    "unanswered": "the next runs end without an answer {times?}",
    "idle_chats": "many chats that have had their answer {count, owner?}",
    "purge": "delete a chat for good, as retention does; nobody is told {chat}",
    "roll": "half of the requests find another age of server {dialect; absent: no more}",
    "restart": "stop and start again {keep_data?, polite?, down_seconds?, recovery_ms?, dialect?}",
}

_SKEW_SETTINGS = ("overtake", "overtake_ms", "lag", "lag_ms", "burst_loss", "burst_run", "snapshot_gap_ms")


class BadRequest(ValueError):
    """The control call cannot be understood; the text says why."""


class ControlApi:
    """Needs no token; it listens on the simulator's own port, so keep that on loopback."""

    def __init__(self, simulator: "Simulator") -> None:
        self._simulator = simulator

    async def answer(self, request: web.Request) -> web.Response:
        """Route one control call."""
        path = request.path.removeprefix("/_simulator").strip("/").split("/")
        try:
            body = await _object(request)
            match request.method, path:
                case "GET", ["" | "state"]:
                    return answer_json(self._state())
                case "GET", ["faults"]:
                    return answer_json(self._faults())
                case "POST", ["faults"]:
                    return answer_json(self._add(body), 201)
                case "DELETE", ["faults"]:
                    self._simulator.faults.clear()
                    return answer_json(self._faults())
                case "DELETE", ["faults", fault_id] if fault_id.isdecimal():
                    removed = self._simulator.faults.remove(int(fault_id))
                    return answer_json({"removed": removed}, 200 if removed else 404)
                case "PATCH", ["settings"]:
                    return answer_json(self._set(body))
                case "POST", [action] if action in ACTIONS:
                    return answer_json(await self._act(action, body))
                case _:
                    there_are = (
                        f"GET state, faults · POST faults, {', '.join(ACTIONS)} · DELETE faults[/ID] · PATCH settings"
                    )
                    return answer_json({"error": f"no such control call; there are: {there_are}"}, 404)
        except (BadFault, BadRequest) as exc:
            return answer_json({"error": str(exc)}, 400)

    def _state(self) -> JsonObject:
        simulator = self._simulator
        return {
            "url": simulator.url,
            "dialect": simulator.config.dialect,
            "idle": simulator.is_idle(),
            "users": {name: {"id": str(u.id), "token": u.token} for name, u in simulator.users.items()},
            "open_streams": len(simulator.streams()),
            "open_watches": len(simulator.watches()),
            "chats": [
                {"id": str(chat.id), "title": chat.title, "status": chat.status, "messages": len(chat.history())}
                for chat in simulator.database.chats.values()
            ],
        }

    def _faults(self) -> JsonObject:
        faults = self._simulator.faults
        return {
            "fired": self._simulator.counters(),
            "rules": [fault.as_json() for fault in faults.rules()],
            "kinds": {kind: text for kind, (text, _) in KINDS.items()},
            "actions": ACTIONS,
        }

    def _add(self, body: dict[str, Any]) -> JsonObject:
        kind = body.pop("kind", None)
        if not isinstance(kind, str):
            raise BadRequest(f"a fault needs 'kind', one of: {', '.join(KINDS)}")
        return self._simulator.faults.add(kind, **body).as_json()

    def _set(self, body: dict[str, Any]) -> JsonObject:
        simulator = self._simulator
        unknown = body.keys() - {"tied_rows", *_SKEW_SETTINGS}
        if unknown or not body:
            raise BadRequest(f"settings: there are tied_rows, {', '.join(_SKEW_SETTINGS)}")
        tied_rows = body.get("tied_rows", simulator.database.tied_rows)
        if tied_rows not in ("by_id", "turned", "shuffled"):
            raise BadRequest("settings: tied_rows must be by_id, turned or shuffled")
        skew: dict[str, Any] = {name: _number(body, name) or 0.0 for name in _SKEW_SETTINGS if name in body}
        simulator.database.tied_rows = tied_rows
        simulator.skew = replace(simulator.skew, **skew)
        return {"tied_rows": tied_rows, **{name: getattr(simulator.skew, name) for name in _SKEW_SETTINGS}}

    async def _act(self, action: str, body: dict[str, Any]) -> JsonObject:
        simulator, chat = self._simulator, _chat(body)
        watches = bool(body.get("watches", action == "close"))
        match action:
            case "cut":
                return {"struck": simulator.cut(chat, watches=watches)}
            case "close":
                code = body.get("code")
                if not isinstance(code, int) or not 1000 <= code <= 4999:
                    raise BadRequest("close needs 'code', from 1000 to 4999")
                return {"struck": await simulator.close(code, str(body.get("reason", "")), chat, watches=watches)}
            case "zombie":
                return {"struck": simulator.zombie(chat)}
            case "silence":
                return {"struck": simulator.silence(chat, _number(body, "seconds"), watches=watches)}
            case "inject":
                if not isinstance(body.get("raw"), str):
                    raise BadRequest("inject needs 'raw', a string")
                return {"struck": await simulator.inject(body["raw"], chat)}
            case "replay_parts":
                return {"struck": simulator.replay_parts(chat)}
            case "unanswered":
                simulator.leave_unanswered(int(_number(body, "times") or 1))
                return {"struck": 0}
            case "idle_chats" | "purge":
                return self._change_rows(action, body)
            case "roll":
                try:
                    simulator.roll(_dialect(body))
                except ValueError as exc:
                    raise BadRequest(str(exc)) from exc
                return {"struck": 0}
            case _:
                simulator.restart_soon(
                    keep_data=bool(body.get("keep_data", True)),
                    polite=bool(body.get("polite", False)),
                    down_seconds=_number(body, "down_seconds") or 0.0,
                    recovery_ms=_number(body, "recovery_ms"),
                    dialect=_dialect(body),
                )
                return {"struck": 1}

    def _change_rows(self, action: str, body: dict[str, Any]) -> JsonObject:
        simulator, chat = self._simulator, _chat(body)
        if action == "idle_chats":
            owner = simulator.users.get(str(body.get("owner", "ann")))
            if owner is None:
                raise BadRequest(f"owner must be one of: {', '.join(simulator.users)}")
            made = simulator.database.create_idle_chats(int(_number(body, "count") or 1), owner.id)
            return {"struck": 0, "made": len(made)}
        row = simulator.database.chats.get(chat) if chat else None
        if row is None:
            raise BadRequest("purge needs 'chat', the id of one")
        simulator.database.delete_chat(row)
        return {"struck": 0}

    def fault_answer(self, fault: Fault) -> web.Response:
        """The answer that an `answer` fault gives instead of the server's."""
        if fault.html:
            return web.Response(text="<!doctype html><title>Coder</title>", content_type="text/html")
        response = answer_json({"message": _MESSAGES.get(fault.status, "Simulated fault.")}, fault.status)
        if fault.retry_after is not None:
            response.headers["Retry-After"] = str(fault.retry_after)
        return response


_MESSAGES = {
    401: "You are signed out or your session has expired. Please sign in again to continue.",
    403: "Forbidden.",
    404: "Resource not found or you do not have access to this resource",
    429: "You've been rate limited for sending more than 512 requests in 1m0s.",
}


async def _object(request: web.Request) -> dict[str, Any]:
    if not request.can_read_body:
        return {}
    try:
        body = await request.json()
    except ValueError as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _chat(body: dict[str, Any]) -> UUID | None:
    if body.get("chat") is None:
        return None
    try:
        return parse_uuid(str(body["chat"]))
    except ValueError as exc:
        raise BadRequest(f"chat: {exc}") from exc


def _dialect(body: dict[str, Any]) -> str | None:
    dialect: str | None = body.get("dialect")
    if dialect is not None and dialect not in DIALECTS:
        raise BadRequest(f"dialect must be one of: {', '.join(DIALECTS)}")
    return dialect


def _number(body: dict[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise BadRequest(f"{name} must be a number from 0")
    return float(value)
