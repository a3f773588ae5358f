// A request built from the signature, sent for real, with its answer, its times and the curl line that does the same.

import { ask, modelPath, refusalOf } from "./api.js";
import { badge, figure, make, table } from "./dom.js";
import { SCALES, fillings, generate, imageLayout, imageValues, readValues, sizeOf } from "./tensors.js";

const SHOWN_VALUES = 12;
const LONGEST_LINE = 2000;

/** Makes the playground of one model version. */
export function playground(name, version, metadata) {
  const inputs = metadata.inputs.map((spec) => new Input(spec));
  const variant = make("select", { id: "variant" },
    make("option", { value: "" }, "chosen by the server"), metadata.variants.map((each) => make("option", { value: each }, each)));
  const send = make("button", { class: "primary", type: "submit" }, "Send");
  const answer = make("section", { class: "panel", "aria-live": "polite", id: "answer" },
    make("h3", {}, "Answer"), make("p", { class: "quiet" }, "Nothing was sent yet."));
  const line = make("section", { class: "panel" });
  const path = `${modelPath(name, version)}/infer`;
  const request = () => {
    const tensors = inputs.map((input) => input.tensor());  // all of them, so that each shows its own fault
    if (tensors.includes(null)) return null;
    return { inputs: tensors, ...(variant.value ? { parameters: { variant: variant.value } } : {}) };
  };
  const showLine = () => {
    const body = request();
    if (body !== null) line.replaceChildren(...curl(path, JSON.stringify(body)));
  };
  const form = make("form", { class: "panels", novalidate: true, onsubmit: async (event) => {
    event.preventDefault();
    const body = request();
    if (body === null) {
      form.querySelector("[aria-invalid=true]").focus();
      return;
    }
    send.disabled = true;
    answer.replaceChildren(make("h3", {}, "Answer"), ...await answerTo(path, JSON.stringify(body)));
    send.disabled = false;
  }, onchange: showLine },
  inputs.map((input) => input.element),
  make("div", { class: "row apart" }, make("label", { class: "field" }, "Variant ", variant), send));
  for (const input of inputs) input.onFilled = showLine;
  showLine();
  return make("div", { class: "columns" }, form, make("div", { class: "panels" }, answer, line));
}

/** One input: its shape, its values, and the ways to fill them. */
class Input {
  onFilled = () => {};

  constructor(spec) {
    this.spec = spec;
    this.layout = imageLayout(spec);
    this.sizes = spec.shape.map((size, axis) => (size >= 0 ? null : make("input", {
      type: "number", min: 1, max: 4096, value: this.#beginning(axis), "aria-label": `${spec.name}, size of axis ${axis}`,
      onchange: () => this.#fill(),
    })));
    const id = `values-${spec.name}`;
    this.values = make("textarea", { id, spellcheck: "false", "aria-describedby": `${id}-fault` });
    this.fault = make("p", { class: "fault", id: `${id}-fault`, role: "alert", hidden: true });
    const kinds = fillings(spec);
    this.kind = kinds[0];
    const button = (kind) => make("button", { type: "button", class: "slim", onclick: () => { this.kind = kind; this.#fill(); } }, kind);
    this.element = make("fieldset", { class: "panel" },
      make("div", { class: "row apart" },
        make("label", { for: id }, make("h3", {}, spec.name)), make("span", { class: "quiet small" }, spec.datatype)),
      make("div", { class: "row apart small" },
        make("div", { class: "row" }, "Shape", spec.shape.map((size, axis) => this.sizes[axis] ?? make("code", {}, String(size)))),
        make("div", { class: "row" }, spec.datatype === "BYTES" ? make("span", { class: "quiet" }, "One text per line") : kinds.map(button))),
      this.layout ? this.#imageRow() : null,
      this.values, this.fault);
    this.#fill();
  }

  get shape() {
    return this.spec.shape.map((size, axis) => (this.sizes[axis] ? Math.max(1, Math.floor(Number(this.sizes[axis].value)) || 1) : size));
  }

  /** The tensor of the request; `null`, with the fault shown, if the values do not fit. */
  tensor() {
    const { name, datatype } = this.spec;
    try {
      const data = readValues(this.values.value, this.spec, this.shape);
      this.#show("");
      return { name, shape: this.shape, datatype, data };
    } catch (error) {
      this.#show(error.message);
      return null;
    }
  }

  #beginning(axis) {
    if (axis === 0) return 1;
    return this.layout ? 224 : this.spec.datatype === "BYTES" ? 1 : 8;
  }

  #fill() {
    this.#write(generate(this.spec.datatype, sizeOf(this.shape), this.kind));
  }

  #write(values) {
    this.values.value = this.spec.datatype === "BYTES" ? values.join("\n") : JSON.stringify(values).replaceAll(",", ", ");
    this.onFilled();
  }

