// Asks a llorch server and streams the answer, with nothing but Node 18 or newer: node chat.mjs "Tell me a story."
const url = process.env.LLORCH_URL ?? "http://127.0.0.1:8080";
const response = await fetch(`${url}/v1/chat/completions`, {
  method: "POST",
  headers: { "content-type": "application/json", authorization: `Bearer ${process.env.LLORCH_KEY ?? "none"}` },
  body: JSON.stringify({
    messages: [{ role: "user", content: process.argv[2] ?? "Tell me a story." }],
    max_tokens: 64,
    temperature: 0,
    stream: true,
  }),
});
if (!response.ok) {
  console.error((await response.json()).error.message);
  process.exit(1);
}
let rest = "";
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + text).split("\n");
  rest = lines.pop(); // a line may arrive in pieces
  for (const line of lines) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    const chunk = JSON.parse(line.slice("data: ".length));
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) process.stdout.write(choice.delta.content ?? "");
  }
}
console.log();
