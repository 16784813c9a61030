"""YAML of settings: what is text, what is not, keys, and files that YAML 1.1 and 1.2 read alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from w2vscale.config import Config, dump_config, in_yaml, load_config
from w2vscale.config.running import TrainerConfig
from w2vscale.config.tree import DataConfig, MixConfig
from w2vscale.config.yaml_1_2 import dump_yaml, load_yaml
from w2vscale.errors import UserError

# Text that YAML 1.1, YAML 1.2 or Python take for something else, and other odd text.
ODD_WORDS = (
    *("no", "Yes", "ON", "off", "y", "N", "true", "False", "null", "Null", "~", "", "=", "<<", "-", "?", ":", "nan"),
    *("0123", "-017", "0o17", "0x1F", "0b11", "08", "1_000", "1:30", "1:30.5", "190:20:30", "12e03", "1e-4", "1E5"),
    *("5", "-0", "+3", "1.", ".5", "-.5e3", "1.5", "00.5", ".inf", "-.INF", ".NaN", "2001-12-14", "1e", ".", "+"),
    *("a: b", "a #b", "#a", "[a", "{a", "&a", "*a", "!a", "|", ">", "%a", "@a", "`a", "'", '"', "---", "...", "- a"),
    *(" a", "a ", "a\n", "\t", "\ufeffa", "\x85", "\u2028", "a\\b", "né", "🎤", "x" * 200, "word " * 40, "? a"),
)
texts = st.sampled_from(ODD_WORDS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
texts |= st.from_regex(r"[-+]?[0-9._:oxbeE]{1,8}", fullmatch=True)
words = texts.filter(lambda text: text.splitlines() in ([], [text]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, None) for word in ("null", "Null", "NULL", "~", "")),
        *((("0", 0)), ("12", 12), ("-40", -40), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("0xfe", 254)),
        *(("1.5", 1.5), ("-2.", -2.0), (".25", 0.25), ("1e-4", 1e-4), ("3E5", 3e5), ("+1.5e+2", 150.0), ("0.", 0.0)),
        *((".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf)),
        *((word, word) for word in ("yes", "No", "on", "OFF", "y", "n", "tRUE", "nULL", "nan", "inf", "NaN")),
        *((word, word) for word in ("0123", "-08", "00", "0b11", "0X1F", "+0x1F", "0O7", "1_000", "1_0.5")),
        *((word, word) for word in ("1:30", "190:20:30", "1:30.5", "2001-12-14", "2001-12-14 21:59:43", "=", "e5")),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = load_yaml(text)
    assert found == value and type(found) is type(value)
    assert load_yaml(f"[{text}]") == [value] * bool(text)
    assert load_yaml(f"a: '{text}'") == {"a": text}


def test_a_float_that_is_no_number() -> None:
    assert all(math.isnan(load_yaml(word)) for word in (".nan", ".NaN", ".NAN"))


@pytest.mark.parametrize(
    "text",
    [
        *("!!int 0123", "!!int 1:30", "!!int [1]", "!!float 1:30", "!!bool yes", "!!null no", "!!timestamp 2001-12-14"),
        *("!!set {a}", "!!binary aGk=", "!!map [a]", "!!seq {a: b}", "!!str [a]", "!own a", "!!python/name:os.system"),
        *('"\\UFFFFFFFF"', '"\\U00110000"', "9" * 5000, "[" * 9999, "{a: " * 2000, "a: b: c", "a\0b"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_tags_of_the_core_schema() -> None:
    found = load_yaml("[!!int 12, !!float 1.5, !!bool true, !!null ~, !!str 5, !!seq [], !!map {}]")
    assert found == [12, 1.5, True, None, "5", [], {}]


class TestKeys:
    def test_they_are_their_text(self) -> None:
        text = "{no: 1, 0123: 2, 1.50: 3, true: 4, ~: 5, 1:30: 6, '7': 7, 2001-12-14: 8, '<<': 9, =: 10, 0x10: 11}"
        keys = ["no", "0123", "1.50", "true", "~", "1:30", "7", "2001-12-14", "<<", "=", "0x10"]
        assert load_yaml(text) == {key: number for number, key in enumerate(keys, start=1)}
        assert load_yaml("{1: a, '1.0': b, 0o1: c}") == {"1": "a", "1.0": "b", "0o1": "c"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nb: 2\na: 3\n", "a is given twice, in lines 1 and 3; keep one"),
            ("a:\n  b: 1\n  c: {}\n\n  'b': 2\n", "b is given twice, in lines 2 and 5; keep one"),
            ("- x\n- [{on: 1,\n   on: 2}]\n", "on is given twice, in lines 2 and 3; keep one"),
            ("{a: 1, a: 1}", "a is given twice, in line 1; keep one"),
            ("&k a: 1\n*k : 2\n", "a is given twice, in line 1; keep one"),
            (
                "x: &m {a: 1}\ny:\n  <<: *m\n  b: 2\n",
                "line 3: merge keys (<<) are not supported; write the",
            ),
            ("a: 1\n? [b, c]\n: 2\n", "line 2: a key must be text, not a list or a mapping"),
            ("{a: 1, {b: 2}: 3}", "line 1: a key must be text, not a list or a mapping"),
        ],
    )
    def test_what_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(UserError) as caught:
            load_yaml(text)
        assert str(caught.value).startswith(message)

    def test_a_file_names_itself_and_both_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("preset: base\ndata:\n  workers: 2\n# …\nbatch: {concat: 1}\ndata:\n  prefetch: 8\n")
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(caught.value) == f"{path}: data is given twice, in lines 2 and 6; keep one"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("data:\n\tworkers: 2\n", "not valid YAML: line 2, column 1: a tab; indent with spaces"),
            ("data: {workers: 2\n", "not valid YAML: line 2, column 1: while parsing a flow mapping expected"),
            ("data.train: x\n", "data.train: in a file, a section has its settings below it: write data: and below it"),
        ],
    )
    def test_a_file_of_another_form_says_where(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: {message}")

    @given(values=st.dictionaries(texts, st.integers(), max_size=5))
    def test_any_text_is_kept(self, values: dict[str, int]) -> None:
        for style in (None, True, False):
            dumped = dump_yaml(values, default_flow_style=style)
            assert load_yaml(dumped) == yaml.safe_load(dumped) == values
            # PyYAML writes keys plainly that are text in YAML 1.1.
            assert load_yaml(yaml.safe_dump(values, default_flow_style=style)) == values

    @given(key=st.from_regex(r"[0-9A-Za-z_.+~=-]{1,8}", fullmatch=True))
    def test_any_plain_key_is_its_text(self, key: str) -> None:
        if not key.startswith(("-", "=")) and key != "..." and not key.startswith("---"):
            assert load_yaml(f"{key}: 1") == load_yaml(f"{{{key}: 1}}") == {key: 1}


def test_an_alias_stands_for_the_same_value() -> None:
    assert load_yaml("a: &x [1, no]\nb: *x\nc: {d: *x}\n") == {"a": [1, "no"], "b": [1, "no"], "c": {"d": [1, "no"]}}


class TestWriting:
    @given(value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
        lambda values: st.lists(values, max_size=3) | st.dictionaries(texts, values, max_size=3),
        max_leaves=8,
    ))  # fmt: skip
    def test_yaml_1_1_and_1_2_read_the_same(self, value: Any) -> None:
        dumped = dump_yaml(value, sort_keys=False, default_flow_style=None, width=100)
        assert load_yaml(dumped) == yaml.safe_load(dumped) == value
        if type(value) in (str, int, float):
            assert type(load_yaml(dumped)) is type(value)

    @given(paths=st.lists(texts.filter(lambda text: "\0" not in text), max_size=3), word=texts)
    def test_settings_come_back_as_they_were(self, paths: list[str], word: str, tmp_path_factory: Any) -> None:
        config = Config(
            data=DataConfig(train=[Path(path) for path in paths]),
            mix=MixConfig(by="corpus", weights=dict.fromkeys(paths, 2.0)),
            trainer=TrainerConfig(best_metric=word, init_from=Path(paths[0]) if paths else None),
        )
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
        assert Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))) == config

    @given(value=words | st.integers() | st.floats(allow_nan=False) | st.lists(words, max_size=3))
    def test_one_line(self, value: Any) -> None:
        assert load_yaml(in_yaml(value)) == value
