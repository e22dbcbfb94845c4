// Draws a graph, before and after the passes, as SVG. It needs dagre and no browser.
"use strict";

// Browsers have it. dagre copies plain data with it.
globalThis.structuredClone ??= (value) => JSON.parse(JSON.stringify(value));
const CHAR = 7.3, LINE = 17, GAP = 90, HEAD = 24;
const escaped = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const short = (s, n) => (s.length > n ? s.slice(0, n - 1) + "…" : s);
const colour = (t) => `--hue:${Math.round((t * 137.5 + 210) % 360)}`;

// The blocks that are seen: leaves and open boxes, and for each operation the leaf that stands for it.
function visible(picture, side, opened, shown) {
  const leaves = [], boxes = [], rep = new Array(picture.ops.length);
  const all = (block, out = []) => {
    out.push(...block.ops);
    block.blocks.forEach((b) => all(b, out));
    return out;
  };
  // A leaf of one of several runs that are alike stands for those of the others.
  const stand = (block, like, map) => {
    block.ops.forEach((op, i) => map.set(op, like.ops[i]));
    block.blocks.forEach((b, i) => stand(b, like.blocks[i], map));
  };
  const aliases = new Map();
  const tensorsOf = (ops) => [...new Set(ops.map((i) => picture.ops[i].t).filter((t) => t >= 0))];
  const leaf = (id, parent, block, ops, label, sub) => {
    leaves.push({ id, parent, block, ops, label, sub, tensors: tensorsOf(ops) });
    ops.forEach((op) => (rep[op] = id));
  };
  const walk = (block, id, parent) => {
    const open = opened.has(id) !== (block.kind === "body" || block.kind === "repeat");
    const ops = all(block);
    const sub = ops.length > 1 ? `${ops.length} operations` : "";
    if (!open || (!block.blocks.length && ops.length === 1 && block.kind !== "evaluation"))
      return leaf(id, parent, block, ops, block.times > 1 ? `${block.label} × ${block.times}` : block.label, sub);
    const run = block.blocks[(shown.get(id) ?? 0) % block.times];
    const label = block.kind === "repeat" ? `× ${block.times}, ${run.label}` : block.label;
    boxes.push({ id, parent, block, label, tensors: tensorsOf(ops) });
    if (block.kind === "repeat") {
      run.blocks.forEach((b, i) => walk(b, `${id}.0.${i}`, id));
      block.blocks.forEach((other) => other !== run && stand(other, run, aliases));
    } else if (block.blocks.length) block.blocks.forEach((b, i) => walk(b, `${id}.${i}`, id));
    else ops.forEach((op) => leaf(`${id}:${op}`, id, null, [op], picture.ops[op].op, picture.ops[op].value));
  };
  picture.blocks.forEach((b, i) => walk(b, `${side}${i}`, null));
  aliases.forEach((like, op) => (rep[op] = rep[like]));
  return { leaves, boxes, rep };
}

function edges(picture, seen) {
  const place = new Map(seen.leaves.map((l, i) => [l.id, i]));
  const plumbing = new Set(seen.leaves.filter((l) => l.block && l.block.kind === "inputs").map((l) => l.id));
  const found = new Map();
  picture.ops.forEach((op, i) =>
    op.i.forEach((from) => {
      const a = seen.rep[from], b = seen.rep[i];
      if (a === b || plumbing.has(a) || place.get(a) > place.get(b)) return;
      const t = picture.ops[from].t;
      const known = found.get(`${a} ${b}`);
      if (!known) found.set(`${a} ${b}`, { a, b, t: t === picture.ops[i].t ? -1 : t });
    }),
  );
  return [...found.values()];
}

function laidOut(picture, side, opened, shown) {
  const seen = visible(picture, side, opened, shown);
  const graph = new dagre.graphlib.Graph({ compound: true });
  graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 26, marginx: 8, marginy: 8 });
  graph.setDefaultEdgeLabel(() => ({}));
  seen.leaves.forEach((l) => {
    const longest = Math.max(short(l.label, 40).length, short(l.sub, 40).length * 0.85);
    graph.setNode(l.id, { width: longest * CHAR + 34, height: l.sub ? 2 * LINE + 8 : LINE + 10 });
  });
  seen.boxes.forEach((b) => graph.setNode(b.id, {}));
  [...seen.leaves, ...seen.boxes].forEach((x) => x.parent && graph.setParent(x.id, x.parent));
  const lines = edges(picture, seen);
  lines.forEach((e) => graph.setEdge(e.a, e.b));
  dagre.layout(graph);
  return { seen, graph, lines, width: graph.graph().width || 80, height: graph.graph().height || 40 };
}

const curve = (points) => {
  const p = points.map((q) => `${q.x.toFixed(1)},${q.y.toFixed(1)}`);
  if (p.length < 3) return `M${p.join("L")}`;
  let path = `M${p[0]}`;
  for (let i = 1; i < points.length - 1; i++) {
    const last = i === points.length - 2;
    const x = last ? points[i + 1].x : (points[i].x + points[i + 1].x) / 2;
    const y = last ? points[i + 1].y : (points[i].y + points[i + 1].y) / 2;
    path += `Q${p[i]} ${x.toFixed(1)},${y.toFixed(1)}`;
  }
  return path;
};

