// The chat: state, the list of messages, and the composer. The conversation lives in this tab (sessionStorage) only.

import { render } from "./markdown.js";
import { ask } from "./stream.js";

const $ = (id) => document.getElementById(id);
const messages = load(sessionStorage, "messages", []); // {role, content, thinking?, note?, failure?, figures?}
const SETTINGS = ["system", "thinking", "temperature", "max-tokens"];

let model = null;
let running = null; // the AbortController of the answer that is being made

function load(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

const save = () => sessionStorage.setItem("messages", JSON.stringify(messages));
const key = () => $("key").value.trim();

// ---- messages on the page

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function button(text, action, label = text) {
  const made = element("button", "", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

/** An article for `message`, and the function that brings it up to date. */
function article(message) {
  const body = element("div", "body");
  const made = element("article", message.role);
  if (message.role === "user") {
    made.setAttribute("aria-label", "You");
    body.textContent = message.content;
    made.append(body);
    return { made, update() {} };
  }
  made.setAttribute("aria-label", "Answer");
  const thoughts = element("div");
  const summary = element("summary", "", "Thinking");
  const thinking = element("details", "thinking", summary, thoughts);
  const waiting = element("div", "waiting", "…");
  const rest = element("div");
  made.append(thinking, body, waiting, rest);
  const update = (done) => {
    thinking.hidden = !message.thinking;
    if (message.thinking && (thinking.open || !thoughts.hasChildNodes() || done)) render(thoughts, message.thinking.trim());
    summary.textContent = message.content || done ? "Thoughts" : "Thinking …";
    render(body, message.content);
    waiting.hidden = done || Boolean(message.content || message.thinking);
    if (done) rest.replaceChildren(...ending(message));
  };
  thinking.addEventListener("toggle", () => render(thoughts, (message.thinking ?? "").trim()));
  return { made, update };
}

/** What stands under an answer that has ended. */
function ending(message) {
  const parts = [];
  if (message.failure) parts.push(element("p", "failure", message.failure));
  if (message.note) parts.push(element("p", "note", message.note));
  const copy = button("Copy", () => copyText(message.content, copy), "Copy the answer");
  const bar = element("footer", "", copy);
  if (message === messages.at(-1)) bar.append(button("Regenerate", regenerate, "Regenerate the answer"));
  if (message.figures) bar.append(element("span", "figures", message.figures));
  return [...parts, bar];
}

async function copyText(text, source) {
  const before = source.textContent;
  try {
    await navigator.clipboard.writeText(text);
    source.textContent = "Copied";
  } catch { // not a secure context: pages on plain http of another machine may not use the clipboard
    source.textContent = "Not allowed";
  }
  setTimeout(() => { source.textContent = before; }, 1500);
}

function showAll() {
  const articles = messages.map((message) => {
    const { made, update } = article(message);
    update(true);
    return made;
  });
  $("messages").replaceChildren(empty, ...articles);
  empty.hidden = messages.length > 0;
}
const empty = $("empty");

const atEnd = () => $("messages").scrollHeight - $("messages").scrollTop - $("messages").clientHeight < 60;
const scrollToEnd = () => { $("messages").scrollTop = $("messages").scrollHeight; };

// ---- asking

async function answer() {
  const message = { role: "assistant", content: "", thinking: "" };
  const asked = [...messages];
  messages.push(message);
  showAll();
  const { made, update } = article(message);
  $("messages").lastChild.replaceWith(made);
  update(false);
  scrollToEnd();
  setRunning(new AbortController());

  let drawn = true; // at most one drawing a frame, however fast the tokens come
  const draw = () => {
    drawn = true;
    if (!running) return;
    const follow = atEnd();
    update(false);
    if (follow) scrollToEnd();
  };
  const report = (kind, text) => {
    message[kind] += text;
    if (drawn) requestAnimationFrame(draw);
    drawn = false;
  };
  try {
    const result = await ask(request(asked), key(), running.signal, report);
    message.figures = figures(result);
    if (result.finish === "length") message.note = "The answer was cut off: it reached the limit of tokens.";
  } catch (error) {
    if (error.name === "AbortError") message.note = "Stopped.";
    else message.failure = error.status === 401 ? `${error.message} Enter the API key in the settings.` : error.message;
    if (error.status === 401) toggleSettings(true);
  }
  const follow = atEnd();
  setRunning(null);
  save();
  update(true);
  if (follow) scrollToEnd();
  $("status").textContent = message.failure ?? message.note ?? "The answer is complete.";
}

function request(asked) {
  const system = $("system").value.trim();
  const said = asked.filter(({ role, content }) => role === "user" || content).map(({ role, content }) => ({ role, content }));
  const made = {
    model: model ?? "default",
    messages: system ? [{ role: "system", content: system }, ...said] : said,
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("temperature").value !== "") made.temperature = Number($("temperature").value);
  if ($("max-tokens").value !== "") made.max_tokens = Number($("max-tokens").value);
  if ($("thinking").value) made.chat_template_kwargs = { enable_thinking: $("thinking").value === "true" };
  return made;
}

/** For example "57 tokens · 41.3 tokens/s · first after 120 ms". */
function figures({ usage, first, last }) {
  if (!usage) return "";
  const count = usage.completion_tokens;
  const parts = [`${count} token${count === 1 ? "" : "s"}`];
  if (count > 1 && last > first) {
    const rate = ((count - 1) / (last - first)) * 1000;
    parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  }
  if (first !== null) parts.push(`first after ${first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(1)} s`}`);
  return parts.join(" · ");
}

function setRunning(controller) {
  running = controller;
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
  if (running) $("status").textContent = "The model is answering.";
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  $("input").value = "";
  fitInput();
  answer();
}

function regenerate() {
  if (running) return;
  while (messages.at(-1)?.role === "assistant") messages.pop();
  answer();
}

const stop = () => running?.abort();

function newChat() {
  stop();
  messages.length = 0;
  save();
  showAll();
  $("input").focus();
}

// ---- the page around it

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
  $("send").disabled = !$("input").value.trim();
}

function toggleSettings(open = $("settings").hidden) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

async function describe() {
  const headers = key() ? { authorization: `Bearer ${key()}` } : {};
  const get = async (path) => {
    const response = await fetch(path, { headers });
    return response.ok ? response.json() : null;
  };
  try {
    const [models, props] = await Promise.all([get("/v1/models"), get("/props")]);
    model = models?.data?.[0]?.id ?? model;
    $("model").textContent = props?.model_alias ?? model ?? "onekernel";
    const context = props?.default_generation_settings?.n_ctx;
    const parts = [props?.device, context && `context ${context.toLocaleString("en")}`];
    $("device").textContent = parts.filter(Boolean).join(" · ");
    document.title = model ? `${$("model").textContent} – onekernel` : "onekernel";
  } catch {
    $("device").textContent = "the server does not answer";
  }
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  // isComposing: Enter there only accepts a word of an input method.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
  else if (event.key === "Escape") toggleSettings(false);
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") { event.preventDefault(); newChat(); }
});
document.addEventListener("click", (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) copyText(copy.closest(".code").querySelector("code").textContent, copy);
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", newChat);
$("open-settings").addEventListener("click", () => toggleSettings());
$("key").addEventListener("change", () => { sessionStorage.setItem("key", key()); describe(); });
for (const name of SETTINGS) $(name).addEventListener("change", () => localStorage.setItem(name, $(name).value));
$("messages").addEventListener("scroll", () => { $("to-end").hidden = atEnd(); });
$("to-end").addEventListener("click", scrollToEnd);
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = dark ? "light" : "dark";
  localStorage.setItem("theme", theme);
  setTheme(theme);
});

setTheme(localStorage.getItem("theme"));
for (const name of SETTINGS) $(name).value = localStorage.getItem(name) ?? "";
$("key").value = sessionStorage.getItem("key") ?? "";
showAll();
fitInput();
scrollToEnd();
describe();
