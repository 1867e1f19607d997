// Small pictures: histograms, lines and grids, as SVG or canvas, in the colours of the theme.
"use strict";

residua.charts = (() => {
  const { el, number, count } = residua;

  // A histogram whose bars have the colours of the scale; `marker` is a value to point at.
  const histogram = (shape, { width = 260, height = 72, colour = null, marker = null, axis = true } = {}) => {
    const { bins } = shape;
    if (!bins) return el("p", { class: "quiet" }, "no finite values");
    const highest = Math.max(...bins.counts, 1);
    const base = height - (axis ? 16 : 0);
    const step = width / bins.counts.length;
    const end = bins.start + bins.width * bins.counts.length;
    const x = (value) => ((value - bins.start) / (end - bins.start)) * width;
    const svg = el("svg", {
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      class: "chart",
      role: "img",
      "aria-label": `Histogram of ${count(shape.n)} rows from ${number(shape.least)} to ${number(shape.most)}`,
    });
    bins.counts.forEach((value, i) => {
      // The square root keeps rare values visible.
      const tall = value ? Math.max(1, Math.sqrt(value / highest) * (base - 4)) : 0;
      const low = bins.start + i * bins.width;
      const bar = el("rect", {
        x: (i * step).toFixed(2),
        y: (base - tall).toFixed(2),
        width: Math.max(0.6, step - 0.6).toFixed(2),
        height: tall.toFixed(2),
        class: "bar",
      });
      if (colour) bar.style.fill = colour(low + bins.width / 2);
      bar.append(el("title", {}, `${number(low)} to ${number(low + bins.width)}: ${count(value)} rows`));
      svg.append(bar);
    });
    svg.append(el("line", { x1: 0, x2: width, y1: base + 0.5, y2: base + 0.5, class: "axis" }));
    if (marker !== null && Number.isFinite(marker)) {
      const at = Math.min(width - 1, Math.max(1, x(marker)));
      svg.append(el("path", { d: `M${at} ${base}v${2 - base}`, class: "marker" }));
      svg.append(el("path", { d: `M${at - 4} 0h8l-4 6z`, class: "marker-head" }));
    }
    if (axis) {
      svg.append(el("text", { x: 0, y: height - 3, class: "tick" }, number(bins.start)));
      svg.append(el("text", { x: width, y: height - 3, class: "tick", "text-anchor": "end" }, number(end)));
      if (bins.start < 0 && end > 0 && x(0) > 46 && x(0) < width - 46) {
        svg.append(el("text", { x: x(0), y: height - 3, class: "tick", "text-anchor": "middle" }, "0"));
      }
    }
    return svg;
  };

  // Mean and standard deviation by position.
  const line = (positions, { width = 150, height = 34 } = {}) => {
    const means = positions.norm_mean;
    const highest = Math.max(...means, 0) || 1;
    const last = Math.max(...positions.position, 1);
    const points = means.map((value, i) => [
      ((positions.position[i] / last) * width).toFixed(1),
      (height - 2 - (value / highest) * (height - 6)).toFixed(1),
    ]);
    return el(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        width,
        height,
        class: "chart",
        role: "img",
        "aria-label": `Mean norm by position, up to ${number(highest)}`,
      },
      el("path", { d: `M${points.map((point) => point.join(" ")).join("L")}`, class: "curve" }),
      el("line", { x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5, class: "axis" }),
      el("title", {}, `mean norm by position, 0 to ${last}; highest ${number(highest)}`),
    );
  };

  // A matrix as pixels: `value(row, column)` from 0 to 1.
  const pixels = (rows, columns, value, { className = "pixels", label = "" } = {}) => {
    const canvas = el("canvas", { width: columns, height: rows, class: className, role: "img", "aria-label": label });
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    const [paper, ink] = residua.strips.ends();
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const share = value(row, column);
        const at = (row * columns + column) * 4;
        for (let i = 0; i < 3; i += 1) image.data[at + i] = paper[i] + (ink[i] - paper[i]) * share;
        image.data[at + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  };

  return { histogram, line, pixels };
})();
