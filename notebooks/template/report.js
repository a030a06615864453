// The report reads without this; it adds: contents that follow the reader, tables that sort and filter, keyboard for boxes.
"use strict";

const FILTER_FROM = 12; // rows

// ---- contents ----
const links = new Map([...document.querySelectorAll("#contents a")].map((a) => [a.hash.slice(1), a]));
const fold = document.querySelector("#contents details");
const wide = matchMedia("(min-width: 70rem)");
const adapt = () => { if (fold) fold.open = wide.matches; };
adapt();
wide.addEventListener("change", adapt);
const places = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
let waiting = false;
function follow() {
  waiting = false;
  const end = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
  const above = places.filter((place) => place.getClientRects().length && place.getBoundingClientRect().top < innerHeight / 3);
  const here = end ? places.at(-1) : above.at(-1) ?? places[0];
  for (const [id, link] of links) {
    if (here && id === here.id) {
      if (!link.hasAttribute("aria-current") && wide.matches) link.scrollIntoView({ block: "nearest", behavior: "instant" });
      link.setAttribute("aria-current", "true");
    } else link.removeAttribute("aria-current");
  }
}
addEventListener("scroll", () => { if (!waiting) { waiting = true; requestAnimationFrame(follow); } }, { passive: true });
follow();
for (const link of links.values()) link.addEventListener("click", () => { if (fold && !wide.matches) fold.open = false; });

// ---- tables ----
const text = (row, column) => row.cells[column]?.textContent.trim() ?? "";
function value(cell) { // the number that a cell begins with (1.5x, 97% [90, 99]); a date or a version is text
  const found = cell.replace(/\u2212/g, "-").replace(/(\d),(?=\d{3})/g, "$1").match(/^[<\s]*([+-]?\d+(\.\d+)?(e[+-]?\d+)?)(?=$|[\s%x[(])/i);
  return found ? Number(found[1]) : NaN;
}
const missing = (cell) => cell === "" || cell === "\u2013" || cell === "None" || cell === "nan";

function order(table, header, column, numeric) {
  const down = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [row, text(row, column)]);
  rows.sort(([, a], [, b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const by = numeric ? value(a) - value(b) : a.localeCompare(b, undefined, { numeric: true });
    return down ? -by : by;
  });
  table.tBodies[0].append(...rows.map(([row]) => row));
}

function filter(box, table) {
  const label = document.createElement("label"), input = document.createElement("input");
  label.className = "filter";
  input.type = "search";
  label.append(`Filter ${table.tBodies[0].rows.length} rows`, input);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows) {
      const said = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => said.includes(word));
    }
  });
  box.before(label);
}

for (const table of document.querySelectorAll("main table")) {
  if (!table.tHead || !table.tBodies.length) continue;
  const rows = [...table.tBodies[0].rows];
  const simple = table.tHead.rows.length === 1 && !table.querySelector("[rowspan], [colspan]");
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const cells = rows.map((row) => text(row, column)).filter((cell) => !missing(cell));
    const numeric = cells.length > 0 && cells.every((cell) => !Number.isNaN(value(cell)));
    if (simple && numeric) for (const cell of [header, ...rows.map((row) => row.cells[column])]) cell?.classList.add("number");
    if (!simple || rows.length < 3 || !header.textContent.trim()) return;
    const button = document.createElement("button");
    button.append(...header.childNodes);
    button.addEventListener("click", () => order(table, header, column, numeric));
    header.append(button);
  });
  if (simple && rows.length > FILTER_FROM) filter(table.closest(".scroll") ?? table, table);
}

// ---- boxes that scroll take the keyboard, others do not ----
const boxes = document.querySelectorAll(".scroll, figure, pre");
const measure = () => {
  for (const box of boxes) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("resize", measure);
document.addEventListener("toggle", measure, true);
measure();
