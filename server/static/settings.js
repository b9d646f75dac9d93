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

/** Show or hide the panel; the focus goes along. */
export function connectSettings() {
  const panel = byId("settings");
  const toggle = byId("settings-toggle");
  const close = () => {
    show(false);
    toggle.focus();
  };
  toggle.addEventListener("click", () => show(panel.hidden));
  byId("settings-close").addEventListener("click", close);
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    event.preventDefault();
    close();
  });
}

export function show(visible) {
  byId("settings").hidden = !visible;
  byId("settings-toggle").setAttribute("aria-expanded", visible);
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
