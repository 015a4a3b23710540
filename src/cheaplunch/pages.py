"""Pages that need nothing but themselves, from the templates of the package."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The page of `templates/{template}` with its own `filters`; what it is given is escaped."""
    jinja = Environment(
        loader=PackageLoader("cheaplunch"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= filters
    return jinja.get_template(template).render(**values)
