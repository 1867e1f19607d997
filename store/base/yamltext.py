"""YAML (and so JSON) from strangers: plain values only, and no references.

References could make a small file a huge value; tags other than YAML's own are refused by the safe loader. Nothing
in a file is ever executed.
"""

import yaml

# What PyYAML raises for scalars that do not fit their tag ("!!int ''", "2001-99-99"), besides its own errors.
_ERRORS = (yaml.YAMLError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)


class _TreeLoader(yaml.SafeLoader):
    """YAML without references."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references such as *name are not allowed here")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> object:
    """Return the plain value that a YAML or JSON text spells.

    Raises:
        ValueError: It is neither, or refers to its own parts.

    Example:
        >>> parse_yaml("a: [1, 2]")
        {'a': [1, 2]}
    """
    try:
        value: object = yaml.load(text, _TreeLoader)  # noqa: S506  # a SafeLoader that takes less
    except _ERRORS as error:
        raise ValueError(str(error)) from error
    return value
