#!/usr/bin/env bash
# Asks a llorch server with curl: ./chat.sh "Tell me a story." (LLORCH_URL and LLORCH_KEY say where and with which key)
set -euo pipefail
question=${1:-Tell me a story.}
# printf's %s is no JSON: python3 quotes the question
body=$(python3 -c 'import json, sys; m = [{"role": "user", "content": sys.argv[1]}]
print(json.dumps({"messages": m, "max_tokens": 64, "temperature": 0}))' "$question")
curl --silent --show-error --fail-with-body "${LLORCH_URL:-http://127.0.0.1:8080}/v1/chat/completions" \
  -H "authorization: Bearer ${LLORCH_KEY:-none}" -H "content-type: application/json" -d "$body" |
  python3 -c 'import json, sys; found = json.load(sys.stdin)
if "error" in found: sys.exit(found["error"]["message"])
print(found["choices"][0]["message"]["content"])'
