// The page: what is asked again and again, which model and tab are open, and what stands around them.
// Address: #/MODEL/VERSION/TAB

import * as api from "./api.js";
import { make } from "./dom.js";
import { evidencePanels, stateBadge } from "./evidence.js";
import { History, PERIOD_S, livePanels } from "./live.js";
import { parse } from "./metrics.js";
import { playground } from "./playground.js";

const TABS = { live: "Live", evidence: "Versions and evidence", playground: "Playground" };
const find = (id) => document.getElementById(id);

const history = new History();
let versions = [];
let details = { key: "", metadata: null, manifest: null };
let shown = "";
let failure = "";  // of the last action; shown until the next one

function place() {
  const [name, version, tab] = location.hash.slice(2).split("/").map(decodeURIComponent);
  const of = versions.filter((each) => each.name === name);
  const all = of.length ? of : versions.filter((each) => each.name === versions[0]?.name);
  const newest = all.filter((each) => each.state === "READY").at(-1) ?? all.at(-1);
  return { chosen: all.find((each) => each.version === version) ?? newest, all, tab: tab in TABS ? tab : "live" };
}

const address = ({ name, version }, tab) => `#/${[name, version, tab].map(encodeURIComponent).join("/")}`;

// Asking.

async function refresh() {
  try {
    const [entries, text, health] = await Promise.all([api.index(), api.metrics(), api.health()]);
    versions = entries;
    history.add(parse(text));
    showHealth(health);
    await readDetails();
    showProblem("");
  } catch (error) {
    showProblem(error instanceof api.Unreachable ? "The server does not answer. This page tries again every two seconds; the figures below are the last ones." : error.message);
    if (error instanceof api.Unreachable) showBadge("no answer", "bad");
  }
  render();
}

async function readDetails() {
  const { chosen } = place();
  const key = chosen ? `${chosen.name}/${chosen.version}/${chosen.state}` : "";
  if (key === details.key) return;
  const isReady = chosen?.state === "READY";
  const metadata = isReady ? await api.metadata(chosen.name, chosen.version) : null;
  const isPlain = metadata?.variants[0] === "unoptimized";
  const manifest = chosen && !isPlain ? await api.manifest(chosen.name, chosen.version) : null;
  details = { key, metadata, manifest };
}

// Showing.

function showBadge(text, kind) {
  find("health").textContent = text;
  find("health").className = `badge ${kind}`;
}

function showHealth(health) {
  if (!health.ready) showBadge(health.error, "warn");
  else if (health.lanes_down || health.models) showBadge(health.lanes_down ? "ready, lanes fail" : "ready, versions failed", "warn");
  else showBadge("ready", "good");
}

function showProblem(text) {
  find("problem").textContent = text || failure;
  find("problem").hidden = !(text || failure);
}

function showModels(chosen, tab) {
  const names = [...new Set(versions.map(({ name }) => name))];
  find("models").replaceChildren(make("h2", {}, "Models"), ...names.map((name) => {
    const states = versions.filter((each) => each.name === name).map(({ state }) => state);
    const kind = states.includes("READY") ? "good" : states.includes("LOADING") ? "warn" : "bad";
    const newest = versions.filter((each) => each.name === name && (each.state === "READY" || !states.includes("READY"))).at(-1);
    return make("a", { href: address(newest, tab), "aria-current": chosen?.name === name ? "page" : null },
      make("span", {}, name), make("span", { class: `dot ${kind}`, role: "img", "aria-label": { good: "serves", warn: "loads", bad: "does not serve" }[kind] }));
  }));
}

