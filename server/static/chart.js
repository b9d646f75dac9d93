// Line charts of the last minutes.

import { el, svg } from "./dom.js";

const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 24;

/**
 * A chart with a legend that tells the newest values.
 *
 * `series` are names; `format` writes a value; `least` is the least that the axis reaches to.
 */
export class Chart {
  constructor({ title, series, format, least, most = Infinity }) {
    this.format = format;
    this.least = least;
    this.most = most;
    this.title = title;
    this.values = series.map(() => el("dd", {}, "–"));
    const entry = (name, at) => el("div", { class: `series-${at + 1}` }, el("dt", {}, name), this.values[at]);
    this.plot = svg("svg", { class: "plot", role: "img" });
    this.series = series;
    this.node = el("section", { class: "card" }, el("h2", {}, title), el("dl", { class: "legend" }, ...series.map(entry)), this.plot);
  }

  /** Draw `lines`, for each series a list of values or nulls at `times`, which are seconds before now. */
  draw(times, lines, span) {
    const { clientWidth: width, clientHeight: height } = this.plot;
    const highest = Math.max(this.least, ...lines.flat().filter((value) => value !== null));
    const step = niceStep(highest / 3);
    const top = Math.min(this.most, Math.ceil(highest / step - 1e-9) * step);
    const x = (time) => width - RIGHT - (time / span) * (width - LEFT - RIGHT);
    const y = (value) => height - BOTTOM - (value / top) * (height - TOP - BOTTOM);
    const grid = [];
    for (let value = 0; value <= top + step / 2; value += step) {
      grid.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      grid.push(svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, this.format(value)));
    }
    const minutes = [...Array(span / 60 + 1).keys()].map((minute) =>
      svg("text", { x: x(minute * 60), y: height - 4, "text-anchor": minute ? "middle" : "end" }, minute ? `−${minute} min` : "now"),
    );
    this.plot.replaceChildren(...grid, ...minutes, ...lines.flatMap((values, at) => drawLine(times, values, at, x, y)));
    lines.forEach((values, at) => (this.values[at].textContent = this.written(values.at(-1))));
    const told = this.series.map((name, at) => `${name} ${this.values[at].textContent}`);
    this.plot.setAttribute("aria-label", `${this.title} over the last ${span / 60} minutes; now ${told.join(", ")}`);
  }

  written(value) {
    return value === null || value === undefined ? "–" : this.format(value);
  }
}

/** A line, broken where there is no value; its end is marked. */
function drawLine(times, values, at, x, y) {
  const pieces = [[]];
  values.forEach((value, index) => {
    if (value === null) pieces.push([]);
    else pieces.at(-1).push(`${x(times[index]).toFixed(1)},${y(value).toFixed(1)}`);
  });
  const attributes = { class: `series-${at + 1}` };
  const drawn = pieces.filter((piece) => piece.length > 1).map((piece) => svg("polyline", { ...attributes, points: piece.join(" ") }));
  const [cx, cy] = pieces.at(-1).at(-1)?.split(",") ?? [];
  return cx === undefined ? drawn : [...drawn, svg("circle", { ...attributes, cx, cy, r: 3 })];
}

/** The next of 1, 2 and 5 times a power of ten. */
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least * (1 - 1e-9));
}
