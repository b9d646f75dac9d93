// Reads the server's metrics each second and shows the last five minutes of them.

import { Chart } from "./chart.js";
import { byId, el } from "./dom.js";
import { byLabel, growth, parse, quantile, total } from "./prometheus.js";

const EVERY_MS = 1000;
// A server that takes longer is told to be silent.
const ANSWER_MS = 5000;
const SPAN_S = 300;
const RATE_S = 10;
const WINDOW_S = 60;
const SHARES = [0.5, 0.95, 0.99];
const QUANTILES = ["p50", "p95", "p99"];

const short = (value) => (value >= 10000 ? `${(value / 1000).toFixed(value >= 100000 ? 0 : 1)}k` : `${+value.toFixed(value < 10 ? 1 : 0)}`);
const whole = (value) => `${+value.toFixed(value % 1 ? 1 : 0)}`;
const percent = (value) => `${+(value * 100).toFixed(value < 0.1 ? 1 : 0)} %`;
const time = (value) => (value < 1 ? `${+(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${+value.toFixed(value < 10 ? 2 : 0)} s`);

const CHARTS = [
  {
    title: "Requests",
    series: ["running", "waiting"],
    format: whole,
    least: 4,
    values: (now) => [total(now.reading, "vllm:num_requests_running"), total(now.reading, "vllm:num_requests_waiting")],
  },
  {
    title: "Tokens per second",
    series: ["prompt", "generation"],
    format: short,
    least: 10,
    values: (now) => ["prompt", "generation"].map((kind) => rate(now, `vllm:${kind}_tokens_total`)),
  },
  {
    title: "Cache",
    series: ["KV cache in use", "prefix hits"],
    format: percent,
    least: 1,
    most: 1,
    values: (now) => [total(now.reading, "vllm:kv_cache_usage_perc"), hitRate(now)],
  },
  {
    title: "Time to first token",
    series: QUANTILES,
    format: time,
    least: 0.01,
    values: (now) => quantiles(now, "vllm:time_to_first_token_seconds"),
  },
  {
    title: "Time between tokens",
    series: QUANTILES,
    format: time,
    least: 0.01,
    values: (now) => quantiles(now, "vllm:inter_token_latency_seconds"),
  },
].map((chart) => ({ ...chart, chart: new Chart(chart) }));

/** Readings of the last minutes, `{at, reading, values}`, oldest first; `values` has the lines' points, chart by chart. */
let history = [];
let paused = false;

/** The newest reading that is at least so old, else the oldest. */
const before = (at, seconds) => history.findLast((entry) => entry.at <= at - seconds) ?? history[0];

function rate(now, name) {
  const old = before(now.at, RATE_S);
  return old && old.at < now.at ? growth(old.reading, now.reading, name) / (now.at - old.at) : null;
}

function hitRate(now) {
  const old = before(now.at, WINDOW_S);
  const asked = old ? growth(old.reading, now.reading, "vllm:prefix_cache_queries_total") : 0;
  return asked > 0 ? growth(old.reading, now.reading, "vllm:prefix_cache_hits_total") / asked : null;
}

function quantiles(now, name) {
  const old = before(now.at, WINDOW_S);
  return SHARES.map((share) => (old ? quantile(old.reading, now.reading, name, share) : null));
}

function add(reading) {
  const now = { at: performance.now() / 1000, reading };
  const last = history.at(-1);
  // A counter that fell belongs to a server that was started anew.
  if (last && growth(last.reading, reading, "vllm:prompt_tokens_total") < 0) history = [];
  now.values = CHARTS.map((chart) => chart.values(now));
  history.push(now);
  history = history.filter((entry) => entry.at >= now.at - SPAN_S);
}

function draw() {
  const now = history.at(-1);
  if (!now) return;
  const times = history.map((entry) => now.at - entry.at);
  CHARTS.forEach(({ chart, series }, at) => {
    const lines = series.map((_, line) => history.map((entry) => entry.values[at][line]));
    chart.draw(times, lines, SPAN_S);
  });
  fill("numbers", CHARTS.flatMap(({ title, series, chart }, at) => series.map((name, line) => [`${title}: ${name}`, chart.written(now.values[at][line])])));
  fill("finished", finished(now));
}

/** Ended requests by reason: all, and those of the last minute. */
function finished(now) {
  const name = "vllm:request_success_total";
  const old = byLabel((before(now.at, WINDOW_S) ?? now).reading, name, "finished_reason");
  const rows = [...byLabel(now.reading, name, "finished_reason")].sort();
  return rows.map(([reason, count]) => [reason, whole(count - (old.get(reason) ?? 0)), whole(count)]);
}

function fill(table, rows) {
  const row = ([name, ...values]) => el("tr", {}, el("th", { scope: "row" }, name), ...values.map((value) => el("td", {}, value)));
  byId(table).tBodies[0].replaceChildren(...(rows.length ? rows : [["none yet", "0", "0"]]).map(row));
}

/** What is read aloud changes only when the state does. */
function say(message, isBad) {
  const state = byId("state");
  if (state.textContent !== message) state.textContent = message;
  state.classList.toggle("bad", isBad);
}

async function poll() {
  if (!paused) {
    try {
      const response = await fetch(new URL("metrics", document.baseURI), {
        cache: "no-store",
        signal: AbortSignal.timeout(ANSWER_MS),
      });
      if (!response.ok) throw new Error(`status ${response.status}`);
      add(parse(await response.text()));
      draw();
      if (!paused) say("Live", false);
    } catch {
      if (!paused) say(`No answer from the server since ${since()}`, true);
    }
  }
  setTimeout(poll, EVERY_MS);
}

let failedAt = null;
function since() {
  if (!byId("state").classList.contains("bad")) failedAt = new Date().toLocaleTimeString();
  return failedAt;
}

byId("ends").before(...CHARTS.map(({ chart }) => chart.node));
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", paused);
  if (paused) say("Paused", false);
});
addEventListener("resize", draw);
poll();
