// The page: a table of tensors with a filter, a graph whose blocks open, and a lineage that is pinned.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { graph: 0, opened: new Set(), shown: new Map(), pinned: -1, zoom: 1 };

function draw() {
  const panel = $("graph"), [x, y] = [panel.scrollLeft, panel.scrollTop];
  panel.innerHTML = drawn(data.graphs[state.graph], state.opened, state.shown, "");
  zoom(state.zoom);
  panel.scrollTo(x, y);
  light();
}

function zoom(to) {
  const svg = $("graph").querySelector("svg"), box = svg.viewBox.baseVal;
  state.zoom = Math.min(3, Math.max(0.1, to));
  svg.setAttribute("width", box.width * state.zoom);
  svg.setAttribute("height", box.height * state.zoom);
}

// What belongs to the pinned tensor: its evaluations, what they are computed from, what uses them.
function lineage(side, letter) {
  const picture = data.graphs[state.graph][side], seen = visible(picture, letter, state.opened, state.shown);
  const lit = new Set();
  picture.ops.forEach((op, i) => {
    if (op.t === state.pinned) lit.add(seen.rep[i]);
    op.i.forEach((from) => {
      if (picture.ops[from].t === state.pinned) lit.add(seen.rep[i]);
      if (op.t === state.pinned && seen.rep[from]) lit.add(seen.rep[from]);
    });
  });
  seen.boxes.forEach((b) => b.tensors.includes(state.pinned) && lit.add(b.id));
  return lit;
}

function light() {
  const panel = $("graph"), on = state.pinned >= 0;
  panel.classList.toggle("pinned", on);
  const lit = on ? new Set([...lineage("before", "b"), ...lineage("after", "a")]) : new Set();
  panel.querySelectorAll("[data-id]").forEach((e) => e.classList.toggle("lit", lit.has(e.dataset.id)));
  panel.querySelectorAll("path[data-t]").forEach((e) => e.classList.toggle("lit", on && +e.dataset.t === state.pinned));
  document.querySelectorAll("tbody tr").forEach((row) => {
    row.classList.toggle("pinned", on && +row.dataset.t === state.pinned);
    row.setAttribute("aria-selected", String(on && +row.dataset.t === state.pinned));
  });
}

function pin(t, scroll) {
  state.pinned = state.pinned === t ? -1 : t;
  if (scroll && state.pinned >= 0) {
    const holds = (g) => [...g.before.ops, ...g.after.ops].some((op) => op.t === t);
    const at = data.graphs.findIndex(holds);
    if (at >= 0 && !holds(data.graphs[state.graph])) return show(at);
  }
  light();
}

function toggle(id) {
  state.opened.has(id) ? state.opened.delete(id) : state.opened.add(id);
  draw();
  $("graph").querySelector(`[data-id="${CSS.escape(id)}"]`)?.focus({ preventScroll: true });
}

function show(graph) {
  state.graph = graph;
  state.opened.clear();
  state.shown.clear();
  document.querySelectorAll("[data-graph]").forEach((b) => b.setAttribute("aria-pressed", String(+b.dataset.graph === graph)));
  draw();
}

// A click on an evaluation pins its tensor; on another block, or on its sign, it opens or folds.
function act(target, opens) {
  const block = target.closest("[data-id]");
  if (!block) return state.pinned >= 0 && pin(state.pinned);
  if (target.classList.contains("next")) {
    state.shown.set(block.dataset.id, (state.shown.get(block.dataset.id) ?? 0) + 1);
    return draw();
  }
  const one = block.dataset.t && !block.dataset.t.includes(" ");
  if (one && block.classList.contains("leaf") && !opens && !target.classList.contains("open")) return pin(+block.dataset.t);
  const opensAtAll = block.classList.contains("box") || block.querySelector(".open");
  if (opensAtAll) toggle(block.dataset.id);
}

function tip(event) {
  const block = event.target.closest?.("#graph .leaf"), box = $("tip");
  box.hidden = !block;
  if (!block) return;
  const graph = data.graphs[state.graph], side = block.dataset.id[0] === "b" ? "before" : "after";
  const op = graph[side].ops[+block.dataset.op], lines = op.w.map((i) => data.code[i]);
  const what = op.t >= 0 ? `<b>${escaped(data.tensors[op.t])}</b> ` : "";
  box.innerHTML = `${what}<span class="soft">${escaped(op.n)}: ${escaped(op.op)} ${escaped(op.value)}</span>` +
    lines.map(([place, code]) => `<br><span class="soft">${escaped(place)}</span><code>${escaped(code)}</code>`).join("");
  const at = event.type === "focusin" ? block.getBoundingClientRect() : { left: event.clientX, bottom: event.clientY };
  box.style.left = `${Math.min(at.left + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(at.bottom + 14, innerHeight - box.offsetHeight - 8)}px`;
}

function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let left = 0;
  document.querySelectorAll("tbody tr").forEach((row) => {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    left += !row.hidden;
  });
  $("left").textContent = words.length ? `${left} of ${data.tensors.length}` : "";
}

$("filter").addEventListener("input", filter);
document.querySelector("tbody").addEventListener("click", (e) => {
  const row = e.target.closest("tr");
  if (row) pin(+row.dataset.t, true);
});
document.querySelector("tbody").addEventListener("keydown", (e) => {
  const rows = [...document.querySelectorAll("tbody tr:not([hidden])")], at = rows.indexOf(document.activeElement);
  if (at < 0) return;
  const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
  if (step) rows[Math.min(rows.length - 1, Math.max(0, at + step))].focus();
  else if (e.key === "Enter" || e.key === " ") pin(+rows[at].dataset.t, true);
  else return;
  e.preventDefault();
});
const panel = $("graph");
panel.addEventListener("click", (e) => act(e.target, false));
panel.addEventListener("keydown", (e) => {
  if (e.key !== "Enter" && e.key !== " ") return;
  act(e.target, e.key === " ");
  e.preventDefault();
});
["mousemove", "focusin"].forEach((name) => panel.addEventListener(name, tip));
["mouseleave", "focusout"].forEach((name) => panel.addEventListener(name, () => ($("tip").hidden = true)));
document.querySelectorAll("[data-graph]").forEach((b) => b.addEventListener("click", () => show(+b.dataset.graph)));
document.querySelectorAll("[data-zoom]").forEach((b) =>
  b.addEventListener("click", () => {
    const box = panel.querySelector("svg").viewBox.baseVal;
    zoom(b.dataset.zoom === "fit" ? (panel.clientWidth - 4) / box.width : state.zoom * +b.dataset.zoom);
  }),
);
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape") {
    $("filter").value = "";
    filter();
    if (state.pinned >= 0) pin(state.pinned);
  } else if (e.key === "/" && document.activeElement !== $("filter")) {
    $("filter").focus();
    e.preventDefault();
  }
});
document.querySelectorAll(".dot").forEach((dot, i) => dot.setAttribute("style", colour(i)));
if (data.graphs.length) {
  draw();
  zoom(Math.min(1, Math.max(0.6, (panel.clientWidth - 4) / panel.querySelector("svg").viewBox.baseVal.width)));
}
