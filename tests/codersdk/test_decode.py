"""What is taken and what is refused, against Go's `json.Unmarshal`."""

import pytest

from relay.codersdk import ChatMessage, ChatMessagePart
from tests.codersdk.differences import Tally
from tests.codersdk.vectors import decoded, go_decoded, report, rows, same_json, source, value_of


def test_texts_are_read_as_go_reads_them() -> None:
    tally = Tally("decode")
    for row in rows("decode"):
        text = source(row, "input") or ""
        got, wanted = decoded(row["type"], text), go_decoded(row)
        if not same_json(got, wanted):
            tally.differs(row, got, f"{row['type']} {text!r:.200} gave {got} instead of {wanted} ({row.get('error')})")
    tally.check()


def test_what_follows_the_first_value_of_an_answer_is_ignored() -> None:
    streamed = [row for row in rows("decode") if "decoder" in row]
    assert streamed
    report(
        (row, f"{row['type']} {row['input']!r:.200} gave {got}")
        for row in streamed
        if not same_json(got := decoded(row["type"], row["input"], only_first=True), go_decoded(row["decoder"]))
    )


def test_unknown_fields_stay_wherever_they_are() -> None:
    text = (
        '{"new":{"b": 1.0,"a":"\\u003c"},"id":7,"usage":{"x":[]},'
        '"content":[{"type":"text","newer":12345678901234567890}]}'
    )
    message = ChatMessage.model_validate_json(text)
    assert message.model_extra == {"new": '{"b": 1.0,"a":"\\u003c"}'}
    again = value_of(message.model_dump_json())
    assert again["new"] == {"b": 1, "a": "<"}
    assert again["content"][0]["newer"] == 12345678901234567890
    assert again["usage"]["x"] == []
    assert ChatMessage.model_validate_json(message.model_dump_json()) == message


def test_raw_values_keep_their_text() -> None:
    text = '{ "z" : 1.50 , "a":[ 1e2 ],"a":"\\u00e9\\ud800" }'
    part = ChatMessagePart.model_validate_json(f'{{"type":"tool-call","args":{text} }}')
    assert part.args == text
    assert f'"args":{text}' in part.model_dump_json()


def test_a_float_or_a_bool_is_no_integer_in_python_either() -> None:
    for wrong in (1.0, True, "1", 2**63):
        with pytest.raises(ValueError, match="Input"):
            ChatMessage(id=wrong)


def test_each_byte_that_is_no_utf_8_becomes_a_character() -> None:
    part = ChatMessagePart.model_validate_json(b'{"text":"\xe2\x82A\xff\xed\xa0\x80"}')
    assert part.text == "\ufffd\ufffdA\ufffd\ufffd\ufffd\ufffd"
