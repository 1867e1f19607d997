// Tokens as strips: the texts of examples, the colours of their values, and a strip of coloured tokens.
"use strict";

residua.unpackExamples = () => {
  const { examples } = residua.data;
  const tokens = residua.unpack(examples.tokens, Int32Array);
  const positions = residua.unpack(examples.positions, Int32Array);
  const starts = [0];
  const rowStarts = [0];
  examples.n_shown.forEach((n, i) => {
    starts.push(starts[i] + n);
    rowStarts.push(rowStarts[i] + examples.n_rows[i]);
  });
  const place = new Map(examples.numbers.map((number, i) => [number, i]));
  return { ...examples, tokens, positions, starts, rowStarts, place, searched: [] };
};

residua.strips = (() => {
  const { el } = residua;

  const tokenText = (id) => {
    const text = residua.data.examples.texts[id];
    if (id < 0) return "·";
    return text === null || text === undefined ? `⟨${id}⟩` : text;
  };

  // The text of a token of the example at place `at`.
  const textAt = (at, position) => {
    const { characters, starts, tokens } = residua.examples;
    const own = characters[at] && characters[at][position];
    return own !== undefined ? own : tokenText(tokens[starts[at] + position]);
  };

  const preview = (at, most = 120) => {
    const { n_shown: shown } = residua.examples;
    let text = "";
    for (let position = 0; position < shown[at] && text.length < most; position += 1) text += textAt(at, position);
    return text.replace(/\s+/g, " ").trim();
  };

  const searchText = (at) => {
    const found = residua.examples;
    if (found.searched[at] === undefined) {
      let text = "";
      for (let position = 0; position < found.n_shown[at]; position += 1) text += textAt(at, position);
      const columns = Object.values(found.columns).map((column) => column[at]);
      found.searched[at] = [text, ...columns, `#${found.numbers[at]}`].join("\n").toLowerCase();
    }
    return found.searched[at];
  };

  const site = (name) => residua.data.archive.sites.find((one) => one.site === name);
  const measure = (name, by) => site(name).measures.find((one) => one.name === by);

  // All values of a measure, one for each shown row.
  const values = async (name, by) => {
    const { archive } = residua.data;
    const parts = await residua.load(archive.files.values[name]);
    const number = site(name).measures.findIndex((one) => one.name === by);
    if (typeof parts[number] === "string") parts[number] = residua.unpack(parts[number], Float32Array);
    return parts[number];
  };

  // Place of the row of a token among all shown rows, or -1 if the archive keeps no row of it.
  const rowAt = (at, position) => {
    const { positions, rowStarts } = residua.examples;
    let low = rowStarts[at];
    let high = rowStarts[at + 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (positions[middle] < position) low = middle + 1;
      else high = middle;
    }
    return low < rowStarts[at + 1] && positions[low] === position ? low : -1;
  };

  const isDark = () => document.documentElement.dataset.theme === "dark";
  const palette = () =>
    isDark()
      ? { paper: [24, 27, 33], high: [240, 168, 72], low: [92, 162, 232] }
      : { paper: [255, 255, 255], high: [196, 78, 18], low: [28, 96, 168] };
  const ends = () => {
    const { paper, low } = palette();
    return [paper, low];
  };

  const luminance = (colour) => {
    const linear = colour.map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };

  // The scale of a measure: from its 1st to its 99th percentile; on both sides of 0 if there are values on both.
  const scaleOf = (shape) => {
    const { paper, low: blue, high: orange } = palette();
    const low = shape.low === null ? 0 : shape.low;
    const high = shape.high === null ? 1 : shape.high;
    const isDiverging = low < 0 && high > 0;
    const reach = Math.max(-low, high) || 1;
    const start = isDiverging ? -reach : low;
    const end = isDiverging ? reach : high;
    const mix = (hue, share) => paper.map((value, i) => Math.round(value + (hue[i] - value) * share * 0.92));
    const colour = (value) => {
      if (isDiverging) {
        const share = Math.min(1, Math.abs(value) / reach);
        return mix(value < 0 ? blue : orange, share);
      }
      const share = (value - start) / (end - start || 1);
      return mix(blue, Math.min(1, Math.max(0, share)));
    };
    const css = (value) => `rgb(${colour(value).join(" ")})`;
    const paint = (node, value) => {
      const found = colour(value);
      const light = luminance(found);
      node.style.backgroundColor = `rgb(${found.join(" ")})`;
      node.style.color = (light + 0.05) ** 2 > 1.05 * 0.05 ? "#111318" : "#ffffff";
    };
    return { start, end, isDiverging, colour, css, paint };
  };

  // A gradient with its ends, as the key of a strip.
  const legend = (shape, label) => {
    const scale = scaleOf(shape);
    const bar = el("span", { class: "gradient", "aria-hidden": "true" });
    const stops = Array.from({ length: 9 }, (_, i) => scale.css(scale.start + ((scale.end - scale.start) * i) / 8));
    bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
    return el(
      "span",
      { class: "legend" },
      el("span", { class: "legend-end" }, residua.number(scale.start)),
      bar,
      el("span", { class: "legend-end" }, residua.number(scale.end)),
      el("span", { class: "legend-label" }, label),
    );
  };

  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥") || " ";

  // Tokens `first` to `last` of an example, coloured. `onpick` is called with a position; `under` gives a text below.
  const strip = (at, found, shape, { first = 0, last = null, selected = null, onpick = null, under = null } = {}) => {
    const scale = scaleOf(shape);
    const end = last === null ? residua.examples.n_shown[at] : Math.min(last, residua.examples.n_shown[at]);
    const nodes = [];
    for (let position = Math.max(0, first); position < end; position += 1) {
      const text = textAt(at, position);
      const row = rowAt(at, position);
      const value = row < 0 ? null : found[row];
      const below = under && row >= 0 ? under(row) : null;
      const said = row < 0 ? "no row is kept of this token" : residua.number(value);
      const node = el(
        onpick ? "button" : "span",
        {
          class: `token${row < 0 ? " rowless" : ""}${position === selected ? " selected" : ""}`,
          type: onpick ? "button" : null,
          tabindex: onpick ? (position === (selected === null ? 0 : selected) ? "0" : "-1") : null,
          title: `${JSON.stringify(text)} · position ${position} · ${said}`,
          "aria-pressed": onpick ? String(position === selected) : null,
          dataset: { position },
        },
        under ? el("span", { class: "token-text" }, visible(text)) : visible(text),
        below === null ? null : el("span", { class: "under" }, visible(below)),
      );
      if (value !== null && Number.isFinite(value)) scale.paint(node, value);
      else if (row >= 0) node.classList.add("nonfinite");
      nodes.push(node);
      if (text.includes("\n")) nodes.push(el(under ? "span" : "br", { class: "break" }));
    }
    const block = el("div", { class: `strip${under ? " with-under" : ""}` }, nodes);
    if (onpick) {
      block.addEventListener("click", (event) => {
        const picked = event.target.closest(".token");
        if (picked) onpick(Number(picked.dataset.position));
      });
    }
    return block;
  };

  // The same as a line of pixels, one a token.
  const draw = (canvas, at, found, shape) => {
    const { n_shown: shown } = residua.examples;
    const scale = scaleOf(shape);
    const { paper } = palette();
    canvas.width = Math.max(1, shown[at]);
    canvas.height = 1;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, 1);
    for (let position = 0; position < shown[at]; position += 1) {
      const row = rowAt(at, position);
      const value = row < 0 ? NaN : found[row];
      const colour = Number.isFinite(value) ? scale.colour(value) : paper;
      image.data.set([...colour, 255], position * 4);
    }
    context.putImageData(image, 0, 0);
  };

  return {
    textAt, tokenText, preview, searchText, site, measure, values, rowAt, scaleOf, legend, strip, draw, ends, visible,
  };
})();
