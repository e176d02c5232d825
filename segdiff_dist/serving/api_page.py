"""The interface as one page without scripts, from its OpenAPI description. It loads nothing from another host."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader

_FORM = "multipart/form-data"


def api_page(openapi: dict[str, Any]) -> str:
    """The page as HTML. `openapi`: the application's description."""
    return _template().render(info=openapi["info"], routes=_routes(openapi))


@lru_cache(maxsize=1)
def _template() -> Any:
    return Environment(loader=PackageLoader(__package__), autoescape=True).get_template("api.html")


def _routes(openapi: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "path": path,
            "method": method.upper(),
            "about": route.get("description", route.get("summary", "")),
            "fields": [*_parameters(route), *_fields(route, openapi)],
            "answers": {status: one["description"] for status, one in route.get("responses", {}).items()},
        }
        for path, methods in openapi["paths"].items()
        for method, route in methods.items()
    ]


def _parameters(route: dict[str, Any]) -> list[dict[str, Any]]:
    return [_field(one["name"], one["schema"], one.get("required", False)) for one in route.get("parameters", ())]


def _fields(route: dict[str, Any], openapi: dict[str, Any]) -> list[dict[str, Any]]:
    content = route.get("requestBody", {}).get("content", {}).get(_FORM)
    if content is None:
        return []
    schema = content["schema"]
    schema = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    required = schema.get("required", ())
    return [_field(name, one, name in required) for name, one in schema["properties"].items()]


def _field(name: str, schema: dict[str, Any], required: bool) -> dict[str, Any]:
    kinds = schema.get("anyOf", [schema])
    values = [str(value) for kind in kinds for value in kind.get("enum", ())]
    types = [kind["type"] for kind in kinds if kind.get("type") not in (None, "null")]
    return {
        "name": name,
        "kind": " or ".join(values or ["file" if "contentMediaType" in schema else " or ".join(types)]),
        "about": schema.get("description", ""),
        "default": "required" if required else schema.get("default"),
    }
