// The views of the archive itself and of its directions.
"use strict";

residua.views.archive = (() => {
  const { el, number, count, go } = residua;

  // Any JSON value as nested lists of terms.
  const terms = (value) => {
    if (value === null || typeof value !== "object") return el("span", { class: "value" }, String(value));
    if (Array.isArray(value)) return el("span", { class: "value" }, value.map((one) => (typeof one === "object" ? JSON.stringify(one) : one)).join(", "));
    const lines = Object.entries(value).map(([name, one]) => [el("dt", {}, name), el("dd", {}, terms(one))]);
    return el("dl", { class: "terms" }, lines);
  };

  const facts = (archive) => {
    const { provenance } = archive;
    const model = provenance.model || {};
    const dataset = provenance.dataset || {};
    const state = archive.sealed ? "complete" : archive.finished ? "shards are lost" : "not complete";
    const dtypes = [...new Set(archive.stored.map((site) => site.dtype))].join(", ");
    const codecs = [...new Set(archive.stored.map((site) => site.codec))].join(", ");
    const lines = [
      ["Model", model.id || model.class || "not known"],
      ["Dataset", dataset.id || dataset.path || dataset.kind || "not known"],
      ["Examples", `${count(archive.n_examples)}, ${count(archive.n_tokens)} tokens`],
      ["Rows", `${count(archive.rows)}${archive.total_rows && archive.total_rows !== archive.rows ? ` of ${count(archive.total_rows)}` : ""} (${state})`],
      ["Stored as", `${dtypes}, ${codecs}; ${residua.bytes(archive.stored_bytes)}, ${archive.ratio.toFixed(2)} times smaller than in memory`],
      ["Shards", `${count(archive.shards)} of ${count(archive.rows_per_shard)} rows`],
      ["LM head", archive.has_head ? "with the final norm and unembedding" : "not in the archive"],
      ["Columns", archive.columns.join(", ") || "none"],
    ];
    return el("dl", { class: "facts wide" }, lines.map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
  };

  const verify = (archive) => {
    const name = /\s/.test(archive.path) ? `'${archive.path}'` : archive.path;
    return el(
      "div",
      {},
      el("p", {}, "Every chunk has a checksum, and the plan a digest that names the run. To compare all of it, and to read rows:"),
      el("pre", {}, `residua verify ${name}\nresidua info ${name}\n\npython\n>>> archive = residua.open(${JSON.stringify(archive.path)})\n>>> archive[${JSON.stringify(archive.sites[0].site)}][:10]`),
      el("dl", { class: "facts wide" }, el("dt", {}, "Plan"), el("dd", { class: "digest" }, archive.digest), el("dt", {}, "Page by"), el("dd", {}, `Residua ${archive.residua}`)),
    );
  };

  const sites = (archive) => {
    const heading = ["site", "row", "type", "size", "norm", "norms by position", "std", "kurtosis", "outlier channels"];
    const stored = new Map(archive.stored.map((site) => [site.name, site]));
    const lines = archive.sites.map((site) => {
      const one = stored.get(site.site);
      const losses = one.n_nonfinite + one.n_overflowed + one.n_spoiled;
      const norm = site.measures[0].histogram;
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, el("a", { href: residua.link({ view: "directions", site: site.site, by: "norm" }) }, site.site)),
        el("td", {}, one.shape.slice(1).join(" × ")),
        el("td", {}, `${one.dtype}, ${one.codec}`),
        el("td", { class: "numeric" }, residua.bytes(one.stored_bytes)),
        el("td", {}, el("div", { class: "with-chart" }, residua.charts.histogram(norm, { width: 110, height: 30, axis: false }), el("span", {}, `${number(site.norm_mean)} ± ${number(site.norm_std)}`))),
        el("td", {}, residua.charts.line(site.positions)),
        el("td", { class: "numeric" }, number(Math.sqrt(site.variance))),
        el("td", { class: "numeric" }, number(site.kurtosis)),
        el("td", {}, site.outlier_channels.length ? site.outlier_channels.slice(0, 6).join(", ") : "none", losses ? el("span", { class: "badge" }, `${count(losses)} not finite`) : ""),
      );
    });
    const rest = archive.stored.filter((site) => !archive.sites.some((one) => one.site === site.name)).map((site) => site.name);
    return el(
      "div",
      { class: "scroll-x" },
      el("table", { class: "sites" }, el("thead", {}, el("tr", {}, heading.map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, lines)),
      rest.length ? el("p", { class: "quiet" }, `Stored besides, and not measured here: ${rest.join(", ")}.`) : "",
    );
  };

  return {
    build(place) {
      const { archive } = residua.data;
      const notes = [...archive.notes, ...archive.page_notes];
      const { notes: left, ...provenance } = archive.provenance;
      place.append(
        el("div", { class: "cards" },
          el("section", { class: "card" }, el("h2", {}, "What it is"), facts(archive)),
          el("section", { class: "card" }, el("h2", {}, "How to check and open it"), verify(archive)),
          notes.length ? el("section", { class: "card notes" }, el("h2", {}, "Notes"), el("ul", {}, notes.map((note) => el("li", {}, note)))) : "",
        ),
        el("section", {}, el("h2", {}, "Sites"), sites(archive)),
        el("section", {}, el("h2", {}, "Where it comes from"), el("details", {}, el("summary", {}, "Provenance: model, data, settings and packages"), terms(provenance))),
      );
    },
    draw() {},
    onkey(key) {
      if (key !== "j" && key !== "k") return false;
      go({ view: "examples" });
      return true;
    },
  };
})();

