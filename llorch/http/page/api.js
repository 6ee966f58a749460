// What the page asks of the server. Errors are Error objects whose message is a sentence for the reader.

export class KeyNeeded extends Error {}

export async function health() {
  const response = await fetch("/health");
  return response.json();
}

// Streams an answer: onText gets each piece of text as it comes. Returns {usage, finish}; aborts with the signal.
export async function chat(body, key, signal, onText) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw await refusal(response);
  const result = { usage: null, finish: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return result;
    const event = JSON.parse(data);
    if (event.error) throw new Error(sentence(event.error.message));
    if (event.usage) result.usage = event.usage;
    const choice = event.choices?.[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    if (choice?.finish_reason) result.finish = choice.finish_reason;
  }
  throw new Error("The connection ended before the answer did.");
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? body.message ?? `The server answered ${response.status}.`;
  return new (response.status === 401 ? KeyNeeded : Error)(sentence(message));
}

function sentence(text) {
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}

// A connection that breaks has ended: what to say of an answer that had not is the same.
function ended(error) {
  if (error.name === "AbortError") throw error;
  return { done: true };
}

// The data of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(ended);
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
