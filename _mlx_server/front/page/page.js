// The page of mlx-server. It asks `GET /activity` once a second while it is seen, and Ollama's API
// for the rest; what a server or a model says is only ever shown as text.

import { make, markdown } from "./markdown.js";

const POLL = 1000; // milliseconds between two looks at the server
const PATIENCE = 10000; // milliseconds after which a server does not answer
const WINDOW = 600; // seconds of the charts
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const count = (n) => number.format(n ?? 0);
const rate = (n) => (n == null ? "–" : n < 100 ? n.toFixed(1) : count(Math.round(n)));
const share = (part, all) => (all ? `${Math.floor((100 * part) / all)} %` : "–");
const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { hour12: false });
const plain = (name) => name.replace(/:latest$/, "");

function bytes(n) {
  return n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(1)} GB` : `${Math.round(n / 2 ** 20)} MB`;
}

function seconds(s) {
  if (s == null) return "–";
  if (s < 60) return `${s.toFixed(s < 1 ? 2 : s < 10 ? 1 : 0)}\u00a0s`;
  return s < 3600 ? `${Math.floor(s / 60)} min ${Math.round(s % 60)} s` : `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

// ---------------------------------------------------------------- the server

let key = sessionStorage.getItem("key");

/** The server's answer. Throws an Error with its message; asks for a key where one is missing. */
async function call(path, { body, ...options } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { cache: "no-store", ...options, headers, body: body && JSON.stringify(body) }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server does not answer");
  });
  if (answer.status === 401 && !$("key").open) $("key").showModal();
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error?.message ?? said.error ?? `status ${answer.status}`);
}

const post = (path, body, options) => call(path, { method: "POST", body, ...options });

/** The objects of an answer that come one a line. */
async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    const whole = `${rest}${value ?? ""}`.split("\n");
    rest = done ? "" : whole.pop();
    for (const line of whole.filter(Boolean)) {
      const object = JSON.parse(line);
      if (object.error) throw new Error(object.error);
      yield object;
    }
    if (done) return;
  }
}

$("key").querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  key = $("key-value").value.trim();
  sessionStorage.setItem("key", key);
  $("key").close();
  look();
};

// ---------------------------------------------------------------- looking, once a second

let timer, looking, started, models = [];

async function look() {
  clearTimeout(timer);
  if (looking || document.hidden) return;
  looking = true;
  try {
    const answer = await call("activity", { signal: AbortSignal.timeout(PATIENCE) });
    const activity = await answer.json();
    if (activity.started !== started) await listModels();
    started = activity.started;
    show(activity);
  } catch (error) {
    tell(error.message, "trouble");
  }
  looking = false;
  timer = setTimeout(look, POLL);
}

document.addEventListener("visibilitychange", look);

function tell(text, className) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").className = className;
}

/** Gives `parent` a child for each item; the child of an item that stays keeps its focus. */
function list(parent, items, keyOf, create, update = () => {}) {
  const before = parent.shown ?? new Map();
  parent.shown = new Map(items.map((item) => [keyOf(item), before.get(keyOf(item)) ?? create(item)]));
  const kept = new Set(parent.shown.values());
  for (const row of before.values()) if (!kept.has(row)) row.remove();
  items.forEach((item, at) => {
    const row = parent.shown.get(keyOf(item));
    if (parent.children[at] !== row) parent.insertBefore(row, parent.children[at] ?? null);
    update(row, item);
  });
}