/** The parts of a page that is open: they stay while what is below the tabs changes. */
function frame({ chosen, all, tab }) {
  const pick = make("select", { class: "slim", "aria-label": "Version", onchange: () => { location.hash = address({ ...chosen, version: pick.value }, tab); } },
    all.map(({ version }) => make("option", { value: version, selected: version === chosen.version }, `version ${version}`)));
  const action = (verb, text) => make("button", { class: "slim", type: "button", onclick: () => act(chosen.name, verb, text) }, verb[0].toUpperCase() + verb.slice(1));
  const tabs = Object.entries(TABS).map(([key, title]) => make("button", {
    role: "tab", id: `tab-${key}`, "aria-selected": String(key === tab), "aria-controls": "panel", tabindex: key === tab ? 0 : -1,
    onclick: () => { location.hash = address(chosen, key); },
  }, title));
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(Object.keys(TABS).indexOf(tab) + step + tabs.length) % tabs.length];
    next.click();
    window.addEventListener("hashchange", () => find(next.id)?.focus(), { once: true });
  };
  return [
    make("div", { class: "head" }, make("h2", {}, chosen.name), pick, stateBadge(chosen.state), make("div", { class: "row" },
      action("load", "Bring the newest version into service?"),
      action("rollback", "Go back to the version that served before?"),
      action("unload", "Take this model out of service? Its requests are refused until it is loaded again."))),
    make("div", { class: "tabs", role: "tablist", "aria-label": "Views", onkeydown: move }, tabs),
    make("div", { class: "panels", role: "tabpanel", id: "panel", "aria-labelledby": `tab-${tab}` }),
  ];
}

function render() {
  const at = place();
  const { chosen, all, tab } = at;
  showModels(chosen, tab);
  if (!chosen) {
    shown = "";
    if (find("problem").hidden) find("view").replaceChildren(make("p", { class: "empty" }, "There is no model in the repository."));
    return;
  }
  const isRead = details.key === `${chosen.name}/${chosen.version}/${chosen.state}`;
  const key = JSON.stringify([tab, isRead, chosen, all]);
  const isNew = key !== shown;
  if (isNew) find("view").replaceChildren(...frame(at));
  shown = key;
  if (!isRead) find("panel").replaceChildren(make("p", { class: "empty" }, "Loading …"));
  else if (tab === "live") find("panel").replaceChildren(...live(chosen));
  else if (isNew && tab === "evidence") find("panel").replaceChildren(...evidencePanels(all, chosen, details.metadata, details.manifest));
  else if (isNew) find("panel").replaceChildren(details.playground ??= tryOut(chosen));  // what was typed stays
}

const notReady = ({ state, reason }) => make("p", { class: "notice bad" }, `This version is ${state.toLowerCase()}${reason ? `: ${reason}` : "."}`);

function live(chosen) {
  const notice = chosen.state === "READY" ? [] : [notReady(chosen)];
  return [...notice, ...livePanels(history, { model: chosen.name, version: chosen.version }, details.metadata?.lanes ?? [])];
}

const tryOut = (chosen) => (details.metadata ? playground(chosen.name, chosen.version, details.metadata) : notReady(chosen));

async function act(name, verb, text) {
  find("confirm-text").textContent = `${name}: ${text}`;
  find("confirm").returnValue = "no";
  find("confirm").showModal();
  await new Promise((resolve) => find("confirm").addEventListener("close", resolve, { once: true }));
  if (find("confirm").returnValue !== "yes") return;
  failure = "";
  try {
    await api.control(name, verb);
    details.key = "";
    await refresh();
  } catch (error) {
    failure = `${verb} of ${name} failed: ${error.message}`;
    showProblem("");
  }
}

function followTheme() {
  const chosen = localStorage.getItem("theme") ?? "auto";
  document.documentElement.dataset.theme = chosen;
  find("theme").value = chosen;
}

find("theme").addEventListener("change", ({ target }) => {
  localStorage.setItem("theme", target.value);
  followTheme();
});
followTheme();

window.addEventListener("hashchange", async () => {
  failure = "";
  render();
  await readDetails().catch((error) => showProblem(error.message));
  render();
});

api.server().then(({ version }) => { find("build").textContent = version; }, () => {});
for (;;) {
  if (!document.hidden) await refresh();
  await new Promise((resolve) => { setTimeout(resolve, PERIOD_S * 1e3); });
}
