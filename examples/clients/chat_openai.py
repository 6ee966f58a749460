"""Asks a llorch server with OpenAI's client and streams the answer: python chat_openai.py "Tell me a story." """

import os
import sys

from openai import OpenAI

url = os.environ.get("LLORCH_URL", "http://127.0.0.1:8080")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("LLORCH_KEY", "none"))
question = sys.argv[1] if len(sys.argv) > 1 else "Tell me a story."
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0, stream=True
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
