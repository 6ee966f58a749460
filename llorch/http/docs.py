"""GET /docs: Swagger UI from the swagger-ui-bundle package. Nothing of it comes from another host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from litestar import MediaType, Request, Response, Router, get
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag
from litestar.static_files import create_static_files_router
from swagger_ui_bundle import swagger_ui_path

import llorch
from llorch.http.bodies import Field
from llorch.http.errors import dump_json

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
START_SCRIPT = """SwaggerUIBundle({
  spec: %s,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""

EVENTS = """event: started
data: {"type":"started","job_id":"job-1","model":"stories260K","started_at":"2025-01-01T12:00:00.000+00:00","seed":42}

event: token
data: {"type":"token","t":" there","i":0}

event: metrics
data: {"type":"metrics","tokens_per_sec":51.3,"vram_bytes":1310720}

event: end
data: {"type":"end","tokens_out":64,"decode_time_ms":1228,"stop_reason":"MAX_TOKENS"}

"""


@dataclass(frozen=True)
class Body:
    """The request body of a route, for the document."""

    fields: Sequence[Field]
    example: Mapping[str, Any]


def document(generated: dict[str, Any], bodies: Mapping[str, Body]) -> dict[str, Any]:
    """Litestar's document with the bodies that llorch checks itself, in OpenAPI 3.0: this Swagger UI knows no 3.1."""
    converted: dict[str, Any] = _as_3_0(generated)
    converted["openapi"] = "3.0.3"
    for path, body in bodies.items():
        schema = {
            "type": "object",
            "additionalProperties": False,
            "required": [field.name for field in body.fields if field.required],
            "properties": {field.name: field.schema() for field in body.fields},
        }
        content = {"application/json": {"schema": schema, "example": body.example}}
        converted["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    stream = {"text/event-stream": {"schema": {"type": "string"}, "example": EVENTS}}
    converted["paths"]["/execute"]["post"]["responses"]["200"] = {"description": "The job's events.", "content": stream}
    return converted


def _as_3_0(node: Any) -> Any:
    """The constructs of JSON Schema 2020 that Litestar generates, in the dialect of OpenAPI 3.0."""
    if isinstance(node, list):
        return [_as_3_0(item) for item in node]
    if not isinstance(node, dict):
        return node
    converted = {key: _as_3_0(value) for key, value in node.items()}
    if "const" in converted:
        converted["enum"] = [converted.pop("const")]
    for union in ("oneOf", "anyOf"):
        options = converted.get(union)
        if isinstance(options, list) and {"type": "null"} in options:
            converted[union] = [option for option in options if option != {"type": "null"}]
            converted["nullable"] = True
    return converted


class SwaggerPage(OpenAPIRenderPlugin):
    """Serves the page at /docs, and beside it the document and the script that starts Swagger UI."""

    def __init__(self, bodies: Mapping[str, Body]) -> None:
        super().__init__(path="/")
        self._bodies = bodies

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return PAGE.encode()

    def receive_router(self, router: Router) -> None:
        bodies = self._bodies

        @get("/start.js", media_type="text/javascript", include_in_schema=False)
        async def start(request: Request[Any, Any, Any]) -> bytes:
            spec = document(request.app.openapi_schema.to_schema(), bodies)
            return START_SCRIPT.encode().replace(b"%s", dump_json(spec))

        @get("/openapi.json", include_in_schema=False)
        async def openapi(request: Request[Any, Any, Any]) -> Response[bytes]:
            spec = document(request.app.openapi_schema.to_schema(), bodies)
            return Response(dump_json(spec), media_type=MediaType.JSON)

        router.register(start)
        router.register(openapi)


def docs_config(bodies: Mapping[str, Body], *, with_keys: bool) -> OpenAPIConfig:
    bearer = SecurityScheme(type="http", scheme="bearer", description="One of the keys in LLORCH_API_KEY.")
    return OpenAPIConfig(
        title="llorch",
        version=llorch.__version__,
        description="An LLM inference worker: one model behind the worker contract.",
        path="/docs",
        render_plugins=[SwaggerPage(bodies)],
        components=Components(security_schemes={"bearer": bearer} if with_keys else {}),
        security=[{"bearer": []}] if with_keys else None,
        tags=[Tag(name="worker", description="What an orchestrator speaks.")],
    )


def assets_router() -> Router:
    return create_static_files_router(path=ASSETS, directories=[swagger_ui_path], include_in_schema=False)
