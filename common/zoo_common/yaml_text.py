"""YAML that a user hands in, to plain values: no code, no key twice, no text that never ends.

OmegaConf and yaml's safe loader build plain values only. What they would still do with a hostile
or broken text is stopped here: a few lines of aliases that stand for a billion values, a list that
contains itself, dates that no calendar has, brackets deeper than Python's stack.
"""

import re
from typing import Any

import yaml

from zoo_common.errors import one_line

_MOST_VALUES = 200_000
"""A recipe has a few hundred; aliases multiply what a short text stands for."""


def parse(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: it is no YAML that can be used; the message says where and why, in a line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        # Scalars with a tag that they do not fit raise what Python's own types raise.
        raise ValueError(one_line(error)) from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and reads 1e-4 and 2:4 as people mean them."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _count_values(node, {}, set())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for part, _ in node.value:
            if part.tag == "tag:yaml.org,2002:merge":
                continue  # "<<", which adds the keys of others
            key = self.construct_object(part, deep=True)
            if isinstance(key, (list, dict, set)):
                break  # no key at all, which the method below tells
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {str(key)[:60]!r} stands twice", part.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """YAML 1.1 takes 2:4, as launch.nnodes may be, for 2 minutes and 4 seconds: 124."""
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*)$"),
    list("-+0123456789"),
)


def _count_values(node: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for, each alias counted as what it repeats.

    Args:
        node: of yaml's tree, in which an alias is the very node that it repeats.
        known: counts by node.
        above: the nodes that this one is in.

    Raises:
        ValueError: too many, or a node that is in itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in above:
        raise ValueError("a list or mapping contains itself")
    if id(node) not in known:
        above.add(id(node))
        total = 1
        for item in node.value:
            parts = item if isinstance(item, tuple) else (item,)
            total += sum(_count_values(part, known, above) for part in parts)
        above.remove(id(node))
        if total > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
        known[id(node)] = total
    return known[id(node)]