function show(activity) {
  const { working, recent, warnings, queue, memory } = activity;
  const healthy = activity.status === "ok";
  $("version").textContent = activity.version;
  tell(healthy ? `up ${seconds(Date.now() / 1000 - activity.started).replace(/ min .*/, " min")}` : activity.status, healthy ? "good" : "trouble");
  document.title = working.length ? `(${working.length}) mlx-server` : "mlx-server";
  showMemory(memory);
  $("queue").textContent = `${working.length} in work, ${queue.waiting} of at most ${queue.limit} waiting`;
  const times = {};
  for (const row of working) row.key = `${row.id} ${(times[row.id] = (times[row.id] ?? 0) + 1)}`;
  list($("working"), working, (row) => row.key, workingRow, updateWorking);
  const rows = recent.flatMap((row) => (row.miss ? [row, { time: row.time, miss: row.miss }] : [row]));
  list($("done"), rows, ({ time, route }) => `${time} ${route}`, (row) => (row.route ? recentRow(row) : missRow(row.miss)));
  list($("warned"), warnings, (row) => `${row.time} ${row.message}`, ({ time, level, message }) =>
    make("li", { className: level }, make("time", {}, clock(time)), message));
  for (const [id, items] of [["requests", working], ["recent", recent], ["warnings", warnings]])
    $(id).classList.toggle("none", !items.length);
  showCharts(activity.throughput);
  showLoaded(activity);
}

function showMemory({ limit, used, ...parts }) {
  const free = Math.max(0, limit - parts.weights - parts.states - parts.prompt_cache);
  $("memory-sum").textContent = `${bytes(limit - free)} of ${bytes(limit)} in use, ${bytes(used)} held by MLX`;
  for (const [name, size] of Object.entries({ ...parts, free })) {
    const segment = document.querySelector(`.bar .${name}`);
    if (segment) segment.style.width = `${(100 * size) / limit}%`;
    const legend = document.querySelector(`.legend .${name} b`);
    if (legend) legend.textContent = bytes(size);
  }
}

const PHASES = { preparing: "preparing the prompt", loading: "waiting for the model", waiting: "waiting", prefill: "reading the prompt", decode: "answering" };

function workingRow({ id, model }) {
  const cancel = make("button", { type: "button", className: "quiet", title: "End this request" }, "Cancel");
  cancel.setAttribute("aria-label", `Cancel the request to ${model}`);
  cancel.onclick = () => {
    cancel.disabled = true;
    call(`activity/${id}`, { method: "DELETE" }).catch(() => (cancel.disabled = false));
  };
  const head = make("div", { className: "head" }, make("b", {}, model), make("span", { className: "api" }), cancel);
  return make("li", {}, head, make("p", { className: "phase" }), make("progress", { max: 1 }), make("p", { className: "figures" }));
}

function updateWorking(row, request) {
  const { phase, prompt_tokens: prompt, read_tokens: read, seconds_left: left } = request;
  row.className = phase;
  row.querySelector(".api").textContent = `${request.dialect} ${request.route}`;
  const progress = phase === "prefill" ? ` ${share(read, prompt)}${left == null ? "" : `, ${seconds(left)} left`}` : "";
  row.querySelector(".phase").textContent = `${PHASES[phase]}${progress}`;
  const bar = row.querySelector("progress");
  bar.hidden = phase !== "prefill";
  bar.value = prompt ? read / prompt : 0;
  bar.setAttribute("aria-label", "Prompt read");
  const figures = [`for ${seconds(request.seconds)}`];
  if (prompt) figures.push(`prompt ${count(prompt)}`, `reused ${share(request.cached_tokens, prompt)}`);
  if (request.completion_tokens) figures.push(`written ${count(request.completion_tokens)}`);
  if (request.tokens_per_second) figures.push(`${rate(request.tokens_per_second)} tokens/s`);
  if (request.tokens_per_pass) figures.push(`${request.tokens_per_pass.toFixed(1)} tokens a pass`);
  if (request.first_token_seconds != null) figures.push(`first token after ${seconds(request.first_token_seconds)}`);
  if (request.priority && request.priority !== "normal") figures.push(`${request.priority} priority`);
  row.querySelector(".figures").textContent = figures.join(" · ");
}

function recentRow(request) {
  const cells = {
    Time: clock(request.time),
    Model: request.model,
    API: request.route,
    Prompt: count(request.prompt_tokens),
    Reused: share(request.cached_tokens ?? 0, request.prompt_tokens),
    Written: count(request.completion_tokens),
    "First token": seconds(request.first_token_seconds),
    "Tokens/s": rate(request.tokens_per_second),
    End: request.ending ?? "done",
  };
  return make("tr", {}, ...Object.entries(cells).map(([name, text]) => {
    const cell = make("td", {}, text ?? "–");
    cell.dataset.name = name;
    return cell;
  }));
}

