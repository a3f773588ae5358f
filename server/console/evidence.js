// The versions of a model, its variants, and what was proven of them.

import { evidencePath } from "./api.js";
import { latencyChart } from "./charts.js";
import { badge, figure, make, megabytes, percent, table } from "./dom.js";

const KINDS = { READY: "good", LOADING: "warn", UNLOADING: "warn", UNAVAILABLE: "bad" };

export const stateBadge = (state) => badge(state.toLowerCase(), KINDS[state] ?? "");

/** Makes the panels of a model: its versions, and the variants of the chosen one. */
export function evidencePanels(versions, chosen, metadata, manifest) {
  const panels = [make("section", { class: "panel" }, make("h3", {}, "Versions"),
    table("Versions", ["Version", "State", "Reason"],
      versions.map(({ version, state, reason }) => [version, stateBadge(state), { wrap: reason || "–" }])))];
  if (metadata !== null) panels.push(signaturePanel(metadata));
  if (manifest === null) {
    return [...panels, make("p", { class: "notice" }, "This is a plain model: no optimizer has proven a variant of it, so there is no evidence.")];
  }
  return [...panels, variantPanel(manifest, metadata, chosen), ...manifest.variants.map((variant) => proofPanel(variant, manifest, metadata?.refused[variant.name]))];
}

function signaturePanel({ inputs, outputs }) {
  const rows = (kind, tensors) => tensors.map(({ name, datatype, shape }) =>
    [kind, make("code", {}, name), datatype, make("code", {}, `[${shape.map((size) => (size < 0 ? "?" : size)).join(", ")}]`)]);
  return make("section", { class: "panel" }, make("h3", {}, "Signature"),
    table("Signature", ["", "Name", "Type", "Shape"], [...rows("input", inputs), ...rows("output", outputs)]));
}

function variantPanel(manifest, metadata, chosen) {
  const state = ({ name }) => {
    if (metadata === null) return badge("not loaded");
    if (metadata.variants.includes(name)) return badge(name === metadata.variants[0] ? "serves, preferred" : "serves", "good");
    return badge("refused here", "warn");
  };
  const reports = ["report.html", "report.json", "manifest.json"].map((file) =>
    make("a", { href: evidencePath(chosen.name, chosen.version, file), target: "_blank", rel: "noopener" }, file));
  return make("section", { class: "panel" },
    make("div", { class: "row apart" }, make("h3", {}, "Variants"), make("div", { class: "row small" }, "Full evidence: ", reports)),
    table("Variants", ["Variant", "State", "Precision", "For", { number: "Size" }, { number: "Agreement" }, { number: "at least" },
      { number: "SQNR" }, { number: "p50" }],
    manifest.variants.map((variant) => [variant.name, state(variant), variant.precision, variant.provider,
      { number: megabytes(variant.size_bytes) }, { number: percent(variant.fidelity?.agreement) },
      { number: percent(variant.fidelity?.agreement_low) }, { number: variant.fidelity ? `${figure(variant.fidelity.sqnr_db)} dB` : "–" },
      { number: variant.latency ? `${figure(variant.latency.p50_ms[0])} ms` : "–" }])),
    make("p", { class: "small quiet" }, `The p50 is of the smallest batch that was measured. Batching: ${manifest.batching.batchable ? `up to ${manifest.batching.max_rows} rows` : "off"}; ${manifest.batching.reason}.`));
}

function proofPanel({ name, fidelity, latency, golden_min_sqnr_db: golden, options, host }, manifest, refusal) {
  const facts = [];
  const fact = (term, text) => facts.push(make("dt", {}, term), make("dd", {}, text));
  if (refusal) fact("Refused here", refusal);
  if (fidelity) {
    fact("Agreement", `${percent(fidelity.agreement, 2)} of ${fidelity.samples} held-out samples (${fidelity.decision}); at least ${percent(fidelity.agreement_low, 2)} with 95 % confidence`);
    fact("Cosine", `${fidelity.cosine.toFixed(5)} mean, ${fidelity.cosine_worst.toFixed(5)} worst`);
    if (fidelity.accuracy !== null && fidelity.accuracy !== undefined) fact("Accuracy", `${percent(fidelity.accuracy)}; original ${percent(fidelity.accuracy_original)}`);
    if (fidelity.worst_slice) fact("Worst slice", `${fidelity.worst_slice.name}: ${percent(fidelity.worst_slice.agreement)} of ${fidelity.worst_slice.samples}`);
  }
  fact("Promise", `serves on a host only with ${figure(golden)} dB or more on the golden outputs`);
  fact("Session", `${options.intra_op_threads || "all"} ${options.intra_op_threads === 1 ? "thread" : "threads"}, graph level ${options.graph_level}`);
  if (host) fact("Measured on", host === manifest.host.fingerprint ? `${manifest.host.cpu ?? host}, ${manifest.host.cores ?? "?"} cores` : host);
  const chart = latency && latency.rows.length > 1
    ? make("figure", {}, latencyChart(`Median time of ${name} by rows per batch`, latency.rows, latency.p50_ms),
      make("figcaption", { class: "small quiet" }, "Median run time in ms by rows per batch, both axes logarithmic"))
    : null;
  return make("section", { class: "panel" }, make("h3", {}, name), make("div", { class: chart ? "columns" : "" }, make("dl", {}, facts), chart));
}
