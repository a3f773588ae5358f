// Small charts as SVG.

const NAMESPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [300, 56];

function draw(tag, attributes, text) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The path of a line with a gap wherever a value is `null`. */
function line(values, x, y) {
  let isDrawing = false;
  return values.map((value, at) => {
    if (value === null) {
      isDrawing = false;
      return "";
    }
    const step = `${isDrawing ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    isDrawing = true;
    return step;
  }).join("");
}

/** Draws one or two series, the newest value at the right, from 0 up to the largest value. */
export function spark(label, series, length) {
  const top = Math.max(...series.flat().filter((value) => value !== null), 0) || 1;
  const svg = draw("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  svg.append(draw("path", { class: "floor", d: `M0 ${HEIGHT - 0.5}H${WIDTH}` }));
  series.forEach((values, which) => {
    const x = (at) => WIDTH - ((values.length - 1 - at) * WIDTH) / (length - 1);
    const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 6);
    if (which === 0 && values.length > 1 && !values.includes(null)) {
      svg.append(draw("path", { class: "area", d: `M${x(0)} ${HEIGHT}L${line(values, x, y).slice(1)}L${WIDTH} ${HEIGHT}Z` }));
    }
    svg.append(draw("path", { class: which ? "second" : "first", d: line(values, x, y) }));
  });
  return svg;
}

/** Draws the measured median time of a batch against its rows; both axes are logarithmic. */
export function latencyChart(label, rows, medians) {
  const [width, height, left, bottom, right, above] = [440, 190, 44, 26, 12, 12];
  const low = Math.log(Math.min(...medians)), span = Math.log(Math.max(...medians)) - low || 1;
  const first = Math.log(rows[0]), reach = Math.log(rows.at(-1)) - first || 1;
  const x = (count) => left + 8 + ((Math.log(count) - first) / reach) * (width - left - right - 16);
  const y = (ms) => height - bottom - 8 - ((Math.log(ms) - low) / span) * (height - bottom - above - 16);
  const svg = draw("svg", { class: "chart tall", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  svg.append(draw("path", { class: "floor", d: `M${left} ${above}V${height - bottom}H${width - right}` }));
  svg.append(draw("path", { d: line(medians, (at) => x(rows[at]), y) }));
  rows.forEach((count, at) => {
    svg.append(draw("circle", { cx: x(count), cy: y(medians[at]), r: 3 }));
    svg.append(draw("text", { x: x(count), y: height - 8, "text-anchor": "middle" }, String(count)));
  });
  for (const ms of new Set([Math.min(...medians), Math.max(...medians)])) {
    svg.append(draw("text", { x: left - 6, y: y(ms) + 4, "text-anchor": "end" }, ms.toPrecision(3)));
  }
  return svg;
}
