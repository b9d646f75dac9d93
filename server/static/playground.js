// The conversation: what is asked, what comes back, and what may be done with it.

import { Problem, address, chatEvents, modelNames } from "./api.js";
import { connectComposer, draft, picturesRead, readPicture, setDraft, thumbnail } from "./composer.js";
import { byId, el } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { apiKey, chosenFields, connectSettings, show as showSettings, systemPrompt } from "./settings.js";
import { asCurl, asPython, copy } from "./snippets.js";

// Answers are drawn at most so often: screens need no more, and long ones take time.
const DRAW_MS = 50;
// How near to its end the conversation must be to follow what is written.
const NEAR_PX = 80;
const EMPTY = { text: "", pictures: [] };

/** The messages of the conversation: `{role, text, node}`, of the user with `pictures`. */
let turns = [];
/** The one that is being edited. */
let edited = null;
/** What was being written before. */
let kept = EMPTY;
/** Whether the end of the conversation is kept in view, as long as nobody scrolls away from it. */
let following = true;
/** Stops the answer that is being written. */
let running = null;

const chat = byId("chat");
const text = byId("message");
const scroller = byId("scroller");

// ---- asking

/** Send what was written, or a message that is ready. */
async function send(ready = null) {
  if (!ready) await picturesRead();
  const message = ready ?? draft();
  if (running || (!message.text && !message.pictures.length)) return;
  const fields = fieldsOrComplaint();
  if (!fields) return;
  if (edited && !ready) cutBefore(edited);
  if (edited || !ready) setDraft(edited ? kept : EMPTY);
  stopEditing();
  addTurn({ role: "user", ...message });
  text.focus();
  await answer(fields);
}

/** Let the model answer what was said so far. */
async function answer(fields) {
  const model = byId("model").value;
  const request = {
    ...(model ? { model } : {}),
    messages: messages(),
    stream: true,
    stream_options: { include_usage: true },
    ...fields,
  };
  const turn = addTurn({ role: "assistant", text: "", request, needsKey: apiKey() !== "" });
  const control = new AbortController();
  setRunning(control);
  turn.node.setAttribute("aria-busy", "true");
  turn.started = performance.now();
  try {
    // The usage so far in each event: so it is known of an answer that is stopped, too.
    const watched = { ...request, stream_options: { include_usage: true, continuous_usage_stats: true } };
    for await (const event of chatEvents(watched, apiKey(), control.signal)) take(turn, event);
  } catch (error) {
    if (control.signal.aborted) turn.finish = "stopped";
    else turn.error = error;
  }
  setRunning(null);
  draw(turn);
  showEnd(turn);
  turn.node.setAttribute("aria-busy", "false");
}

function take(turn, event) {
  const [choice] = event.choices;
  turn.usage = event.usage ?? turn.usage;
  turn.finish = choice?.finish_reason ?? turn.finish;
  turn.model = event.model ?? turn.model;
  const more = choice?.delta.content;
  // Not every token makes a text of its own: some wait for others, and the last one may have none.
  const made = event.usage?.completion_tokens ?? (turn.made ?? 0) + (more ? 1 : 0);
  if (made > (turn.made ?? 0)) {
    turn.last = performance.now();
    turn.first ??= turn.last;
    turn.madeAtFirst ??= made;
    turn.made = made;
  }
  if (!more) return;
  turn.text += more;
  turn.timer ??= setTimeout(() => draw(turn), DRAW_MS);
}

/**
 * The conversation as the API takes it. A question that got no answer is left out, since most models' templates want
 * questions and answers in turns; the newest one is what is asked.
 */
function messages() {
  const system = systemPrompt();
  const isAnswered = (at) => at === turns.length - 1 || turns[at + 1].text !== "";
  const said = turns.filter((turn, at) => (turn.role === "user" ? isAnswered(at) : turn.text !== ""));
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...said.map((turn) => ({ role: turn.role, content: content(turn) })),
  ];
}

function content(turn) {
  if (!turn.pictures?.length) return turn.text;
  const parts = turn.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
  return turn.text ? [...parts, { type: "text", text: turn.text }] : parts;
}

