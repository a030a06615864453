// samples.html: filters, a list that draws only what is visible, and the chosen question. All text is set as text.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { configurations, dialogues, questions } = data;
const form = document.getElementById("choices"), list = document.getElementById("list");
const rows = document.getElementById("rows"), detail = document.getElementById("detail");
const HEIGHT = 58, SPARE = 6; // pixels of a row (samples.css), rows drawn above and below what is visible
const MINUS = "\u2212";

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const number = (value, digits = 2) => (value === null ? "\u2013" : value.toFixed(digits).replace("-", MINUS));
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
const key = (q) => `${dialogues[q.d].set}/${dialogues[q.d].id}/${q.turn}`;

// ---- choices ----
const options = (name, values) => form.elements[name].append(...values.map(([value, label]) => new Option(label, value)));
options("a", configurations.map((c) => [c.name, c.label]));
options("b", configurations.map((c) => [c.name, c.label]));
const several = new Set(dialogues.map((d) => d.set)).size > 1;
const domainOf = (d) => [several ? d.set : null, d.domain].filter(Boolean).join(": ");
const domains = [...new Set(dialogues.map(domainOf))].filter(Boolean).sort();
options("domain", domains.map((d) => [d, d]));
const turns = [...new Set(questions.map((q) => q.turn))].sort((a, b) => a - b);
options("turn", turns.map((t) => [String(t), String(t)]));
form.elements.a.value = configurations[data.full ?? 0].name;
form.elements.b.value = (configurations.find((c) => c.name === "nf4") ?? configurations.at(-1)).name;

const texts = questions.map((q) => [q.question, ...(q.references ?? []), ...q.said].filter(Boolean).join("\n").toLowerCase());
const domain = dialogues.map(domainOf);

// ---- filter and sort ----
let shown = [], chosen = -1; // indices of questions in order; a place in `shown`
const indexOf = (name) => configurations.findIndex((c) => c.name === name);

function select() {
  const want = Object.fromEntries(new FormData(form));
  const a = indexOf(want.a), b = indexOf(want.b), words = want.text.toLowerCase().split(/\s+/).filter(Boolean);
  const flips = {
    lost: (q) => q.right[a] && !q.right[b],
    gained: (q) => !q.right[a] && q.right[b],
    both: (q) => q.right[a] && q.right[b],
    neither: (q) => !q.right[a] && !q.right[b],
    text: (q) => q.said[a] !== q.said[b],
  };
  const flip = flips[want.flip] ?? (() => true);
  const turn = want.turn === "" ? () => true : want.turn === "last" ? (q) => q.last : (q) => q.turn === Number(want.turn);
  shown = [];
  questions.forEach((q, i) => {
    if (flip(q) && turn(q) && (!want.domain || domain[q.d] === want.domain) && words.every((w) => texts[i].includes(w))) shown.push(i);
  });
  const by = {
    loss: (q) => q.f1[b] - q.f1[a],
    gain: (q) => q.f1[a] - q.f1[b],
    kl: (q) => (q.kl[b] === null ? Infinity : -q.kl[b]),
  }[want.sort];
  if (by) {
    const values = questions.map(by);
    shown.sort((i, j) => values[i] - values[j] || i - j);
  }
  const mean = (c) => shown.reduce((sum, i) => sum + questions[i].f1[c], 0) / shown.length;
  const said = shown.length ? ` F1: ${configurations[a].label} ${number(mean(a), 3)}, ${configurations[b].label} ${number(mean(b), 3)}.` : "";
  document.getElementById("count").textContent = `${shown.length.toLocaleString("en")} of ${questions.length.toLocaleString("en")} questions.${said}`;
  rows.style.height = `${shown.length * HEIGHT}px`;
}

// ---- the list ----
function row(place) {
  const q = questions[shown[place]], a = indexOf(form.elements.a.value), b = indexOf(form.elements.b.value);
  const meta = [domain[q.d], `turn ${q.turn}${q.last ? " (last)" : ""}`, `F1 ${number(q.f1[a])} \u2192 ${number(q.f1[b])}`];
  if (q.kl[b] !== null) meta.push(`KL ${number(q.kl[b], 3)}`);
  const element = make("div", { className: "row", id: `row-${place}`, role: "option" },
    make("div", { textContent: q.question ?? key(q) }), make("div", { className: "meta", textContent: meta.filter(Boolean).join(" \u00b7 ") }));
  element.style.top = `${place * HEIGHT}px`;
  element.setAttribute("aria-setsize", shown.length);
  element.setAttribute("aria-posinset", place + 1);
  element.setAttribute("aria-selected", place === chosen);
  element.addEventListener("click", () => choose(place));
  return element;
}
function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - SPARE);
  const end = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + SPARE);
  rows.replaceChildren(...Array.from({ length: end - first }, (_, i) => row(first + i)));
  if (chosen >= first && chosen < end) list.setAttribute("aria-activedescendant", `row-${chosen}`);
  else list.removeAttribute("aria-activedescendant");
}
let waiting = false;
list.addEventListener("scroll", () => {
  if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); }
}, { passive: true });
addEventListener("resize", draw);

