"""YAML of settings: the scalars of YAML 1.2's core schema, and nothing that is read as something else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from w2vscale.errors import UserError

FLOAT = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)"

# What is not text: the name of each type, the pattern of its scalars, and what a scalar stands for. A number with
# leading zeros is text here, because it is an octal number in YAML 1.1 and a decimal one in YAML 1.2.
SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    "float": (rf"{FLOAT}|\.(nan|NaN|NAN)", lambda text: float(re.sub(r"\.([in])", r"\1", text.lower()))),
}
# Tags that PyYAML reads for us: text, lists and mappings. It refuses all other tags (None).
NOT_SCALARS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None)


class Loader(yaml.SafeLoader):
    """PyYAML's loader with the scalars of YAML 1.2, keys that are their text, and no key twice in a mapping."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in NOT_SCALARS}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping. Raises UserError if a key is not text, is a merge key, or is in it twice."""
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "expected a mapping", node.start_mark)
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"line {line}: a key must be text, not a list or a mapping")
            if key.value == "<<" and key.style is None:
                raise UserError(f"line {line}: merge keys (<<) are not supported; write the settings out")
            if (first := lines.get(key.value)) is not None:
                where = f"line {line}" if first == line else f"lines {first} and {line}"
                raise UserError(f"{key.value} is given twice, in {where}; keep one")
            lines[key.value] = line
            mapping[key.value] = self.construct_object(value, deep=deep)
        return mapping


class Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which also quotes text that only YAML 1.2 takes for a number, such as 1e-4."""


def _constructor(name: str, pattern: re.Pattern[str], meaning: Callable[[str], Any]) -> Callable[[Loader, Any], Any]:
    def construct(loader: Loader, node: Any) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            if pattern.match(text):
                return meaning(text)
        except ValueError:  # Python reads at most 4,300 digits
            pass
        raise ConstructorError(None, None, f"{text[:40]!r} cannot be read as {name}", node.start_mark)

    return construct


Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1
for _name, (_text, _meaning) in SCALARS.items():
    _tag, _pattern = f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_text})\Z")
    Loader.add_implicit_resolver(_tag, _pattern, None)
    Loader.add_constructor(_tag, _constructor(_name, _pattern, _meaning))
    Dumper.add_implicit_resolver(_tag, _pattern, None)


def load_yaml(text: str) -> Any:
    """Read a YAML document.

    Only the scalars of YAML 1.2's core schema are not text: `no`, `on`, `0123`, `1:30`, `1_000` and dates are text. The
    keys of a mapping are always text, as they are written.

    Raises yaml.YAMLError if the text is not YAML or nested too deeply, and UserError if a mapping has a key twice, a
    key that is not text, or a merge key.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except UserError:
        raise
    except (RecursionError, ValueError, OverflowError) as error:  # the last two: an escape that is no character
        raise yaml.YAMLError(str(error)) from None


def dump_yaml(value: object, **options: Any) -> str:
    """Write plain values as YAML that `load_yaml` and YAML 1.1 read alike. `options` are those of `yaml.dump`."""
    return yaml.dump(value, Dumper=Dumper, **options)