  #show(fault) {
    this.fault.textContent = fault;
    this.fault.hidden = !fault;
    this.values.setAttribute("aria-invalid", String(Boolean(fault)));
  }

  #imageRow() {
    const scale = make("select", { class: "slim" }, Object.keys(SCALES).map((name) => make("option", {}, name)));
    if (this.spec.datatype === "UINT8") scale.value = "0 to 255";
    const file = make("input", { type: "file", accept: "image/*" });
    const load = async () => {
      if (!file.files.length) return;
      try {
        if (this.sizes[0]) this.sizes[0].value = 1;
        this.#write(await imageValues(file.files[0], this.layout, this.shape, SCALES[scale.value]));
      } catch (error) {
        this.#show(`the image cannot be read: ${error.message}`);
      }
    };
    file.addEventListener("change", load);
    scale.addEventListener("change", load);
    return make("div", { class: "row" }, make("label", { class: "field" }, "Image ", file), make("label", { class: "field" }, "Values ", scale));
  }
}

async function answerTo(path, body) {
  const begun = performance.now();
  try {
    const response = await ask(path, { method: "POST", headers: { "content-type": "application/json" }, body });
    if (!response.ok) {
      const { status, code, message } = await refusalOf(response);
      return [make("div", { class: "row" }, badge(`status ${status}`, "bad"), make("code", {}, code)), make("p", { class: "notice bad", role: "alert" }, message)];
    }
    const answered = await response.json();
    return [...timing(response, performance.now() - begun), ...outputs(answered.outputs), raw(answered)];
  } catch (error) {
    return [make("p", { class: "notice bad", role: "alert" }, error.message)];
  }
}

function timing(response, browserMs) {
  const told = Object.fromEntries([...(response.headers.get("server-timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]));
  const parts = { queue: told.queue ?? 0, compute: told.compute ?? 0, "the rest": Math.max(0, browserMs - (told.queue ?? 0) - (told.compute ?? 0)) };
  const stack = make("div", { class: "stack", "aria-hidden": "true" });
  Object.values(parts).forEach((ms, at) => {
    const piece = make("i", { class: ["second", "first", "third"][at] });
    piece.style.width = `${(100 * ms) / browserMs}%`;
    stack.append(piece);
  });
  const header = (name) => response.headers.get(`slipstream-${name}`) ?? "–";
  return [
    make("div", { class: "row" }, badge(`status ${response.status}`, "good"), badge(header("variant")), badge(header("device")), badge(`batch of ${header("batch-rows")}`)),
    stack,
    make("p", { class: "small quiet" }, `${figure(browserMs)} ms in the browser: `, Object.entries(parts).map(([name, ms]) => `${name} ${figure(ms)} ms`).join(", ")),
  ];
}

const short = (value) => (typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(5))) : JSON.stringify(value));

function outputs(tensors) {
  return [table("Outputs", ["Output", "Type", "Shape", "Values"], tensors.map(({ name, datatype, shape, data }) => {
    const rest = data.length - SHOWN_VALUES;
    const text = data.slice(0, SHOWN_VALUES).map(short).join(", ") + (rest > 0 ? `, and ${rest} more` : "");
    return [make("code", {}, name), datatype, make("code", {}, `[${shape.join(", ")}]`), { wrap: make("code", {}, text) }];
  }))];
}

const raw = (answered) => make("details", {}, make("summary", { class: "small" }, "JSON"), make("pre", {}, JSON.stringify(answered)));

function curl(path, body) {
  const isLong = body.length > LONGEST_LINE;
  const data = isLong ? "@request.json" : `'${body.replaceAll("'", "'\\''")}'`;
  const text = `curl -s ${location.origin}${path} -H 'content-type: application/json' --data-binary ${data}`;
  const copy = make("button", { type: "button", class: "slim", onclick: async () => {
    await navigator.clipboard.writeText(text).then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Select it and copy"; });
  } }, "Copy");
  const save = make("button", { type: "button", class: "slim", onclick: () => {
    const link = make("a", { href: URL.createObjectURL(new Blob([body], { type: "application/json" })), download: "request.json" });
    link.click();
    URL.revokeObjectURL(link.href);
  } }, "Save request.json");
  return [make("div", { class: "row apart" }, make("h3", {}, "The same with curl"), make("div", { class: "row" }, isLong ? save : null, copy)),
    make("pre", { id: "curl", tabindex: "0" }, text)];
}