function choose(place, into = true) {
  chosen = shown.length ? Math.max(0, Math.min(place, shown.length - 1)) : -1;
  if (into && chosen >= 0) {
    const top = chosen * HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
  }
  draw();
  show();
}
list.addEventListener("keydown", (event) => {
  const page = Math.floor(list.clientHeight / HEIGHT);
  const to = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, PageDown: chosen + page, PageUp: chosen - page, Home: 0, End: shown.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to);
});

// ---- words that two answers do not share: longest common subsequence ----
function marked(said, other) {
  const a = said.split(/(\s+)/), b = other.split(/(\s+)/), width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      common[at] = a[i] === b[j] ? common[at + width + 1] + 1 : Math.max(common[at + width], common[at + 1]);
    }
  }
  const parts = [];
  for (let i = 0, j = 0; i < a.length;) {
    if (j < b.length && a[i] === b[j]) { parts.push(a[i]); i++; j++; }
    else if (j < b.length && common[i * width + j + 1] >= common[(i + 1) * width + j]) j++;
    else { parts.push(a[i].trim() ? make("mark", { textContent: a[i] }) : a[i]); i++; }
  }
  return parts;
}

// ---- the chosen question ----
function answer(q, c, a, b) {
  const said = q.said[c], first = q.said[a];
  const words = said === null ? ["(no text)"] : said === "" ? ["(nothing)"] : c === a || first === null ? [said] : marked(said, first);
  const scores = [`F1 ${number(q.f1[c])}`];
  if (c !== a) scores.push(signed(q.f1[c] - q.f1[a]));
  if (q.kl[c] !== null) scores.push(`KL ${number(q.kl[c], 3)}`);
  const name = configurations[c].label + (c === a ? " (A)" : c === b ? " (B)" : "");
  return make("section", { className: c === a || c === b ? "answer chosen" : "answer" },
    make("strong", { textContent: name }), make("p", {}, ...words),
    make("p", { className: "note" }, make("span", { className: q.right[c] ? "right" : "wrong", textContent: q.right[c] ? "right" : "wrong" }), ` \u00b7 ${scores.join(" \u00b7 ")}`));
}
function show() {
  if (chosen < 0) {
    detail.replaceChildren(make("p", { className: "note", textContent: "No question passes these filters." }));
    return;
  }
  const q = questions[shown[chosen]], d = dialogues[q.d];
  const a = indexOf(form.elements.a.value), b = indexOf(form.elements.b.value);
  const before = questions.filter((other) => other.d === q.d && other.turn < q.turn && other.question);
  const rest = configurations.map((_, c) => c).filter((c) => c !== a && c !== b);
  detail.replaceChildren(
    make("h2", { textContent: q.question ?? key(q) }),
    make("p", { className: "note", textContent: [domainOf(d), `dialogue ${d.id}`, `turn ${q.turn}${q.last ? ", the last" : ""}`].filter(Boolean).join(" \u00b7 ") }),
    make("p", {}, make("strong", { textContent: "References: " }), q.references ? q.references.join(" | ") : "not in these results"),
    make("div", { className: "answers" }, ...[...new Set([a, b, ...rest])].map((c) => answer(q, c, a, b))),
    make("p", { className: "note", textContent: `Marked: words that ${configurations[a].label} did not say there.` }),
    ...(before.length ? [make("h3", { textContent: "The dialogue so far" }),
      make("div", { className: "turns" }, ...before.map((t) => make("p", { textContent: `Q: ${t.question}\nA: ${t.references?.[0] ?? ""}` })))] : []),
    make("h3", { textContent: "Story" }),
    make("p", { className: "story", textContent: d.story ?? "Not in these results." }),
  );
  detail.scrollTop = 0;
  remember(q);
}

// ---- the address says what is shown ----
function remember(q) {
  const kept = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  kept.set("q", key(q));
  history.replaceState(null, "", `#${kept}`);
}
function open() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of asked) {
    const field = name === "q" ? null : form.elements[name];
    if (field && (field.type === "search" || [...field.options].some((o) => o.value === value))) field.value = value;
  }
  select();
  choose(Math.max(0, shown.findIndex((i) => key(questions[i]) === asked.get("q"))));
}
form.addEventListener("input", () => { select(); list.scrollTop = 0; choose(0); });
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", open);
open();
