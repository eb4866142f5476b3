"""What goes into the first line and the headers of a request, by the rules of Go's `net/url`, `mime` and `strconv`."""

import re
from collections.abc import Mapping
from urllib.parse import quote, quote_from_bytes, quote_plus, unquote_to_bytes

from relay.codersdk.errors import InvalidRequest

_BAD_ESCAPE = re.compile(r"%(?![0-9a-fA-F]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PATH_AS_IT_IS = re.compile(r"[A-Za-z0-9\-_.~!$&'()*+,;=:@\[\]%/]*")  # may stay where nothing else has to be escaped
_PATH_SAFE = "-_.~$&+,/:;=@"  # stays where something else is escaped
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105
_SPECIAL = '()<>@,;:\\"/[]?='
_PARAMETER = re.compile(rf'\s*;\s*({_TOKEN})\s*=\s*({_TOKEN}|"(?>\\[{re.escape(_SPECIAL)}]|[^"\r\n])*")')


def as_bytes(text: str) -> bytes:
    """UTF-8; a byte that Python could not decode (a lone surrogate, as in file names) comes back as that byte."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise InvalidRequest("half a surrogate pair cannot be sent") from exc


def query(values: Mapping[str, str]) -> str:
    """`?` and the values in the order of their names, or nothing. Go: `url.Values.Encode`."""
    pairs = [f"{name}={quote_plus(as_bytes(value))}" for name, value in sorted(values.items())]
    return f"?{'&'.join(pairs)}" if pairs else ""


def request_target(path: str) -> str:
    """Path and query as they are sent. Go: `url.URL.Parse` and `RequestURI`.

    What may stand in a URL stays as it is, `..` goes up, and what follows `#` is not sent: a user's name with a slash,
    a question mark or a hash in it makes another path.

    Raises:
        InvalidRequest: There is a control character in it, or a `%` that begins no escape.
    """
    path, _, fragment = path.partition("#")
    if _CONTROL.search(path):
        raise InvalidRequest("a control character cannot be part of a URL")
    path, mark, rest = path.partition("?")
    if _BAD_ESCAPE.search(path) or _BAD_ESCAPE.search(fragment):
        raise InvalidRequest(f"a % in a URL begins an escape such as %25: {path!r}")
    if not _PATH_AS_IT_IS.fullmatch(path):
        path = quote_from_bytes(unquote_to_bytes(as_bytes(path)), safe=_PATH_SAFE)
    # Go sends the query as it is; a space or a letter beyond ASCII would break the request's first line.
    return _without_dots(path) + mark + quote(as_bytes(rest), safe="".join(map(chr, range(0x21, 0x7F))))


def _without_dots(path: str) -> str:
    """Go: `url.resolvePath` for a path that begins with a slash."""
    done = ""
    first = True
    *parents, last = path.split("/")
    for part in (*parents, last):
        if part == ".":
            first = False
        elif part == "..":
            head, slash, _ = done.rpartition("/")
            done, first = head, not slash
        else:
            done += part if first else f"/{part}"
            first = False
    if last in {".", ".."}:
        done += "/"
    return done if done.startswith("/") else f"/{done}"


def content_disposition(filename: str) -> str:
    """The header that names an uploaded file. Go: `mime.FormatMediaType`."""
    data = as_bytes(filename)
    if any((byte < 0x20 or byte > 0x7E) and byte != 0x09 for byte in data):
        plain = {byte for byte in range(0x21, 0x7F) if chr(byte) not in f"*'%{_SPECIAL}"}
        return "attachment; filename*=utf-8''" + "".join(chr(b) if b in plain else f"%{b:02X}" for b in data)
    if re.fullmatch(_TOKEN, filename):
        return f"attachment; filename={filename}"
    return 'attachment; filename="' + re.sub(r'(["\\])', r"\\\1", filename) + '"'


def header_value(value: str) -> bytes:
    """Without space around it.

    Raises:
        InvalidRequest: A control character is in it.
    """
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
        raise InvalidRequest("a control character cannot be part of a header")
    return as_bytes(value.strip(" \t"))


def is_json(content_type: str) -> bool:
    """Whether a `Content-Type` is that of JSON. Go: `codersdk.ExpectJSONMime`."""
    base, semicolon, rest = content_type.partition(";")
    base = base.strip()
    # The case of letters does not count, but only where all of the header can be read.
    return base == "application/json" or (base.lower() == "application/json" and _are_parameters(semicolon + rest))


def _are_parameters(text: str) -> bool:
    seen: dict[str, str] = {}
    position = 0
    while text[position:].strip() not in {"", ";"}:
        match = _PARAMETER.match(text, position)
        if match is None or seen.setdefault(match.group(1).lower(), match.group(2)) != match.group(2):
            return False
        position = match.end()
    return True


_NAMED = {"\a": r"\a", "\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t", "\v": r"\v", "\\": r"\\"}


def quoted(text: str) -> str:
    """In double quotes, with what cannot be printed escaped. Go: `strconv.Quote`."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    code = ord(char)
    if char == '"':
        return '\\"'
    if char in _NAMED:
        return _NAMED[char]
    if char.isprintable():
        return char
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
