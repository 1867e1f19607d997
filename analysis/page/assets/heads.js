// The view of attention heads: scores as a grid of layers and heads, and patterns in a few examples.
"use strict";

residua.views.heads = (() => {
  const { el, number, go } = residua;
  const parts = {};

  const layers = () => Object.keys(residua.data.archive.files.patterns).map(Number).sort((a, b) => a - b);

  const chosen = () => {
    const { archive } = residua.data;
    const { state, examples } = residua;
    const known = layers();
    const layer = known.includes(state.layer) ? state.layer : known[known.length - 1];
    const asked = archive.patterns.examples.indexOf(examples.place.get(state.example));
    return { layer, head: state.head || 0, example: Math.max(0, asked) };
  };

  // Scores: one line a layer, one cell a head.
  const grid = () => {
    const { scores } = residua.data.archive;
    const { state } = residua;
    if (!scores) return "";
    const name = scores.names.includes(state.score) ? state.score : scores.names[0];
    const values = scores[name];
    const finite = values.filter((value) => value !== null);
    const low = Math.min(...finite);
    const high = Math.max(...finite);
    const scale = residua.strips.scaleOf({ low: Math.max(0, low), high });
    const rows = new Map();
    scores.layer.forEach((layer, i) => {
      if (!rows.has(layer)) rows.set(layer, []);
      rows.get(layer).push(i);
    });
    const cell = (i) => {
      const node = el(
        "button",
        {
          type: "button",
          class: "cell",
          title: `layer ${scores.layer[i]}, head ${scores.head[i]}: ${number(values[i])}`,
          "aria-pressed": String(scores.layer[i] === state.layer && scores.head[i] === state.head),
          dataset: { score: values[i] },
          onclick: () => go({ layer: scores.layer[i], head: scores.head[i] }),
        },
        values[i] === null ? "–" : values[i].toFixed(2),
      );
      if (values[i] !== null) scale.paint(node, values[i]);
      return el("td", {}, node);
    };
    const widest = Math.max(...[...rows.values()].map((line) => line.length));
    return el(
      "section",
      {},
      el("h2", {}, "Scores"),
      el("div", { class: "controls" },
        scores.names.map((one) => el("button", { type: "button", class: "toggle", "aria-pressed": String(one === name), onclick: () => go({ score: one }) }, one.replace(/_/g, " ")))),
      el("div", { class: "scroll-x" },
        el("table", { class: "grid" },
          el("thead", {}, el("tr", {}, el("th", {}, "layer"), Array.from({ length: widest }, (_, i) => el("th", { scope: "col" }, `head ${i}`)))),
          el("tbody", {}, [...rows].map(([layer, line]) => el("tr", {}, el("th", { scope: "row" }, String(layer)), line.map(cell)))))),
    );
  };

  const unpacked = async (layer) => {
    const found = await residua.load(residua.data.archive.files.patterns[layer]);
    found.weights = found.weights.map((one) => (typeof one === "string" ? residua.unpack(one, Uint8Array) : one));
    return found;
  };

  const patterns = async () => {
    const { archive } = residua.data;
    const { examples } = residua;
    if (!layers().length || !archive.patterns.examples.length) return [];
    const { layer, head: asked, example } = chosen();
    const found = await unpacked(layer);
    const head = Math.min(asked, found.n_heads - 1);
    const n = archive.patterns.n_tokens[example];
    const at = archive.patterns.examples[example];
    const weight = (one, query, key) => found.weights[example][(one * n + query) * n + key] / 255;
    const field = (label, options, value, onchange) => {
      const node = el("select", { onchange: (event) => onchange(Number(event.target.value)) });
      for (const [one, text] of options) node.append(el("option", { value: one, selected: one === value }, text));
      return el("label", { class: "field" }, el("span", {}, label), node);
    };
    const thumbs = Array.from({ length: found.n_heads }, (_, one) =>
      el(
        "button",
        { type: "button", class: "thumb", "aria-pressed": String(one === head), onclick: () => go({ layer, head: one }) },
        residua.charts.pixels(n, n, (query, key) => Math.sqrt(weight(one, query, key)), { label: `Pattern of head ${one}` }),
        el("span", {}, `head ${one}`),
      ),
    );
    const read = el("p", { class: "quiet", id: "weight" }, "Point at the pattern, or choose a token: the others show how much it attends to them.");
    const big = residua.charts.pixels(n, n, (query, key) => Math.sqrt(weight(head, query, key)), { className: "pixels big", label: `Attention pattern of layer ${layer}, head ${head}` });
    const say = (query, key) => {
      read.textContent = `${JSON.stringify(residua.strips.textAt(at, query))} (${query}) attends to ${JSON.stringify(residua.strips.textAt(at, key))} (${key}): ${weight(head, query, key).toFixed(3)}`;
    };
    const where = (event) => {
      const box = big.getBoundingClientRect();
      const inside = (value) => Math.min(n - 1, Math.max(0, Math.floor(value * n)));
      return [inside((event.clientY - box.top) / box.height), inside((event.clientX - box.left) / box.width)];
    };
    const { state } = residua;
    const query = state.token !== null && state.token < n ? state.token : n - 1;
    const attended = (position) => weight(head, query, position);
    const most = Math.max(...Array.from({ length: n }, (_, key) => attended(key)), 1 / 255);
    const scale = residua.strips.scaleOf({ low: 0, high: most });
    const tokens = Array.from({ length: n }, (_, position) => {
      const node = el(
        "button",
        { type: "button", class: `token${position === query ? " selected" : ""}`, "aria-pressed": String(position === query), title: `position ${position}: ${attended(position).toFixed(3)}`, dataset: { position, weight: attended(position) }, onclick: () => go({ token: position }) },
        residua.strips.visible(residua.strips.textAt(at, position)),
      );
      scale.paint(node, attended(position));
      return node;
    });
    big.addEventListener("mousemove", (event) => say(...where(event)));
    big.addEventListener("click", (event) => go({ token: where(event)[0] }));
    return [
      el("h2", {}, "Patterns"),
      el("div", { class: "controls" },
        field("Layer", layers().map((one) => [one, String(one)]), layer, (one) => go({ layer: one })),
        field("Example", archive.patterns.examples.map((one, i) => [i, String(examples.numbers[one])]), example, (one) => go({ example: examples.numbers[archive.patterns.examples[one]], token: null }))),
      el("div", { class: "thumbs" }, thumbs),
      el("div", { class: "pattern" },
        el("figure", {}, el("h3", {}, `Layer ${layer}, head ${head}`), big, el("figcaption", {}, "Rows are queries, columns keys; shades are square roots of weights, which are rounded to 1/255."), read),
        el("div", {}, el("h3", {}, "What the chosen token attends to"), el("div", { class: "strip" }, tokens), el("p", {}, residua.strips.legend({ low: 0, high: most }, "attention of the outlined token")))),
    ];
  };

  return {
    build(place) {
      parts.scores = el("div", {});
      parts.patterns = el("section", {});
      place.append(parts.scores, parts.patterns);
    },
    async draw() {
      parts.scores.replaceChildren(grid());
      parts.patterns.replaceChildren(...(await patterns()));
    },
    onkey(key) {
      const known = layers();
      const { archive } = residua.data;
      if (!known.length || !archive.patterns.examples.length) return false;
      const { layer, head, example } = chosen();
      const shown = archive.patterns.examples;
      const next = (by) => go({ example: residua.examples.numbers[shown[(example + by + shown.length) % shown.length]], token: null });
      const keys = {
        j: () => next(1), ArrowDown: () => next(1), k: () => next(-1), ArrowUp: () => next(-1),
        l: () => go({ layer, head: head + 1 }), ArrowRight: () => go({ layer, head: head + 1 }),
        h: () => go({ layer, head: Math.max(0, head - 1) }), ArrowLeft: () => go({ layer, head: Math.max(0, head - 1) }),
        "]": () => go({ layer: known[(known.indexOf(layer) + 1) % known.length] }),
        "[": () => go({ layer: known[(known.indexOf(layer) - 1 + known.length) % known.length] }),
      };
      if (!keys[key]) return false;
      keys[key]();
      return true;
    },
  };
})();
