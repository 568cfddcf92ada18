"""cni.spec.gojson against the rules of Go's encoding/json."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.spec import gojson

# What Go's json.Marshal prints for a float64 that was read from this text.
NUMBERS = [
    ("0", "0"),
    ("-0", "-0"),
    ("1", "1"),
    ("1.0", "1"),
    ("1.50", "1.5"),
    ("-2.25", "-2.25"),
    ("100", "100"),
    ("1450", "1450"),
    ("12345678901234567890", "12345678901234567000"),
    ("9007199254740993", "9007199254740992"),
    ("1e20", "100000000000000000000"),
    ("1e21", "1e+21"),
    ("123e20", "1.23e+22"),
    ("1e100", "1e+100"),
    ("0.1", "0.1"),
    ("0.000001", "0.000001"),
    ("0.00000123", "0.00000123"),
    ("0.0000001", "1e-7"),
    ("1.5e-9", "1.5e-9"),
    ("1e-10", "1e-10"),
    ("5e-324", "5e-324"),
    ("1.7976931348623157e308", "1.7976931348623157e+308"),
]


@pytest.mark.parametrize(("text", "printed"), NUMBERS)
def test_numbers_print_as_go_prints_a_float64(text: str, printed: str) -> None:
    assert gojson.dumps(gojson.loads(text)) == printed


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_and_has_the_form_of_its_size(value: float) -> None:
    text = gojson.dumps(value)
    assert math.copysign(1, float(text)) == math.copysign(1, value)
    assert float(text) == value
    assert ("e" in text) == (value != 0 and not 1e-6 <= abs(value) < 1e21)
    assert ".0" not in text[-2:] and "e+0" not in text and "e-0" not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "}",
        "[1,]",
        '{"a":1,}',
        "{'a':1}",
        "NaN",
        "[NaN]",
        "[Infinity]",
        "-Infinity",
        "01",
        "+1",
        "1.",
        ".5",
        "1e",
        "0x10",
        "nul",
        "True",
        '"a\nb"',
        '"\\x"',
        '"a',
        "{} {}",
        '{"cniVersion":"1.0.0"}{"code":8}',
        "1 2",
        "1e400",
        "\ufeff{}",
        "[" * 5000 + "]" * 5000,
        "\u00a0{}",
    ],
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(gojson.GoJsonError) as caught:
        gojson.loads(text)
    assert str(caught.value) and "\n" not in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**53), 2**53)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON, st.sampled_from(["", "    "]))
def test_what_is_written_is_read_again(value: object, indent: str) -> None:
    text = gojson.dumps(value, indent=indent)
    assert gojson.loads(text) == value
    assert json.loads(text, parse_int=float) == value
    assert gojson.loads(f" \t\r\n{text}\n ") == value


@given(JSON)
def test_reading_agrees_with_the_json_package(value: object) -> None:
    text = json.dumps(value)
    assert gojson.loads(text) == json.loads(text, parse_int=float)


@given(JSON)
def test_output_is_safe_inside_html_and_javascript(value: object) -> None:
    text = gojson.dumps(value)
    assert not set(text) & {"<", ">", "&", "\u2028", "\u2029"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("<&>", '"\\u003c\\u0026\\u003e"'),
        ("\u2028\u2029", '"\\u2028\\u2029"'),
        ("é€😀", '"é€😀"'),
        ('"\\/', '"\\"\\\\/"'),
        ("\n\r\t\b\f", '"\\n\\r\\t\\b\\f"'),
        ("\x00\x1f\x7f", '"\\u0000\\u001f\x7f"'),
        ("a\ud800b", '"a\ufffdb"'),
        ({"b": 1, "a": [], "C": {}}, '{"C":{},"a":[],"b":1}'),
        ([None, True, False, 0, (1, 2)], "[null,true,false,0,[1,2]]"),
    ],
)
def test_compact_form(value: object, text: str) -> None:
    assert gojson.dumps(value) == text


def test_indented_form_is_that_of_marshal_indent() -> None:
    value = {"b": [], "a": {"x": [1, {}]}}
    assert gojson.dumps(value, indent="    ", sort=False) == (
        '{\n    "b": [],\n    "a": {\n        "x": [\n            1,\n            {}\n        ]\n    }\n}'
    )


def test_nothing_deeper_than_the_stack_is_written() -> None:
    value: list[object] = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(gojson.GoJsonError, match="nested too deeply"):
        gojson.dumps(value)


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    assert gojson.loads(b'"a\xffb"') == "a\ufffdb"


def test_null_counts_as_an_empty_object_and_nothing_else_does() -> None:
    assert gojson.load_object(b" null ") == {}
    for text in (b"[]", b'"x"', b"1", b"true"):
        with pytest.raises(gojson.GoJsonError, match="expected a JSON object, found"):
            gojson.load_object(text)


class TestMembers:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ('{"name":"a"}', "a"),
            ('{"NAME":"a"}', "a"),
            ('{"name":"a","Name":"b"}', "b"),
            ('{"Name":"b","name":"a"}', "a"),
            ('{"name":"a","Name":"b","name":"c"}', "c"),
            ('{"name":"a","Name":null}', "a"),
            ('{"name":null}', None),
            ('{"other":1}', None),
        ],
    )
    def test_any_case_and_the_last_one_wins(self, text: str, value: object) -> None:
        assert gojson.member(gojson.load_object(text), "name") == value

    def test_the_long_s_and_the_kelvin_sign_fold_to_letters(self) -> None:
        record = gojson.load_object('{"\u017fubnetFile":"a","\u212aey":"b"}')
        assert gojson.member(record, "subnetFile") == "a"
        assert gojson.member(record, "key") == "b"

    def test_has_tells_written_from_absent(self) -> None:
        record = gojson.load_object('{"A":null}')
        assert gojson.has(record, "a")
        assert not gojson.has(record, "b")

    @pytest.mark.parametrize(
        ("value", "wanted", "found"),
        [
            ("[]", dict, "an object, found array"),
            ('"x"', list, "an array, found string"),
            ("1.5", str, "a string, found number 1.5"),
            ("{}", bool, "true or false, found object"),
            ("true", str, "a string, found bool"),
        ],
    )
    def test_wrong_types_are_named(self, value: str, wanted: type[object], found: str) -> None:
        with pytest.raises(gojson.GoJsonError, match=f"key must be {found}"):
            gojson.typed(gojson.load_object(f'{{"key":{value}}}'), "key", wanted, wanted())

    def test_absent_and_null_give_the_default(self) -> None:
        assert gojson.typed(gojson.load_object('{"a":null}'), "a", str, "x") == "x"
        assert gojson.integer({}, "a", 7, 0, 9) == 7

    @pytest.mark.parametrize("text", ["1450.0", '"1450"', "1e3", "true", "-1", "70000", "[]", '"\u00b2"'])
    def test_integers_must_be_written_as_integers_in_range(self, text: str) -> None:
        with pytest.raises(gojson.GoJsonError, match="mtu must be an integer from 0 to 65535, found"):
            gojson.integer(gojson.load_object(f'{{"mtu":{text}}}'), "mtu", None, 0, 65535)

    @given(st.integers(-(2**63), 2**63 - 1))
    def test_integers_are_exact(self, value: int) -> None:
        record = gojson.load_object(f'{{"n":{value}}}')
        assert gojson.integer(record, "n", None, -(2**63), 2**63 - 1) == value