function missRow({ at, message, role, was, now }) {
  const where = message == null ? "the prompt" : `message ${message} (${role})`;
  const words = [`parts from the cached prompt at token ${count(at)}, in ${where}: `, make("q", {}, now), " was ", make("q", {}, was)];
  return make("tr", { className: "miss" }, make("td", { colSpan: 9 }, ...words));
}

const CHARTS = [["generated", 1], ["prefilled", 2], ["reused", 3]];

function showCharts({ seconds: interval, samples }) {
  const last = samples.at(-1);
  if ($("charts").last === `${last}`) return;
  $("charts").last = `${last}`;
  $("charts").replaceChildren(...CHARTS.map(([name, at]) => {
    const most = Math.max(...samples.map((sample) => sample[at]), 0);
    const path = samples.map((sample) => {
      const x = WINDOW - (last[0] - sample[0]);
      const height = most ? (30 * sample[at]) / most : 0;
      return `M${(x - interval).toFixed(1)},32v${(-height).toFixed(1)}h${interval}v${height.toFixed(1)}z`;
    }).join("");
    const figure = make("figure", { className: name });
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${WINDOW} 32`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    svg.append(document.createElementNS(svg.namespaceURI, "path"));
    svg.firstChild.setAttribute("d", path);
    figure.append(make("figcaption", {}, name, make("span", {}, `now ${rate(last?.[at] ?? 0)}, most ${rate(most)}`)), svg);
    return figure;
  }));
}

// ---------------------------------------------------------------- models

async function listModels() {
  const answer = await call("api/tags");
  models = (await answer.json()).models.map((model) => ({ ...model, name: plain(model.name) }));
  list($("installed"), models, (model) => model.name, modelRow);
  const chosen = $("model").value || localStorage.getItem("model");
  const chatting = models.filter((model) => model.capabilities?.includes("completion") ?? true);
  $("model").replaceChildren(...chatting.map(({ name }) => make("option", {}, name)));
  if (chatting.some(({ name }) => name === chosen)) $("model").value = chosen;
  else $("model").awaitsDefault = true;
  choose();
}

function modelRow({ name, size, details, capabilities = [] }) {
  const context = details?.context_length;
  const about = [size && bytes(size), details?.quantization_level, context && `${count(context)} tokens`, ...capabilities.filter((one) => one !== "completion")];
  const load = make("button", { type: "button", className: "load" }, "Load");
  const remove = make("button", { type: "button", className: "quiet danger" }, "Delete");
  remove.setAttribute("aria-label", `Delete ${name}`);
  load.onclick = () => during(load, async () => {
    const unload = load.textContent === "Unload";
    await (await post("api/generate", { model: name, ...(unload ? { keep_alive: 0 } : {}) })).arrayBuffer();
  });
  remove.onclick = async () => {
    if (!(await sure(`Delete ${name} (${bytes(size ?? 0)}) from this machine's disk?`, "Delete it"))) return;
    if (!(await sure(`Really delete ${name}? Only another download brings it back.`, "Really delete it"))) return;
    await during(remove, () => call("api/delete", { method: "DELETE", body: { model: name } }));
    await listModels();
  };
  return make("li", {}, make("div", {}, make("b", {}, name), " ", make("small", { className: "state" })), make("p", { className: "figures" }, about.filter(Boolean).join(" · ")), make("div", { className: "buttons" }, load, remove));
}

/** Runs something that a button has begun; what fails is shown. */
async function during(button, work) {
  button.disabled = true;
  $("models-note").textContent = "";
  await work().catch((error) => ($("models-note").textContent = error.message));
  button.disabled = false;
  look();
}

/** Asks; resolves to whether the answer is yes. */
function sure(text, yes) {
  const dialog = $("question"), [keep, act] = dialog.querySelectorAll("button");
  $("question-text").textContent = text;
  act.textContent = yes;
  dialog.showModal();
  return new Promise((resolve) => {
    const close = (answer) => { resolve(answer); dialog.close(); };
    keep.onclick = () => close(false);
    dialog.querySelector("form").onsubmit = (event) => { event.preventDefault(); close(true); };
    dialog.oncancel = () => resolve(false);
  });
}

function showLoaded({ loaded, default: usual }) {
  const inMemory = new Map(loaded.map((model) => [model.name, model]));
  for (const [name, row] of $("installed").shown ?? []) {
    const here = inMemory.get(name);
    const expires = here?.expires ? `, for ${seconds(Math.max(0, here.expires - Date.now() / 1000))}` : "";
    const state = here ? `in memory, ${bytes(here.memory)}${expires}` : "";
    row.querySelector(".state").textContent = [name === usual ? "default" : "", state].filter(Boolean).join(", ");
    row.classList.toggle("loaded", Boolean(here));
    row.querySelector(".load").textContent = here ? "Unload" : "Load";
  }
  if ($("model").awaitsDefault && usual) {
    $("model").awaitsDefault = false;
    if ([...$("model").options].some(({ value }) => value === usual)) $("model").value = usual;
    choose();
  }
}

$("pull").onsubmit = async (event) => {
  event.preventDefault();
  const name = $("pull-name").value.trim(), stop = new AbortController();
  const bar = $("pulling").querySelector("progress"), files = new Map();
  $("pulling").querySelector("button").onclick = () => stop.abort();
  $("pulling").hidden = false;
  $("pull-status").textContent = `${name}: asking the hub`;
  bar.removeAttribute("value");
  await during($("pull").querySelector("button"), async () => {
    const answer = await post("api/pull", { model: name }, { signal: stop.signal });
    for await (const { status, digest, total, completed = 0 } of lines(answer)) {
      if (digest) files.set(digest, [completed, total]);
      const [done, all] = [...files.values()].reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
      if (all) bar.value = done / all;
      $("pull-status").textContent = `${name}: ${digest ? `${bytes(done)} of ${bytes(all)}` : status}`;
    }
    $("pull-name").value = "";
  });
  if (stop.signal.aborted) $("models-note").textContent = `${name}: stopped; another pull goes on from there`;
  $("pulling").hidden = true;
  await listModels();
};

// ---------------------------------------------------------------- chat

let messages = [], images = [], going = null;

const sees = () => models.find(({ name }) => name === $("model").value)?.capabilities?.includes("vision");

/** Follows the choice of a model. */
function choose() {
  const name = $("model").value;
  $("attach").hidden = !sees();
  const model = models.find((one) => one.name === name), context = model?.details?.context_length;
  const word = /^[\w./:@-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`;
  $("claude-line").textContent = [
    `ANTHROPIC_BASE_URL=${new URL(".", location).href.replace(/\/$/, "")}`,
    `ANTHROPIC_AUTH_TOKEN=${key ? "YOUR_KEY" : "mlx"} ANTHROPIC_API_KEY=`,
    ...(Number.isInteger(context) ? [`CLAUDE_CODE_MAX_CONTEXT_TOKENS=${context}`] : []),
    `claude --model ${word}`,
  ].join(" ");
}

$("model").onchange = () => { localStorage.setItem("model", $("model").value); choose(); };

$("claude").querySelector("button").onclick = async ({ target }) => {
  getSelection().selectAllChildren($("claude-line")); // where no clipboard is to be had, for the keys
  await navigator.clipboard?.writeText($("claude-line").textContent);
  target.textContent = navigator.clipboard ? "Copied" : "Selected";
  setTimeout(() => (target.textContent = "Copy"), 2000);
};

function addImages(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/"));
  if (!pictures.length) return;
  $("chat-note").textContent = sees() ? "" : `${$("model").value} cannot see images`;
  if (!sees()) return;
  for (const file of pictures) {
    const reader = new FileReader();
    reader.onload = () => { images.push(reader.result); showImages(); };
    reader.readAsDataURL(file);
  }
}

function showImages() {
  $("images").replaceChildren(...images.map((src, at) => {
    const drop = make("button", { type: "button", className: "quiet" }, "Remove");
    drop.setAttribute("aria-label", `Remove image ${at + 1}`);
    drop.onclick = () => { images.splice(at, 1); showImages(); };
    return make("li", {}, make("img", { src, alt: `image ${at + 1}` }), drop);
  }));
}

$("attach").querySelector("input").onchange = ({ target }) => { addImages(target.files); target.value = ""; };
$("prompt").onpaste = (event) => addImages(event.clipboardData.files);
$("chat").ondragover = (event) => event.preventDefault();
$("chat").ondrop = (event) => { event.preventDefault(); addImages(event.dataTransfer.files); };
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};
$("stop").onclick = () => going?.abort();
$("new-chat").onclick = () => {
  going?.abort();
  messages = [];
  $("talk").replaceChildren();
  $("prompt").focus();
};

/** Adds to the conversation and stays at its end, if that was in view. */
function talk(change) {
  const box = $("talk"), atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

$("ask").onsubmit = async (event) => {
  event.preventDefault();
  const content = $("prompt").value.trim();
  if (going || !(content || images.length)) return;
  const asked = { role: "user", content, ...(images.length ? { images: images.map((src) => src.replace(/^.*?,/, "")) } : {}) };
  talk(() => $("talk").append(make("article", { className: "user" }, ...images.map((src, at) => make("img", { src, alt: `image ${at + 1}` })), make("p", {}, content))));
  $("prompt").value = $("chat-note").textContent = "";
  images = [];
  showImages();
  await answer($("model").value, [...messages, asked]);
};

/** Shows the answer to a conversation as it comes. */
async function answer(model, conversation) {
  const thought = make("details", { hidden: true }, make("summary"), make("div")), text = make("div", { className: "text" });
  const figures = make("p", { className: "figures" }, "…"), said = { role: "assistant", content: "", thinking: "" };
  const mine = messages = [...conversation, said];
  const begun = performance.now(), stop = going = new AbortController();
  let first, drawn = 0, last = {}, reused;
  const draw = () => talk(() => {
    drawn = performance.now();
    thought.hidden = !said.thinking;
    thought.firstChild.textContent = said.content || last.done ? "Thought" : "Thinking …";
    thought.lastChild.replaceChildren(...markdown(said.thinking));
    text.replaceChildren(...markdown(said.content));
  });
  talk(() => $("talk").append(make("article", { className: "assistant" }, thought, text, figures)));
  [$("stop").hidden, $("send").hidden] = [false, true];
  try {
    const response = await post("api/chat", { model, messages: conversation }, { signal: stop.signal });
    reused = /reused=(\d+)/.exec(response.headers.get("x-prompt-cache"))?.[1];
    for await (last of lines(response)) {
      const { content = "", thinking = "" } = last.message ?? {};
      if (content || thinking) first ??= performance.now() - begun;
      said.content += content;
      said.thinking += thinking;
      if (performance.now() - drawn > 100) draw();
    }
    figures.textContent = summary(model, last, first, reused);
  } catch (error) {
    figures.textContent = stop.signal.aborted ? "stopped" : error instanceof TypeError ? "the connection was lost" : error.message;
    figures.classList.toggle("trouble", !stop.signal.aborted);
    if (!said.content && messages === mine) messages = conversation.slice(0, -1);
  }
  draw();
  if (!said.thinking) delete said.thinking;
  going = null;
  [$("stop").hidden, $("send").hidden] = [true, false];
}

function summary(model, { prompt_eval_count: prompt, eval_count: written, eval_duration: time, done_reason: end }, first, reused) {
  const parts = [model, `prompt ${count(prompt)}`, reused && `reused ${share(reused, prompt)}`, `written ${count(written)}`];
  if (time) parts.push(`${rate((written * 1e9) / time)} tokens/s`);
  if (first) parts.push(`first token after ${seconds(first / 1000)}`);
  if (end === "length") parts.push("cut at the limit");
  return parts.filter(Boolean).join(" · ");
}

look();
