// Prometheus' text format, and figures of the time between two readings of it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** Parses a text into a map from name to `[{ labels, value }]`. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (match === null) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
    }
    if (!samples.has(match[1])) samples.set(match[1], []);
    samples.get(match[1]).push({ labels, value: match[3] === "+Inf" ? Infinity : Number(match[3]) });
  }
  return samples;
}

/** The samples of a metric whose labels hold `wanted`. */
export function select(samples, name, wanted = {}) {
  const keys = Object.keys(wanted);
  return (samples.get(name) ?? []).filter(({ labels }) => keys.every((key) => labels[key] === wanted[key]));
}

export const total = (samples, name, wanted) =>
  select(samples, name, wanted).reduce((sum, { value }) => sum + value, 0);

/** How much a counter rose; never below 0, since a server that was restarted counts from 0 again. */
export const rise = (before, now, name, wanted) =>
  Math.max(0, total(now, name, wanted) - total(before, name, wanted));

/** A quantile of what a histogram counted between two readings, linear inside a bucket; `null` if nothing came. */
export function quantile(before, now, name, wanted, q) {
  const counts = new Map();
  for (const [samples, sign] of [[now, 1], [before, -1]]) {
    for (const { labels, value } of select(samples, `${name}_bucket`, wanted)) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + sign * value);
    }
  }
  const bounds = [...counts.keys()].sort((a, b) => a - b);
  const all = counts.get(Infinity) ?? 0;
  if (all <= 0) return null;
  let [low, below] = [0, 0];
  for (const bound of bounds) {
    const upTo = counts.get(bound);
    if (upTo >= q * all) return bound === Infinity ? low : low + ((bound - low) * (q * all - below)) / (upTo - below);
    [low, below] = [bound, upTo];
  }
  return low;
}

/** The mean of what a histogram counted between two readings; `null` if nothing came. */
export function mean(before, now, name, wanted) {
  const count = rise(before, now, `${name}_count`, wanted);
  return count > 0 ? rise(before, now, `${name}_sum`, wanted) / count : null;
}