residua.views.directions = (() => {
  const { el, number, count, go } = residua;
  const parts = {};
  const context = 12;

  const chooser = () => {
    const { archive } = residua.data;
    const { state } = residua;
    const entry = (site, one) =>
      el(
        "li",
        {},
        el(
          "button",
          {
            type: "button",
            class: "entry measure",
            "aria-current": site.site === state.site && one.name === state.by ? "true" : null,
            onclick: () => go({ view: "directions", site: site.site, by: one.name }),
          },
          el("span", { class: "entry-text" }, residua.measureLabel(one.name)),
          el("span", { class: "quiet" }, site.site),
          residua.charts.histogram(one.histogram, { width: 92, height: 22, axis: false }),
        ),
      );
    const chosen = archive.sites.flatMap((site) => site.measures.slice(2).map((one) => entry(site, one)));
    const own = archive.sites.flatMap((site) => site.measures.slice(0, 2).map((one) => entry(site, one)));
    return [
      chosen.length ? el("h3", {}, "Directions") : "",
      chosen.length ? el("ul", { class: "entries" }, chosen) : el("p", { class: "hint" }, "No direction was chosen for this page: residua page --direction."),
      el("h3", {}, "Norms and distances"),
      el("ul", { class: "entries" }, own),
    ];
  };

  const rows = (lines, found, shape, label) => {
    const { examples, state } = residua;
    const body = lines.map((line) => {
      const at = examples.place.get(line.example);
      const here = at !== undefined && line.position < examples.n_shown[at];
      const address = residua.link({ view: "examples", example: line.example, token: line.position, site: state.site, by: state.by });
      return el(
        "tr",
        {},
        el("td", { class: "numeric score", dataset: { score: line.score, row: line.row } }, number(line.score)),
        el("td", {}, here ? el("a", { href: address, title: "Open the example" }, `${line.example}:${line.position}`) : `${line.example}:${line.position}`),
        el("td", {}, here ? residua.strips.strip(at, found, shape, { first: line.position - context, last: line.position + context + 1, selected: line.position }) : line.text || `token ${line.token}`),
      );
    });
    return el(
      "table",
      { class: "rows" },
      el("caption", {}, label),
      el("thead", {}, el("tr", {}, ["value", "example", "context"].map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, body),
    );
  };

  return {
    build(place) {
      parts.list = el("section", { class: "browser", "aria-label": "Measures" });
      parts.main = el("section", { class: "reader" });
      place.append(parts.list, parts.main);
    },
    async draw(before) {
      const { state } = residua;
      const top = parts.list.scrollTop;
      parts.list.replaceChildren(...chooser().filter(Boolean));
      parts.list.scrollTop = top;
      const one = residua.strips.measure(state.site, state.by);
      const shape = one.histogram;
      const found = await residua.strips.values(state.site, state.by);
      if (residua.state.site !== state.site || residua.state.by !== state.by) return;
      const scale = residua.strips.scaleOf(shape);
      const beyond = shape.bins ? [shape.bins.below && `${count(shape.bins.below)} rows lie below the picture`, shape.bins.above && `${count(shape.bins.above)} above it`].filter(Boolean).join(", ") : "";
      const facts = [["rows", count(shape.n)], ["least", number(shape.least)], ["1 %", number(shape.low)], ["median", number(shape.median)], ["99 %", number(shape.high)], ["most", number(shape.most)]];
      if (shape.nonfinite) facts.push(["not finite", count(shape.nonfinite)]);
      parts.main.replaceChildren(
        el("div", { class: "heading" }, el("h2", {}, residua.measureLabel(one.name)), el("p", { class: "quiet" }, state.site)),
        el("div", { class: "spread" },
          residua.charts.histogram(shape, { width: 620, height: 150, colour: scale.css }),
          el("dl", { class: "facts" }, facts.map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]))),
        el("p", { class: "quiet" }, `All captured rows. Heights are square roots of counts.${beyond ? ` ${beyond}.` : ""}`),
        el("p", {}, residua.strips.legend(shape, residua.measureLabel(one.name))),
        rows(one.strongest, found, shape, "Strongest rows, one an example"),
        rows(one.weakest, found, shape, "Weakest rows, one an example"),
      );
      if (!before || before.site !== state.site || before.by !== state.by) window.scrollTo(0, 0);
    },
    onkey(key) {
      const all = residua.data.archive.sites.flatMap((site) => site.measures.map((one) => [site.site, one.name]));
      const here = all.findIndex(([site, by]) => site === residua.state.site && by === residua.state.by);
      const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[key];
      if (!by) return false;
      const [site, name] = all[(here + by + all.length) % all.length];
      go({ site, by: name });
      return true;
    },
  };
})();
