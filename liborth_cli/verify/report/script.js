// Adds to a page that is complete without it: sorting, pointing at plots, downloads. Text goes in as text, never as markup.
"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);

function make(tag, parent, text) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function written(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  const plain = size === 0 || (size >= 1e-4 && size < 1e6) || (Number.isInteger(value) && size < 1e9);
  return (plain ? String(Number(value.toPrecision(5))) : value.toExponential(3)).replace(/-/g, "−").replace("e+", "e");
}

// ---- Downloads

function rows(figure) {
  if (figure.kind === "table") return [figure.columns.map((name) => name.replace(/^>/, "")), ...figure.rows];
  if (figure.kind === "heatmap") return [["", ...figure.columns], ...figure.rows.map((name, i) => [name, ...figure.values[i]])];
  const points = figure.series.flatMap((s) =>
    s.x.map((x, i) => [s.label, x, s.y[i], s.low[i] ?? null, s.high[i] ?? null, s.marks[i] ?? null]));
  return [["series", figure.x_label, figure.y_label, "low", "high", "mark"], ...points];
}

// A spreadsheet takes a text that begins like this for a formula; a name from a checkpoint must never run.
const FORMULA = /^[=+\-@\t\r]/;

function csv(figure) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "string") return String(value);
    return `"${(FORMULA.test(value) ? "'" : "") + value.replace(/"/g, '""')}"`;
  };
  return rows(figure).map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function save(name, type, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function offer(holder, figure, index) {
  const name = figure.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || `figure-${index}`;
  const line = make("div", holder);
  line.className = "data";
  const button = (text, about, action) => {
    const made = make("button", line, text);
    made.type = "button";
    made.setAttribute("aria-label", `${about}: ${figure.title}`);
    made.addEventListener("click", action);
    return made;
  };
  button("CSV", "Download as CSV", () => save(`${name}.csv`, "text/csv", csv(figure)));
  button("JSON", "Download as JSON", () => save(`${name}.json`, "application/json", JSON.stringify(figure, null, 1) + "\n"));
  if (figure.kind === "plot") {
    const toggle = button("Numbers", "Show as a table", () => {
      const shown = holder.querySelector(".numbers");
      toggle.setAttribute("aria-expanded", String(!shown));
      if (shown) shown.remove();
      else numbers(holder, figure);
    });
    toggle.setAttribute("aria-expanded", "false");
  }
}

function numbers(holder, figure) {
  const box = make("div", holder);
  box.className = "scroll tall numbers";
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", `Numbers: ${figure.title}`);
  const table = make("table", box);
  const all = rows(figure);
  const used = all[0].map((_, column) => column < 3 || all.some((row, i) => i && row[column] !== null));
  all.forEach((row, i) => {
    const line = make("tr", i ? table.tBodies[0] ?? table.createTBody() : table.createTHead());
    row.forEach((value, column) => {
      if (!used[column]) return;
      const cell = make(i ? "td" : "th", line, i ? written(value) : value);
      if (column > 0 && column < 5) cell.className = "number";
    });
  });
}

// ---- Sorting

function sortable(table, figure) {
  const body = table.tBodies[0];
  const lines = Array.from(body.rows, (line, i) => [line, figure.rows[i]]);
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const first = figure.columns[column].startsWith(">") ? -1 : 1;
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const sign = before === null ? first : before === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const order = lines.slice().sort(([, a], [, b]) => compare(a[column], b[column], sign));
      body.append(...order.map(([line]) => line));
    });
  });
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // what is missing stays at the end
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

// ---- Pointing at plots

function scale(text, log) {
  const [start, end, low, high] = text.split(" ").map(Number);
  return (value) => {
    if (typeof value !== "number" || (log && value <= 0)) return NaN;
    return start + (((log ? Math.log10(value) : value) - low) / (high - low)) * (end - start);
  };
}

function places(svg, figure) {
  const across = scale(svg.dataset.x, figure.x_log);
  const up = scale(svg.dataset.y, figure.y_log);
  return figure.series.map((series) =>
    series.x.map((x, i) => ({ series, i, x: across(x), y: up(series.y[i]) }))
      .filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y)));
}

