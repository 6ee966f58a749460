// The chat page: what is on the screen and what is kept in the browser.

import { KeyNeeded, chat, health } from "./api.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const FIELDS = [...NUMBERS, "system", "colours"];
// Each tab has a conversation of its own, so that two do not overwrite each other; a new tab begins with the one written last.
const STORAGES = { messages: ["sessionStorage", "localStorage"], settings: ["localStorage"], key: ["sessionStorage"] };
const SAVE_MS = 1000; // what a crash may cost of an answer

let messages = load("messages", []);
let key = load("key", "");
let context = null; // tokens that the model can take
let running = null; // AbortController of the answer that is being written
let saving = null; // timer, while there is something to be saved
let scrolledTo = 0; // where the page itself has put the conversation
let describing = null; // timer, while the server is not ready

function load(name, otherwise) {
  for (const storage of STORAGES[name]) {
    try {
      const value = JSON.parse(window[storage].getItem(`llorch.${name}`));
      if (value !== null) return value;
    } catch {
      // written by something else, or storage is off
    }
  }
  return otherwise;
}

function store(name, value) {
  for (const storage of STORAGES[name]) {
    try {
      window[storage].setItem(`llorch.${name}`, JSON.stringify(value));
    } catch {
      status("This browser keeps no history: its storage is full or off.");
    }
  }
}

function save() {
  clearTimeout(saving);
  saving = null;
  store("messages", messages);
}

function saveSoon() {
  saving ??= setTimeout(save, SAVE_MS);
}

// ---- what is shown ----

function status(text) {
  $("status").textContent = text;
}

function show({ role, content, unfinished }) {
  const element = document.createElement("article");
  element.className = `message ${role}`;
  element.classList.toggle("unfinished", Boolean(unfinished));
  if (role === "error") element.setAttribute("role", "alert");
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = { user: "You", assistant: "Model", error: "Error" }[role];
  const words = document.createElement("span");
  words.textContent = content;
  element.append(who, words);
  $("conversation").append(element);
  scroll();
  return { element, words };
}

function scroll() {
  $("conversation").scrollTop = $("conversation").scrollHeight;
  scrolledTo = $("conversation").scrollTop;
}

// Keeps the end of a conversation that grows in sight, unless the reader has scrolled up.
function follow(change) {
  const { scrollHeight, scrollTop, clientHeight } = $("conversation");
  change();
  if (scrollTop >= scrolledTo || scrollHeight - scrollTop - clientHeight <= 1) scroll();
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  for (const id of ["conversation", "status"]) $(id).setAttribute("aria-busy", on); // a screen reader waits for the whole
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
  clearTimeout(describing);
  describing = setTimeout(describe, 1000);
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
  const said = messages.map(({ role, content }) => ({ role, content }));
  const body = { messages: [...(system ? [{ role: "system", content: system }] : []), ...said] };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  return body;
}

// ---- a turn ----

async function ask(text) {
  for (const element of document.querySelectorAll(".unanswered, .unanswered ~ *")) element.remove();
  messages.push({ role: "user", content: text });
  show(messages.at(-1));
  $("message").value = "";
  save();
  await answer();
}

async function answer() {
  const ours = messages; // "New chat" begins another list: what comes after it belongs to no conversation any more
  const said = { role: "assistant", content: "", unfinished: true };
  const { element, words } = show(said);
  element.classList.add("writing");
  running = new AbortController();
  busy(true);
  let since = performance.now();
  let pieces = 0;
  let outcome = "";
  const write = (piece) => {
    if (!said.content) {
      since = performance.now(); // the rate is that of writing
      ours.push(said);
    }
    pieces += 1;
    said.content += piece;
    saveSoon();
    follow(() => words.append(piece)); // a node of its own: what is selected stays so
    status(rate(pieces, since));
  };
  try {
    const { usage, finish } = await chat(request(), key, running.signal, write);
    said.unfinished = finish === "length";
    outcome = summary(usage, since);
  } catch (error) {
    if (error.name === "AbortError") outcome = "Stopped.";
    else if (error instanceof KeyNeeded) return retryWithKey(element, error);
    else show({ role: "error", content: error.message });
  } finally {
    running = null;
    busy(false);
  }
  if (ours === messages) settle(element, said, outcome);
}

// Keeps what was said; a question that got no answer at all goes back to be sent again.
function settle(element, said, outcome) {
  status(outcome);
  follow(() => {
    element.classList.remove("writing");
    element.classList.toggle("unfinished", said.unfinished);
  });
  if (said.content) save();
  else {
    element.remove();
    takeBack();
  }
  const focused = document.activeElement;
  if (focused === document.body || focused.hidden) $("message").focus(); // whoever is elsewhere by now stays there
  describe(); // the server may have ended, or be another one by now
}

function rate(tokens, since) {
  const seconds = (performance.now() - since) / 1000;
  return tokens > 1 && seconds > 0 ? `${(tokens / seconds).toFixed(1)} tokens/s` : "";
}

function summary(usage, since) {
  if (!usage) return "";
  const tokens = usage.completion_tokens;
  const used = context ? `${usage.total_tokens} of ${context} tokens of context used` : "";
  return [`${tokens} token${tokens === 1 ? "" : "s"}`, rate(tokens, since), used].filter(Boolean).join(", ");
}

async function retryWithKey(element, error) {
  element.remove();
  const dialog = $("key-dialog");
  $("key-error").textContent = key ? error.message : "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue === "use") {
    key = $("key").value.trim();
    store("key", key);
    return answer();
  }
  takeBack();
  status("Not sent: the server asks for an API key.");
}

// The last question goes before what was typed meanwhile, unless the browser has put it there again by itself. It stays
// stored until another is asked: a page that is being left may see its request fail, and its box is lost.
function takeBack() {
  const question = messages.pop().content;
  const box = $("message");
  if (!box.value.startsWith(question)) box.value = [question, box.value].filter(Boolean).join("\n\n");
  [...document.querySelectorAll(".message.user")].at(-1).classList.add("unanswered");
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
  messages = [];
  $("conversation").replaceChildren();
  status("");
  save();
  $("message").focus();
});
for (const name of FIELDS) $(name).addEventListener("change", keep);
for (const leaving of ["pagehide", "visibilitychange"]) window.addEventListener(leaving, () => saving && save());
window.addEventListener("focus", describe); // whoever comes back may have started the server anew

$("settings").addEventListener("toggle", scroll); // what was said last stays in sight
restore();
for (const message of messages) show(message);
if (messages.at(-1)?.role === "user") takeBack();
describe();
