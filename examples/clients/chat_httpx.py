"""Asks a llorch server with httpx and streams the answer: python chat_httpx.py "Tell me a story." """

import json
import os
import sys

import httpx

url = os.environ.get("LLORCH_URL", "http://127.0.0.1:8080")
headers = {"Authorization": f"Bearer {os.environ.get('LLORCH_KEY', 'none')}"}
question = sys.argv[1] if len(sys.argv) > 1 else "Tell me a story."
messages = [{"role": "user", "content": question}]
body = {"messages": messages, "max_tokens": 64, "temperature": 0, "stream": True}

with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
    if response.status_code != 200:
        response.read()
        sys.exit(response.json()["error"]["message"])
    for line in response.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue  # a comment, a blank line or the end
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            sys.exit(chunk["error"]["message"])
        for choice in chunk["choices"]:
            print(choice["delta"].get("content", ""), end="", flush=True)
print()