function stop() {
  running?.abort();
}

function setRunning(control) {
  running = control;
  byId("stop").hidden = control === null;
  byId("send").hidden = control !== null;
  for (const button of chat.querySelectorAll(".acts-on-chat")) button.disabled = control !== null;
}

// ---- showing

function addTurn(turn) {
  turn.node = turn.role === "user" ? question(turn) : reply(turn);
  turns.push(turn);
  chat.append(turn.node);
  byId("welcome").hidden = true;
  following = true;
  follow();
  return turn;
}

const action = (label, title, click) => el("button", { type: "button", class: "link", title, click }, label);

function question(turn) {
  const edit = action("Edit", "Change this message and send it again", () => startEditing(turn));
  edit.classList.add("acts-on-chat");
  return el(
    "article",
    { class: "question", "aria-label": "You" },
    ...(turn.pictures.length ? [el("div", { class: "thumbnails" }, ...turn.pictures.map(thumbnail))] : []),
    ...(turn.text ? [el("p", {}, turn.text)] : []),
    el("footer", {}, edit),
  );
}

function reply(turn) {
  turn.bodyNode = el("div", { class: "markdown" }, el("span", { class: "waiting" }, "…"));
  turn.footer = el("footer");
  return el("article", { class: "answer", "aria-label": "Answer" }, turn.bodyNode, turn.footer);
}

function draw(turn) {
  clearTimeout(turn.timer);
  turn.timer = null;
  if (turn.text || !running) turn.bodyNode.replaceChildren(renderMarkdown(turn.text));
  turn.footer.replaceChildren(statistics(turn));
  follow();
}

function follow() {
  if (following && turns.length) scroller.scrollTop = scroller.scrollHeight;
}

/** What is known of an answer once nothing more comes. */
function showEnd(turn) {
  if (turn.error) {
    const { status, message } = turn.error;
    const title = status ? `The server refused the request (${status})` : "There is no whole answer";
    turn.footer.before(el("div", { class: "error", role: "alert" }, el("strong", {}, title), el("p", {}, message)));
    if (status === 401) askForKey();
  }
  if (!turn.text) turn.footer.append(el("span", {}, "This question is left out of what follows."));
  turn.footer.append(actions(turn));
  follow();
}

function actions(turn) {
  const base = address("v1");
  const again = action("Try again", "Ask for another answer", () => answerAgain(turn));
  again.classList.add("acts-on-chat", "again");
  const request = { ...(turn.model ? { model: turn.model } : {}), ...turn.request };
  return el(
    "span",
    { class: "actions" },
    ...(turn.text ? [copyAction("Copy", "Copy the answer", () => turn.text.trim())] : []),
    copyAction("curl", "Copy this request as a curl command", () => asCurl(`${base}/chat/completions`, request, turn.needsKey)),
    copyAction("Python", "Copy this request as a Python program", () => asPython(base, request, turn.needsKey)),
    again,
  );
}

