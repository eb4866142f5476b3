"""The parts of a prompt as a request has them, checked as the server checks them."""

from relay.simulator.calls import Body, Refused
from relay.simulator.state import Database, Part, User
from relay.simulator.wire import NIL_UUID, go_json


def read_content(body: Body, database: Database, user: User) -> tuple[tuple[Part, ...], list[str]]:
    """The message's parts, and the texts of which a title is made.

    Raises:
        Refused: 400.
    """
    inputs = body.objects("content")
    if not inputs:
        raise Refused(400, "Content is required.", "Content cannot be empty.")
    parts: list[Part] = []
    words: list[str] = []
    for i, item in enumerate(inputs):
        kind = item.text("type")
        match kind.strip().lower():
            case "text":
                text = item.text("text").strip()
                if not text:
                    raise Refused(400, "Invalid input part.", f"content[{i}].text cannot be empty.")
                parts.append(Part("text", text=text))
                words.append(text)
            case "file":
                parts.append(_file_part(item, i, database, user))
            case "file-reference":
                part = _reference_part(item, i)
                parts.append(part)
                words.append(f"[file-reference] {part.file_name}:{part.start_line}-{part.end_line} {part.content}")
            case _:
                detail = f"content[{i}].type {go_json(kind)} is not supported."
                raise Refused(400, "Invalid input part.", detail)
    return tuple(parts), words


def _file_part(item: Body, i: int, database: Database, user: User) -> Part:
    file_id = item.uuid("file_id")
    if file_id is None or file_id == NIL_UUID:
        raise Refused(400, "Invalid input part.", f"content[{i}].file_id is required for file parts.")
    stored = database.files.get(file_id)
    if stored is None or not (stored.owner_id == user.id or user.is_owner):
        detail = f"content[{i}].file_id references a file that does not exist."
        raise Refused(400, "Invalid input part.", detail)
    return Part("file", media_type=stored.media_type, file_id=stored.id)


def _reference_part(item: Body, i: int) -> Part:
    name = item.text("file_name").strip()
    if not name:
        raise Refused(400, "Invalid input part.", f"content[{i}].file_name cannot be empty for file-reference.")
    return Part(
        "file-reference",
        file_name=name,
        start_line=item.integer("start_line") or 0,
        end_line=item.integer("end_line") or 0,
        content=item.text("content"),
    )
