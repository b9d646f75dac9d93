// The panel of settings, and what it adds to a request.

import { Problem } from "./api.js";
import { byId } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export const apiKey = () => byId("key").value.trim();

export const systemPrompt = () => byId("system").value.trim();

/** The fields that were filled in. */
export function chosenFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const number = numberOf(byId(name));
    if (number !== null) fields[name] = number;
  }
  const stop = byId("stop-strings").value.split("\n").filter((line) => line !== "");
  if (stop.length) fields.stop = stop;
  const schema = byId("schema").value.trim();
  if (schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed(schema) } };
  return fields;
}

const panel = byId("settings");
/** Where the panel covers the page. */
const narrow = matchMedia("(max-width: 800px)");

/** Show or hide the panel; the focus goes along. */
export function connectSettings() {
  const toggle = byId("settings-toggle");
  const close = () => {
    show(false);
    toggle.focus();
  };
  toggle.addEventListener("click", () => {
    show(panel.hidden);
    if (!panel.hidden) byId("settings-close").focus();
  });
  byId("settings-close").addEventListener("click", close);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || event.defaultPrevented || panel.hidden) return;
    if (!narrow.matches && !panel.contains(event.target)) return;
    event.preventDefault();
    close();
  });
  narrow.addEventListener("change", cover);
}

export function show(visible) {
  panel.hidden = !visible;
  byId("settings-toggle").setAttribute("aria-expanded", visible);
  cover();
}

/** What lies below the panel cannot be reached. */
function cover() {
  for (const part of document.querySelectorAll("header, main")) part.inert = !panel.hidden && narrow.matches;
}

function numberOf(input) {
  const label = document.querySelector(`label[for="${input.id}"]`).textContent;
  if (input.validity.badInput) throw new Problem(`${label}: this is no number.`);
  return input.value === "" ? null : Number(input.value);
}

function parsed(schema) {
  try {
    return JSON.parse(schema);
  } catch (error) {
    throw new Problem(`The JSON schema is no JSON: ${error.message}`);
  }
}