function half(drawn, picture, x0, title) {
  const out = [`<g transform="translate(${x0},${HEAD})"><text class="title" x="8" y="-8">${escaped(title)}</text>`];
  drawn.seen.boxes.forEach((b) => {
    const n = drawn.graph.node(b.id);
    const [x, y] = [n.x - n.width / 2, n.y - n.height / 2];
    out.push(`<g class="box ${b.block.kind}" data-id="${b.id}" tabindex="0" role="button" aria-label="fold ${escaped(b.label)}">` +
      `<rect x="${x}" y="${y - 12}" width="${n.width}" height="${n.height + 12}" rx="8"/>` +
      `<text x="${x + 10}" y="${y + 4}">− ${escaped(short(b.label, 44))}</text>` +
      (b.block.kind === "repeat" ? `<text class="next" x="${x + 22 + (b.label.length + 2) * CHAR}" y="${y + 4}">next ›</text>` : "") + "</g>");
  });
  drawn.lines.forEach((e) => {
    const points = drawn.graph.edge(e.a, e.b).points;
    const own = e.t >= 0 ? ` class="of" data-t="${e.t}" style="${colour(e.t)}"` : ' class="edge"';
    out.push(`<path${own} marker-end="url(#head)" d="${curve(points)}"/>`);
  });
  drawn.seen.leaves.forEach((l) => {
    const n = drawn.graph.node(l.id);
    const [x, y] = [n.x - n.width / 2, n.y - n.height / 2];
    const kind = l.block ? l.block.kind : "op";
    const opens = l.block && (l.block.blocks.length || l.ops.length > 1 || kind === "evaluation");
    const data = l.tensors.length ? ` data-t="${l.tensors.join(" ")}"` : "";
    const bars = l.tensors.slice(0, 6).map((t, i, ts) =>
      `<rect class="bar" style="${colour(t)}" x="${x}" y="${y + (i * n.height) / ts.length}" width="6" height="${n.height / ts.length}"/>`);
    out.push(`<g class="leaf ${kind}" data-id="${l.id}" data-op="${l.ops[0]}"${data} tabindex="0" role="button" aria-label="${escaped(l.label)}"` +
      `${l.tensors.length === 1 ? ` style="${colour(l.tensors[0])}"` : ""}><rect x="${x}" y="${y}" width="${n.width}" height="${n.height}" rx="5"/>${bars.join("")}` +
      `<text x="${x + 14}" y="${y + LINE - 1}">${escaped(short(l.label, 40))}</text>` +
      (l.sub ? `<text class="sub" x="${x + 14}" y="${y + 2 * LINE - 2}">${escaped(short(l.sub, 40))}</text>` : "") +
      (opens ? `<text class="open" x="${x + n.width - 14}" y="${y + LINE - 1}">+</text>` : "") + "</g>");
  });
  return out.join("") + "</g>";
}

// Arrows from where a tensor was evaluated to where it is now.
function moves(before, after, x0, moved) {
  const at = (drawn, t) => drawn.seen.leaves.filter((l) => l.tensors.includes(t)).map((l) => ({ ...drawn.graph.node(l.id), id: l.id }));
  const tensors = [...new Set(before.seen.leaves.flatMap((l) => l.tensors))].filter((t) => moved.includes(t));
  const found = [];
  tensors.forEach((t) => {
    const [to] = at(after, t);
    if (to) at(before, t).forEach((from) => found.push({ t, from, to }));
  });
  const many = found.length > 12 ? " many" : "";
  return found.map(({ t, from, to }) => {
    const [x1, y1, x2, y2] = [from.x + from.width / 2, from.y + HEAD, x0 + to.x - to.width / 2, to.y + HEAD];
    const bend = Math.max(40, (x2 - x1) / 2);
    return `<path class="moved${many}" data-t="${t}" style="${colour(t)}" marker-end="url(#head)" d="M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}"/>`;
  }).join("");
}

function drawn(graph, opened, shown, style) {
  const before = laidOut(graph.before, "b", opened, shown), after = laidOut(graph.after, "a", opened, shown);
  const x0 = before.width + GAP, width = x0 + after.width + 10;
  const height = Math.max(before.height, after.height) + HEAD + 10;
  const count = (p) => `${p.ops.length} operations`;
  return `<svg xmlns="http://www.w3.org/2000/svg" class="graph" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}">` +
    (style ? `<style>${style}</style>` : "") +
    `<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0,0L8,4L0,8z" fill="context-stroke"/></marker></defs>` +
    `<rect class="ground" width="${width}" height="${height}"/>` +
    half(before, graph.before, 0, `as captured: ${count(graph.before)}`) +
    half(after, graph.after, x0, `after the passes: ${count(graph.after)}`) +
    moves(before, after, x0, graph.moved) + "</svg>";
}
