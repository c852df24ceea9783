// The page of `qlora-plan serve`: asks /api/plan whenever a field changes, and keeps the question in the address.
"use strict";

const form = document.getElementById("question");
const answer = document.getElementById("answer");
const SVG = "http://www.w3.org/2000/svg";
const GIB = 2 ** 30;
const COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"]; // Okabe and Ito
const HATCHES = ["", "M0 8 8 0", "M2 2h1M6 6h1", "M0 0 8 8M0 8 8 0", "M0 0 8 8", "M4 0v8"];
let running = null;

/** What is asked: the fields that are not empty. */
function asked() {
  const query = new URLSearchParams();
  for (const field of form.elements) {
    if (!field.name) continue;
    const value = field.type === "checkbox" ? (field.checked ? "true" : "") : field.value.trim();
    if (value) query.set(field.name, value);
  }
  return query;
}

/** The question of the address, in the fields as far as these can have it; the whole of it is what is asked first. */
function restored() {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of query) {
    const field = form.elements.namedItem(name);
    if (!field) continue;
    if (field.type === "checkbox") field.checked = /^(true|t|yes|y|on|1)$/i.test(value);
    else {
      const missing = field.tagName === "SELECT" && ![...field.options].some((option) => option.value === value);
      if (missing) field.add(new Option(value, value)); // it is refused, beside the field that shows it
      field.value = value;
    }
    const details = field.closest("details");
    if (details) details.open = true;
  }
  for (const [name, value] of asked()) if (!query.has(name)) query.set(name, value);
  return query;
}

async function ask(path = "api/plan", query = asked()) {
  history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
  running?.abort();
  const mine = (running = new AbortController());
  answer.classList.add("waiting");
  try {
    const response = await fetch(`${path}?${query}`, { signal: mine.signal });
    const found = await response.json();
    if (mine !== running) return;
    forgive();
    if (response.ok) show(found, query); else complain(found.problems);
  } catch (error) {
    if (error.name !== "AbortError") complain([{ where: "", given: "", rule: "no answer came", remedy: "Is the server still there?" }]);
  } finally {
    if (mine === running) answer.classList.remove("waiting");
  }
}

function forgive() {
  for (const field of form.elements) field.removeAttribute("aria-invalid");
  for (const place of document.querySelectorAll(".mistake")) place.textContent = "";
}

/** Each mistake beside the field it is in, or above the answer. */
function complain(problems) {
  forgive();
  const others = [];
  for (const { where, given, rule, remedy } of problems) {
    const text = `${rule}${given ? ` (got ${given})` : ""}. ${remedy}${/[?.]$/.test(remedy) ? "" : "."}`;
    const field = form.elements.namedItem(where.replace(/^--/, ""));
    if (!field) { others.push(`${where} ${text}`.trim()); continue; }
    field.setAttribute("aria-invalid", "true");
    field.closest(".field").querySelector(".mistake").textContent = text;
    const details = field.closest("details");
    if (details) details.open = true;
  }
  document.getElementById("mistakes").textContent = others.join(" ");
  document.getElementById("headline").textContent = "Something in the question is not right.";
}

function show(found, query) {
  document.getElementById("headline").textContent = found.headline;
  document.getElementById("mistakes").textContent = "";
  document.getElementById("bars").replaceChildren(picture(found));
  fill(document.querySelector("#facts tbody"), [...found.facts, ...found.warnings.map((text) => ["warning", text])], true);
  const ways = document.getElementById("ways");
  ways.hidden = !found.ways;
  if (found.ways) {
    ways.querySelector("h2").textContent = found.ways.title;
    ways.querySelector("thead tr").replaceChildren(...found.ways.columns.map((name) => cell("th", name)));
    fill(ways.querySelector("tbody"), found.ways.rows, false);
  } else if (!found.fits) {
    ask("api/ways", query); // what would fit takes longer, and comes after
  }
  document.getElementById("command").textContent = found.command;
  document.getElementById("report").href = `report?${query}`;
}

function fill(body, rows, headed) {
  body.replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    line.append(...row.map((text, at) => cell(headed && at === 0 ? "th" : "td", text)));
    return line;
  }));
}

function cell(tag, text) {
  const made = document.createElement(tag);
  if (tag === "th") made.scope = made.closest("thead") ? "col" : "row";
  made.textContent = text;
  return made;
}

function node(name, attributes, ...inside) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

/** A bar for each kind of GPU, in groups of components told apart by colour and hatch. */
function picture({ bars, groups }) {
  const left = 130, width = 640, row = 26, top = 46;
  const most = Math.max(...bars.map((bar) => bar.process_bytes));
  const shown = Math.max(most * 1.12, Math.min(...bars.map((bar) => bar.usable_bytes)) * 1.05);
  const scale = (bytes) => (bytes / shown) * width;
  const height = top + bars.length * row + 8;
  const svg = node("svg", { viewBox: `0 0 ${left + width + 60} ${height}`, role: "img", "aria-label": "Memory by component on each kind of GPU" });
  const defs = node("defs", {});
  groups.forEach((_, at) => defs.append(node("pattern", { id: `kind-${at}`, width: 8, height: 8, patternUnits: "userSpaceOnUse" },
    node("rect", { width: 8, height: 8, fill: COLORS[at % COLORS.length] }),
    node("path", { d: HATCHES[at % HATCHES.length] || "M0 0", stroke: "#000", "stroke-width": 0.8, fill: "none" }))));
  svg.append(defs);
  groups.forEach((name, at) => {
    const x = left + (at % 3) * 215, y = 8 + Math.floor(at / 3) * 18;
    svg.append(node("rect", { x, y, width: 14, height: 12, fill: `url(#kind-${at})`, stroke: "currentColor", "stroke-width": 0.5 }),
      node("text", { x: x + 20, y: y + 10, fill: "currentColor" }, name));
  });
  bars.forEach((bar, at) => {
    const y = top + at * row;
    const verdict = bar.fits ? (bar.chance < 0.95 ? `${Math.round(bar.chance * 100)}%` : "fits") : "no";
    svg.append(node("text", { x: left - 8, y: y + 14, "text-anchor": "end", fill: "currentColor" }, `${bar.gpu}: ${verdict}`));
    let x = left;
    bar.groups.forEach((size, kind) => {
      svg.append(node("rect", { x, y, width: scale(size), height: 18, fill: `url(#kind-${kind})`, stroke: "currentColor", "stroke-width": 0.5 },
        node("title", {}, `${groups[kind]}: ${(size / GIB).toFixed(2)} GiB`)));
      x += scale(size);
    });
    svg.append(node("text", { x: x + 5, y: y + 14, fill: "currentColor" }, (bar.process_bytes / GIB).toFixed(2)));
    if (bar.usable_bytes <= shown) {
      const line = left + scale(bar.usable_bytes);
      svg.append(node("path", { d: `M${line} ${y - 3}v24`, stroke: "currentColor", "stroke-width": 2.5, "stroke-dasharray": "5 2" }));
    }
  });
  return svg;
}

let pause;
form.addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(ask, 150); });
form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
document.getElementById("look").addEventListener("click", () => ask("api/ways"));
ask("api/plan", restored());
