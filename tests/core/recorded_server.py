"""What the recorded server would have answered, as the recording goes on."""

from tests.core.recording import Answer, Json, RecordedChat

Happened = list[tuple[float, Answer | list[Json]]]


def with_untold_messages(happened: Happened) -> Happened:
    """Some messages never come on a stream: they were there as soon as the stream fell silent before REST told them."""
    told = {
        event["message"]["id"]
        for _, what in happened
        if isinstance(what, list)
        for event in what
        if event["type"] == "message"
    }
    filled: Happened = []
    last_frame = 0
    for moment, what in happened:
        if isinstance(what, list):
            last_frame = len(filled) + 1
        else:
            untold = [raw for raw in reversed(what.all_messages or []) if raw["id"] not in told]
            told.update(raw["id"] for raw in untold)
            since = filled[last_frame - 1][0] if last_frame else moment
            stored = [Answer("POST", "/messages", "", {"message": raw}) for raw in untold]
            filled[last_frame:last_frame] = [(since, each) for each in stored]
        filled.append((moment, what))
    return filled


class RecordedServer:
    """The chat's state from all that the recording shows of it until now, on any stream and in any REST answer."""

    def __init__(self, chat: RecordedChat) -> None:
        self._chat_id = chat.chat_id
        self._happened = with_untold_messages(chat.happened)
        self._next = 0
        self._edits: dict[int, int] = {}  # id of the new message -> id of the edited one
        for _, answer in chat.happened:
            if isinstance(answer, Answer) and answer.method == "PATCH" and answer.path.startswith("/messages/"):
                new: Json = answer.body.get("message") or answer.body
                self._edits[new["id"]] = int(answer.path.rpartition("/")[2])
        self.messages: dict[int, Json] = {}
        self.queue: list[Json] = []
        self.chat: Json = {"id": chat.chat_id, "status": "pending", "last_error": None}
        self.has_episodes = any(
            event["type"] == "preview_reset" for _, what in chat.happened if isinstance(what, list) for event in what
        )
        self._gone: set[int] = set()
        self._parts: list[Json] = []  # of the step in progress
        self._told: dict[str, Json] = {}  # what is repeated to whoever joins: the last error, action and retry

    @property
    def states_history(self) -> bool:
        """Whether who joins now can learn of an edit: from 2.35 on only where there was one."""
        return bool(self._gone) or not self.has_episodes

    def until(self, moment: float) -> None:
        """Live on to `moment`, in seconds since the recording began."""
        while self._next < len(self._happened) and self._happened[self._next][0] <= moment:
            what = self._happened[self._next][1]
            if isinstance(what, Answer):
                self._answered(what)
            else:
                for event in what:
                    self._streamed(event)
            self._next += 1

    def snapshot(self, after_id: int) -> list[Json]:
        """The events with which a stream begins now."""
        if self.has_episodes:
            return self._synchronised(after_id)
        parts = self._parts if self.chat["status"] == "running" else []
        messages = [self.messages[key] for key in sorted(self.messages) if key > after_id]
        events = [self._event("status", status={"status": self.chat["status"]}), *parts]
        events += [self._event("message", message=message) for message in messages]
        return events + ([self._event("queue_update", queued_messages=self.queue)] if self.queue else [])

    def _synchronised(self, after_id: int) -> list[Json]:
        """The same from 2.35 on: one state in a fixed order; all of it, whatever `after_id`, once a chat was edited."""
        edited = bool(self._gone)
        messages = [self.messages[key] for key in sorted(self.messages) if edited or key > after_id]
        repeated = {"error": ["error"], "requires_action": ["action_required"], "running": ["retry"]}
        return [
            *([self._event("history_reset")] if edited else []),
            *(self._event("message", message=message) for message in messages),
            *([self._event("queue_update", queued_messages=self.queue)] if self.queue else []),
            self._event("status", status={"status": self.chat["status"]}),
            *(self._told[kind] for kind in repeated.get(self.chat["status"], []) if kind in self._told),
            self._event("preview_reset"),
            *self._parts,
        ]

    def page(self, down_to: int) -> tuple[list[Json], bool]:
        """The newest messages, newest first, down to one at or below `down_to`; and whether these are all."""
        newest_first = [self.messages[key] for key in sorted(self.messages, reverse=True)]
        count = sum(message["id"] > down_to for message in newest_first) + 1
        return newest_first[:count], count >= len(newest_first)

    def _event(self, kind: str, **fields: object) -> Json:
        return {"type": kind, "chat_id": self._chat_id, **fields}

    def _add(self, message: Json) -> None:
        key = message["id"]
        if key in self._gone or key in self.messages:
            return
        if key in self._edits:
            edited = {known for known in self.messages if known >= self._edits[key]}
            self._gone |= edited
            self.messages = {known: kept for known, kept in self.messages.items() if known not in edited}
            self.queue = []
        self.messages[key] = message
        if message["role"] == "user" and self.chat["status"] != "running":
            self.chat["status"] = "pending"  # in one transaction with the message

    def _forget_parts(self, message: Json) -> None:
        """A stored step leaves the buffer; what overtook its message belongs to the next one and stays."""
        if message["role"] == "user" or self.has_episodes:
            self._parts = []
        elif message["role"] == "assistant":
            kinds = [event["message_part"]["part"]["type"] for event in self._parts]
            self._parts = self._parts[len(kinds) - kinds[::-1].index("tool-result") :] if "tool-result" in kinds else []

    def _error_ahead(self) -> Json | str | None:
        """A joining stream is not told the error; REST had it from the start, but may be asked only later."""
        for _, what in self._happened[self._next + 1 :]:
            if isinstance(what, Answer) and what.body.get("status") == "error":
                return what.body["last_error"]  # type: ignore[no-any-return]  # a text up to 2.33, then an object
            if not isinstance(what, Answer) and any(e["type"] == "message" for e in what):
                break
        return None

    def _streamed(self, event: Json) -> None:
        if event.get("chat_id") != self._chat_id:
            return
        match event["type"]:
            case "message":
                self._add(event["message"])
                self._forget_parts(event["message"])
            case "message_part":
                self._part(event)
            case "retry":
                self._told["retry"] = event
                if not self.has_episodes:
                    self._parts = []
            case "action_required":
                self._told["action_required"] = event
            case "status":
                status = event["status"]["status"]
                if status != "running":
                    self._parts = []
                    self._told.pop("retry", None)
                self.chat["status"] = status
                self.chat["last_error"] = (
                    (self.chat["last_error"] or self._error_ahead()) if status == "error" else None
                )
            case "error":
                self.chat["last_error"] = event["error"]["message"]
                self._told["error"] = event
            case "queue_update":
                self.queue = event.get("queued_messages") or []

    def _part(self, event: Json) -> None:
        body = event["message_part"]
        last = self._parts[-1]["message_part"] if self._parts else {}
        episode, before = (
            (each.get("history_version"), each.get("generation_attempt")) for each in (body, last or body)
        )
        if episode != before:
            self._parts = []
            self._told.pop("retry", None)
        if "seq" not in body or body["seq"] > last.get("seq", 0) or episode != before:
            self._parts = [*self._parts, event]  # another stream may have shown it

    def _answered(self, answer: Answer) -> None:
        messages = answer.all_messages
        if messages is not None:
            self._gone |= self.messages.keys() - {message["id"] for message in messages}
            self.messages = {message["id"]: message for message in messages}
            self.queue = answer.body.get("queued_messages") or []
        elif answer.method == "GET" and not answer.path:
            self.chat = dict(answer.body)
            self.chat.setdefault("last_error", None)
        elif answer.method == "POST" and answer.path == "/messages" and answer.body.get("message"):
            self._add(answer.body["message"])
        elif answer.method == "POST" and answer.path.endswith("/promote"):
            message = answer.body.get("message") or answer.body
            if isinstance(message, dict):  # later servers only say that they have accepted it
                self._add(message)
