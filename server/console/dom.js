// Elements, and how figures are written.

/** Makes an element: `make("p", { class: "quiet", onclick: f }, "text", child)`. Nothing is ever parsed as HTML. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Makes a table; a cell is text, an element, or `{ number: text }` for one that stands at the right. */
export function table(caption, heads, rows) {
  const cell = (tag, content) => {
    const isNumber = content !== null && content?.number !== undefined;
    return make(tag, { class: isNumber ? "number" : content?.wrap ? "wrap" : null, scope: tag === "th" ? "col" : null },
      isNumber ? content.number : content?.wrap ?? content ?? "");
  };
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {},
      make("thead", {}, make("tr", {}, heads.map((head) => cell("th", head)))),
      make("tbody", {}, rows.map((row) => make("tr", {}, row.map((content) => cell("td", content)))))));
}

export const badge = (text, kind = "") => make("span", { class: `badge ${kind}` }, text);

/** A figure with at most three digits that matter; "–" where there is none. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return value.toLocaleString("en", size >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 });
}

export const milliseconds = (seconds) => figure(seconds === null || seconds === undefined ? null : seconds * 1e3);
export const percent = (share, digits = 1) => (share === null || share === undefined ? "–" : `${(share * 100).toFixed(digits)} %`);
export const megabytes = (bytes) => `${figure(bytes / 1e6)} MB`;
