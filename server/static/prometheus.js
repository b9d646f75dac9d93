// Prometheus's text, and what is made of two readings of it.

const SAMPLE = /^([\w:]+)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** A reading: for each name a list of `{labels, value}`. */
export function parse(text) {
  const reading = new Map();
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries([...(found[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
    if (!reading.has(found[1])) reading.set(found[1], []);
    reading.get(found[1]).push({ labels, value: number(found[3]) });
  }
  return reading;
}

const number = (text) => ({ "+Inf": Infinity, "-Inf": -Infinity })[text] ?? Number(text);

/** The sum of a name's samples; 0 where there are none yet. */
export const total = (reading, name) => (reading.get(name) ?? []).reduce((sum, { value }) => sum + value, 0);

/** The sums of a name's samples by one label. */
export function byLabel(reading, name, label) {
  const sums = new Map();
  for (const { labels, value } of reading.get(name) ?? []) sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
  return sums;
}

/** By how much a counter grew. */
export const growth = (before, after, name) => total(after, name) - total(before, name);

/** A quantile of what a histogram took in between two readings, straight lines between its bounds; null of nothing. */
export function quantile(before, after, name, share) {
  const old = byLabel(before, `${name}_bucket`, "le");
  const buckets = [...byLabel(after, `${name}_bucket`, "le")]
    .map(([bound, count]) => [number(bound), count - (old.get(bound) ?? 0)])
    .sort(([one], [other]) => one - other);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  const rank = share * all;
  const at = buckets.findIndex(([, count]) => count >= rank);
  const [low, below] = at ? buckets[at - 1] : [0, 0];
  const [high, count] = buckets[at];
  if (high === Infinity) return low; // all that is known is that it is more
  return low + ((high - low) * (rank - below)) / (count - below);
}