function describe(figure, { series, i }) {
  const low = series.low[i], high = series.high[i];
  const ends = series.low.length && series.high.length ? ` (${written(low)} to ${written(high)})` : "";
  const name = series.marks[i] ? `${series.label}: ${series.marks[i]}` : series.label;
  return `${name}\n${figure.x_label}: ${written(series.x[i])}\n${figure.y_label}: ${written(series.y[i])}${ends}`;
}

function pointable(canvas, figure) {
  const svg = canvas.querySelector("svg");
  const rowsOfPoints = places(svg, figure).filter((points) => points.length);
  if (!rowsOfPoints.length) return;
  svg.querySelectorAll(".mark title").forEach((title) => title.remove()); // the browser would show them a second time
  const tip = make("div", canvas);
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("r", "7");
  const at = { row: 0, column: 0 };

  const hide = () => { tip.hidden = true; cursor.remove(); };
  const show = () => {
    const point = rowsOfPoints[at.row][at.column];
    cursor.setAttribute("cx", point.x);
    cursor.setAttribute("cy", point.y);
    svg.append(cursor);
    tip.textContent = describe(figure, point);
    tip.hidden = false;
    const ratio = svg.clientWidth / svg.viewBox.baseVal.width;
    const left = point.x * ratio, top = point.y * ratio;
    const room = canvas.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, left - tip.offsetWidth / 2))}px`;
    tip.style.top = top > tip.offsetHeight + 14 ? `${top - tip.offsetHeight - 12}px` : `${top + 14}px`;
  };
  const nearest = (x, y) => {
    let best = Infinity;
    rowsOfPoints.forEach((points, row) => points.forEach((point, column) => {
      const distance = Math.hypot(point.x - x, point.y - y);
      if (distance < best) { best = distance; at.row = row; at.column = column; }
    }));
    return best;
  };

  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const ratio = box.width / svg.viewBox.baseVal.width;
    if (nearest((event.clientX - box.left) / ratio, (event.clientY - box.top) / ratio) < 60) show();
    else hide();
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", hide);

  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-roledescription", "plot");
  canvas.setAttribute("aria-label", `${figure.title}. Left and right go along a series, up and down to the next one.`);
  canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) show(); });
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const last = rowsOfPoints[at.row].length - 1;
    const moves = {
      ArrowRight: () => { at.column = Math.min(last, at.column + 1); },
      ArrowLeft: () => { at.column = Math.max(0, at.column - 1); },
      Home: () => { at.column = 0; },
      End: () => { at.column = last; },
      ArrowDown: () => { other(1); },
      ArrowUp: () => { other(-1); },
    };
    if (event.key === "Escape") return hide();
    if (!moves[event.key] || event.ctrlKey || event.altKey || event.metaKey) return undefined;
    event.preventDefault();
    moves[event.key]();
    return show();
  });
  const other = (step) => { // to the next series, staying at about the same place across
    const x = rowsOfPoints[at.row][at.column].x;
    at.row = (at.row + step + rowsOfPoints.length) % rowsOfPoints.length;
    const gaps = rowsOfPoints[at.row].map((candidate) => Math.abs(candidate.x - x));
    at.column = gaps.indexOf(Math.min(...gaps));
  };
}

for (const holder of document.querySelectorAll("[data-figure]")) {
  const index = Number(holder.dataset.figure);
  const figure = figures[index];
  if (figure.kind === "plot") pointable(holder.querySelector(".canvas"), figure);
  if (figure.kind === "table") sortable(holder.querySelector("table"), figure);
  offer(holder, figure, index);
}

// ---- Folded numbers: open where there is room, and where a link leads

const folded = Array.from(document.querySelectorAll("main .folded"));

function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  for (const one of target ? target.querySelectorAll(":scope > details") : []) one.open = true;
}

if (matchMedia("(min-width: 44.01rem)").matches) document.querySelectorAll(".folded").forEach((one) => { one.open = true; });

if (folded.length) {
  const button = make("button");
  button.className = "open-all";
  const label = () => { button.textContent = folded.every((one) => one.open) ? "Fold all numbers" : "Show all numbers"; };
  button.addEventListener("click", () => {
    const open = !folded.every((one) => one.open);
    folded.forEach((one) => { one.open = open; });
  });
  folded.forEach((one) => one.addEventListener("toggle", label));
  label();
  document.getElementById("checks").prepend(button);
  addEventListener("hashchange", openTarget);
  openTarget();
}