function copyAction(label, title, make) {
  const button = action(label, title, async () => {
    try {
      await copy(make());
    } catch (error) {
      complain(`Nothing was copied: ${error.message}`);
      return;
    }
    tell(`${label}: copied`);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  button.setAttribute("aria-label", title);
  return button;
}

function statistics(turn) {
  const shown = [];
  const { prompt_tokens: prompt, completion_tokens: made, prompt_tokens_details: details } = turn.usage ?? {};
  if (prompt !== undefined) {
    const cached = details?.cached_tokens;
    shown.push(`${prompt} prompt tokens${cached ? ` (${cached} cached)` : ""}`, `${made} answer tokens`);
  }
  if (turn.first) shown.push(`first after ${seconds(turn.first - turn.started)}`);
  if (turn.made > turn.madeAtFirst) {
    shown.push(`${Math.round(((turn.made - turn.madeAtFirst) / (turn.last - turn.first)) * 1000)} tokens/s`);
  }
  if (turn.finish === "stopped") shown.push("stopped");
  if (turn.finish === "length") shown.push("cut off: no more tokens were allowed");
  return el("span", { class: "statistics" }, ...shown.map((one) => el("span", {}, one)));
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** For screen readers. */
function tell(message) {
  byId("status").textContent = message;
}

/** For everyone. */
function complain(message) {
  const notice = byId("notice");
  notice.textContent = message;
  notice.hidden = !message;
}

// ---- changing what was said

function cutBefore(turn) {
  const at = turns.indexOf(turn);
  for (const gone of turns.slice(at)) gone.node.remove();
  turns = turns.slice(0, at);
}

function startEditing(turn) {
  if (!edited) kept = draft();
  stopEditing();
  edited = turn;
  turn.node.classList.add("edited");
  byId("editing").hidden = false;
  setDraft(turn);
  text.focus();
}

function stopEditing() {
  edited?.node.classList.remove("edited");
  edited = null;
  byId("editing").hidden = true;
}

/** The fields of the request that the settings make; null, and what is wrong is shown, where they are no such thing. */
function fieldsOrComplaint() {
  complain("");
  try {
    return chosenFields();
  } catch (error) {
    complain(error.message);
    return null;
  }
}

function cancelEditing() {
  stopEditing();
  setDraft(kept);
  text.focus();
}

async function answerAgain(turn) {
  const fields = fieldsOrComplaint();
  if (!fields) return;
  if (edited) setDraft(kept);
  stopEditing();
  cutBefore(turn);
  text.focus();
  await answer(fields);
}

function newChat() {
  stop();
  stopEditing();
  complain("");
  turns = [];
  chat.replaceChildren();
  setDraft(EMPTY);
  byId("welcome").hidden = false;
  tell("New chat");
  text.focus();
}

// ---- the start

function askForKey() {
  complain("This server asks for an API key: it goes into the settings.");
  showSettings(true);
  byId("key").focus();
}

async function loadModels() {
  const select = byId("model");
  try {
    const names = await modelNames(apiKey());
    const before = select.value;
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(before)) select.value = before;
    complain("");
  } catch (error) {
    if (error.status === 401) askForKey();
    else complain(error.message);
  }
}

async function loadSamples() {
  const response = await fetch(address("playground/samples.json"));
  const samples = response.ok ? await response.json() : [];
  const list = byId("samples");
  list.hidden = samples.length === 0;
  list.replaceChildren(...samples.map((sample) => el("li", {}, sampleButton(sample))));
}

function sampleButton({ file, question }) {
  const source = address(`playground/samples/${file}`);
  const ask = async () => {
    let picture;
    try {
      const response = await fetch(source);
      if (!response.ok) throw new Error(`status ${response.status}`);
      const blob = await response.blob();
      picture = await readPicture(new File([blob], file, { type: blob.type }));
    } catch (error) {
      complain(`The sample cannot be loaded: ${error.message}`);
      return;
    }
    await send({ text: question, pictures: [picture] });
  };
  return el("button", { type: "button", click: ask }, el("img", { src: source, alt: "" }), el("span", {}, question));
}

function onKey(event) {
  if (event.isComposing || event.keyCode === 229) return; // an input method's own keys; 229 as Safari tells them
  if (event.key === "Escape" && !event.defaultPrevented) {
    if (running) stop();
    else if (edited) cancelEditing();
  }
  if (event.key !== "Enter" || event.target !== text) return;
  // On a phone Enter is the only way to begin a line.
  const plain = !event.shiftKey && !event.altKey && matchMedia("(pointer: fine)").matches;
  if (!event.ctrlKey && !event.metaKey && !plain) return;
  event.preventDefault();
  send();
}

connectComposer(tell, complain);
connectSettings();
document.addEventListener("keydown", onKey);
scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_PX;
});
// What is written below, the settings beside it and a phone's keyboard take room from the conversation.
new ResizeObserver(follow).observe(scroller);
byId("send").addEventListener("click", () => send());
byId("stop").addEventListener("click", () => {
  stop();
  text.focus();
});
byId("new-chat").addEventListener("click", newChat);
byId("cancel-edit").addEventListener("click", cancelEditing);
byId("key").addEventListener("change", loadModels);
await Promise.allSettled([loadModels(), loadSamples()]);
