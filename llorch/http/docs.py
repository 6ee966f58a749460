"""GET /docs: Swagger UI from the swagger-ui-bundle package. Nothing of it comes from another host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litestar import MediaType, Request, Router
from litestar.exceptions import NotFoundException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag
from litestar.static_files import create_static_files_router
from swagger_ui_bundle import swagger_ui_path

import llorch
from llorch.http.auth import OPEN_PATHS
from llorch.http.errors import dump_json
from llorch.http.fields import Field

ASSETS = "/docs/assets"
SECURITY_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"

PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>llorch API</title>
<link rel="icon" href="{ASSETS}/favicon-32x32.png">
<link rel="stylesheet" href="{ASSETS}/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="{ASSETS}/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""

# validatorUrl: by default Swagger UI shows a badge that swagger.io draws
START_SCRIPT = b"""SwaggerUIBundle({
  spec: %s,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""


@dataclass(frozen=True)
class Body:
    """The request body of a route, for the document."""

    fields: Sequence[Field]
    example: Mapping[str, Any]
    lenient: bool = False  # unknown fields are passed over
    answer: Mapping[str, Any] | None = None  # JSON Schema of the answer that is no stream, where there is one


def document(generated: dict[str, Any], bodies: Mapping[str, Body]) -> dict[str, Any]:
    """Litestar's document with the bodies that llorch checks itself, in OpenAPI 3.0: this Swagger UI knows no 3.1."""
    converted: dict[str, Any] = _as_3_0(generated)
    converted["openapi"] = "3.0.3"
    for path, body in bodies.items():
        schema = {
            "type": "object",
            "additionalProperties": body.lenient,
            "properties": {field.name: _property(field, body) for field in body.fields},
        }
        if required := [field.name for field in body.fields if field.required]:
            schema["required"] = required
        content = {"application/json": {"schema": schema, "example": body.example}}
        operation = converted["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": content}
        answers = operation["responses"].get("200", {}).get("content", {})
        if "text/event-stream" in answers:
            del answers["text/event-stream"]["schema"]  # OpenAPI 3.0 has none for events: the example shows them
        if body.answer is not None:
            answers["application/json"] = {"schema": body.answer}
    if "security" in converted:
        _add_keys(converted["paths"])
    return converted


def _property(field: Field, body: Body) -> dict[str, Any]:
    return field.schema() | ({"nullable": True} if body.lenient and not field.required else {})


def _add_keys(paths: dict[str, Any]) -> None:
    text = {"type": "string"}
    error = {"type": "object", "required": ["code", "message"], "properties": {"code": text, "message": text}}
    content = {"schema": {"type": "object", "required": ["error"], "properties": {"error": error}}}
    refusal = {"description": "MISSING_API_KEY or INVALID_API_KEY.", "content": {"application/json": content}}
    for path, operations in paths.items():
        for operation in operations.values():
            if path in OPEN_PATHS:
                operation["security"] = []
            else:
                operation["responses"]["401"] = refusal


def _as_3_0(node: Any) -> Any:
    """The constructs of JSON Schema 2020 that Litestar generates, in the dialect of OpenAPI 3.0."""
    if isinstance(node, list):
        return [_as_3_0(item) for item in node]
    if not isinstance(node, dict):
        return node
    converted = {key: _as_3_0(value) for key, value in node.items()}
    if converted.get("required") == []:  # 3.0 wants one name at least
        del converted["required"]
    if "const" in converted:
        converted["enum"] = [converted.pop("const")]
    for union in ("oneOf", "anyOf"):
        options = converted.get(union)
        if isinstance(options, list) and {"type": "null"} in options:
            converted[union] = [option for option in options if option != {"type": "null"}]
            converted["nullable"] = True
    return converted


class SwaggerPage(OpenAPIRenderPlugin):
    """The page at /docs."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return PAGE.encode()


class Document(OpenAPIRenderPlugin):
    """The document itself, alone or within the script that starts Swagger UI."""

    def __init__(self, path: str, media_type: Any, template: bytes, bodies: Mapping[str, Body]) -> None:
        super().__init__(path=path, media_type=media_type)
        self._template, self._bodies = template, bodies

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return self._template.replace(b"%s", dump_json(document(openapi_schema, self._bodies)))


def _only_known_paths(request: Request[Any, Any, Any]) -> None:
    """Litestar would answer other paths below /docs with a page, not with the JSON error of all other routes."""
    if request.scope["path"].removeprefix("/docs") not in ("", "/", "/openapi.json", "/start.js"):
        raise NotFoundException


def docs_config(bodies: Mapping[str, Body], *, with_keys: bool) -> OpenAPIConfig:
    bearer = SecurityScheme(type="http", scheme="bearer", description="One of the keys in LLORCH_API_KEY.")
    router = Router(
        "/docs",
        route_handlers=[],
        include_in_schema=False,
        before_request=_only_known_paths,
        response_headers={"Content-Security-Policy": SECURITY_POLICY},
    )
    return OpenAPIConfig(
        title="llorch",
        version=llorch.__version__,
        description="An LLM inference worker: one model behind the worker contract and the OpenAI API.",
        openapi_router=router,
        render_plugins=[
            SwaggerPage(),
            Document("/openapi.json", MediaType.JSON, b"%s", bodies),
            Document("/start.js", "text/javascript", START_SCRIPT, bodies),
        ],
        components=Components(security_schemes={"bearer": bearer} if with_keys else {}),
        security=[{"bearer": []}] if with_keys else None,
        tags=[
            Tag(name="worker", description="What an orchestrator speaks."),
            Tag(name="openai", description="What OpenAI's clients speak."),
        ],
    )


def assets_router() -> Router:
    return create_static_files_router(path=ASSETS, directories=[swagger_ui_path], include_in_schema=False)
