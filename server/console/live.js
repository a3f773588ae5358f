// The figures of a model as they are now: throughput, latency, queue, batches, refusals, lanes.

import { spark } from "./charts.js";
import { badge, figure, make, milliseconds, table } from "./dom.js";
import { mean, quantile, rise, select, total } from "./metrics.js";

export const PERIOD_S = 2;
const READINGS = 61;
// Latencies are taken over the last ten seconds, so that a single request still shows.
const SPAN = 5;

/** The readings of the last two minutes. */
export class History {
  #readings = [];

  add(samples) {
    this.#readings.push({ samples, at: performance.now() / 1e3 });
    if (this.#readings.length > READINGS) this.#readings.shift();
  }

  get newest() {
    return this.#readings.at(-1)?.samples ?? new Map();
  }

  /** A value for each reading but the first, of the reading `span` before it and itself. */
  series(span, value) {
    return this.#readings.slice(1).map((now, at) => {
      const before = this.#readings[Math.max(0, at + 1 - span)];
      return value(before.samples, now.samples, now.at - before.at);
    });
  }
}

const last = (series) => series.at(-1) ?? null;

function panel(name, unit, series, digits, legend = []) {
  const newest = series.map((values) => digits(last(values)));
  return make("section", { class: "panel figure" },
    make("div", { class: "name" }, make("span", {}, name), make("span", {}, legend)),
    make("div", { class: "value" }, newest.join(" / "), make("small", {}, unit)),
    spark(`${name} of the last two minutes, now ${newest.join(" and ")} ${unit}`, series, READINGS - 1));
}

const key = (text, kind = "") => make("span", { class: `key ${kind}` }, `${text} `);

/** Makes the panels of one model version. */
export function livePanels(history, wanted, lanes) {
  const rate = history.series(1, (before, now, seconds) => rise(before, now, "slipstream_requests_total", { ...wanted, code: "ok" }) / seconds);
  const latency = (q) => history.series(SPAN, (before, now) => quantile(before, now, "slipstream_request_seconds", wanted, q));
  const batch = history.series(SPAN, (before, now) => mean(before, now, "slipstream_batch_rows", wanted));
  const queue = history.series(1, (before, now) => total(now, "slipstream_queue_rows", wanted));
  return [
    make("div", { class: "grid" },
      panel("Answers", "per second", [rate], figure),
      panel("Latency", "ms", [latency(0.5), latency(0.99)], milliseconds, [key("p50"), key("p99", "second")]),
      panel("Batch", "rows, mean", [batch], figure),
      panel("Queue", "rows waiting", [queue], figure)),
    make("section", { class: "panel" }, make("h3", {}, "Lanes"), laneTable(history, wanted, lanes)),
    make("section", { class: "panel" }, make("h3", {}, "Refusals and errors"), refusals(history, wanted)),
  ];
}

function laneTable(history, wanted, lanes) {
  if (!lanes.length) return make("p", { class: "quiet" }, "No lane is open.");
  const now = history.newest;
  return table("Lanes", ["Variant", "Device", "State", { number: "Lanes × threads" }, "Last two minutes", { number: "Batches/s" }, { number: "Rows/batch" },
    { number: "Run p50 / p99" }, { number: "Run/predicted" }],
  lanes.map(({ variant, device, instances, threads }) => {
    const lane = { ...wanted, variant, device };
    const isUp = select(now, "slipstream_lane_up", lane).every(({ value }) => value === 1);
    const newest = (value) => last(history.series(SPAN, value));
    const run = (q) => newest((before, after) => quantile(before, after, "slipstream_compute_seconds", lane, q));
    const per = (name) => newest((before, after) => mean(before, after, name, lane));
    const rates = history.series(SPAN, (before, after, seconds) => rise(before, after, "slipstream_batch_rows_count", lane) / seconds);
    return [variant, device, isUp ? badge("up", "good") : badge("fails", "bad"), { number: `${instances} × ${threads}` },
      spark(`Batches per second of ${variant} on ${device}`, [rates], READINGS - 1), { number: figure(last(rates)) }, { number: figure(per("slipstream_batch_rows")) },
      { number: `${milliseconds(run(0.5))} / ${milliseconds(run(0.99))} ms` }, { number: figure(per("slipstream_prediction_ratio")) }];
  }));
}

function refusals(history, wanted) {
  const counted = select(history.newest, "slipstream_requests_total", wanted).filter(({ labels }) => labels.code !== "ok");
  if (!counted.length) return make("p", { class: "quiet" }, "None since the server started.");
  const rate = (code) => last(history.series(SPAN, (before, now, seconds) =>
    rise(before, now, "slipstream_requests_total", { ...wanted, code }) / seconds));
  return table("Refusals and errors", ["Reason", { number: "Since the start" }, { number: "Per second" }],
    counted.sort((a, b) => b.value - a.value).map(({ labels, value }) =>
      [make("code", {}, labels.code), { number: figure(value) }, { number: figure(rate(labels.code)) }]));
}
