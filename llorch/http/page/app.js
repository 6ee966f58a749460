// The chat page: what is on the screen and what is kept in the browser.

import { KeyNeeded, chat, health } from "./api.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const FIELDS = [...NUMBERS, "system", "colours"];

let messages = load("messages", []);
let context = null; // tokens that the model can take
let running = null; // AbortController of the answer that is being written
let chatNumber = 0; // an answer that ends after "New chat" belongs to no conversation any more

function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`llorch.${name}`)) ?? otherwise;
  } catch {
    return otherwise; // written by something else, or storage is off
  }
}

function store(name, value) {
  try {
    localStorage.setItem(`llorch.${name}`, JSON.stringify(value));
  } catch {
    status("This browser keeps no history: its storage is full or off.");
  }
}

// ---- what is shown ----

function status(text) {
  $("status").textContent = text;
}

function show(role, text) {
  const element = document.createElement("article");
  element.className = `message ${role}`;
  if (role === "error") element.setAttribute("role", "alert");
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = { user: "You", assistant: "Model", error: "Error" }[role];
  const words = document.createElement("span");
  words.textContent = text;
  element.append(who, words);
  $("conversation").append(element);
  scroll();
  return { element, words };
}

function scroll() {
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("conversation").setAttribute("aria-busy", on);
}

async function describe() {
  try {
    const state = await health();
    if (state.status === "healthy") {
      context = state.context_length;
      $("model").textContent = state.model;
      $("demo").hidden = state.model !== "llorch-demo";
      $("machine").textContent = `${state.provider} on ${state.device}, ${state.quant_kind}, context ${context}`;
      return;
    }
    $("machine").textContent =
      state.status === "loading" ? `loading the model: ${Math.round(100 * state.progress)} %` : `not ready: ${state.reason}`;
  } catch {
    $("machine").textContent = "the server does not answer";
  }
  setTimeout(describe, 1000);
}

// ---- settings ----

function restore() {
  const kept = load("settings", { temperature: "0.7" });
  for (const name of FIELDS) $(name).value = kept[name] ?? "";
  colour();
}

function keep() {
  store("settings", Object.fromEntries(FIELDS.map((name) => [name, $(name).value])));
  colour();
}

function colour() {
  document.documentElement.dataset.colours = $("colours").value;
}

function request() {
  const system = $("system").value.trim();
  const body = { messages: [...(system ? [{ role: "system", content: system }] : []), ...messages] };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  return body;
}

// ---- a turn ----

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  $("message").value = "";
  await answer();
}

async function answer() {
  const { element, words } = show("assistant", "");
  element.classList.add("writing");
  const ours = chatNumber;
  running = new AbortController();
  busy(true);
  const started = performance.now();
  let first = null;
  let pieces = 0;
  const write = (piece) => {
    first ??= performance.now();
    pieces += 1;
    words.textContent += piece;
    status(rate(pieces, first));
    scroll();
  };
  try {
    const { usage } = await chat(request(), sessionStorage.getItem("llorch.key"), running.signal, write);
    status(summary(usage, first ?? started));
  } catch (error) {
    if (error.name === "AbortError") status("Stopped.");
    else if (error instanceof KeyNeeded) return retryWithKey(element, error);
    else show("error", error.message);
  } finally {
    element.classList.remove("writing");
    running = null;
    busy(false);
  }
  if (ours === chatNumber) finish(element, words.textContent);
}

// Keeps what was said; a question that got no answer at all goes back to be sent again.
function finish(element, text) {
  if (text) messages.push({ role: "assistant", content: text });
  else {
    element.remove();
    takeBack();
  }
  store("messages", messages);
  $("message").focus();
}

function rate(tokens, since) {
  const seconds = (performance.now() - since) / 1000;
  return tokens > 1 && seconds > 0 ? `${(tokens / seconds).toFixed(1)} tokens/s` : "";
}

function summary(usage, since) {
  if (!usage) return "";
  const used = context ? `, ${usage.total_tokens} of ${context} tokens of context used` : "";
  return `${usage.completion_tokens} tokens, ${rate(usage.completion_tokens, since)}${used}`;
}

async function retryWithKey(element, error) {
  element.remove();
  $("key-error").textContent = sessionStorage.getItem("llorch.key") ? error.message : "";
  $("key-dialog").showModal();
  await new Promise((done) => $("key-dialog").addEventListener("close", done, { once: true }));
  const key = $("key").value.trim();
  if (key) {
    sessionStorage.setItem("llorch.key", key);
    return answer();
  }
  takeBack();
  status("Not sent: the server asks for an API key.");
}

function takeBack() {
  $("message").value ||= messages.pop().content;
}

// ---- events ----

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (text && !running) ask(text);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  chatNumber += 1;
  messages = [];
  $("conversation").replaceChildren();
  store("messages", messages);
  status("");
  $("message").focus();
});
for (const name of FIELDS) $(name).addEventListener("change", keep);

$("settings").addEventListener("toggle", scroll); // what was said last stays in sight
restore();
for (const { role, content } of messages) show(role, content);
describe();
