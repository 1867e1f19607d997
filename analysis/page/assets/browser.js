// The view of examples: a list, the text of one with its tokens coloured, and what is known of one token.
"use strict";

residua.views.examples = (() => {
  const { el, number, count, go, measureLabel, shareBar } = residua;
  const parts = {};
  let order = [];
  let drawing = 0;

  const current = () => {
    const { examples, state } = residua;
    const at = examples.place.get(state.example);
    return at === undefined ? order[0] || 0 : at;
  };

  const shape = () => residua.strips.measure(residua.state.site, residua.state.by).histogram;

  const select = (label, options, chosen, onchange) => {
    const field = el("select", { onchange: (event) => onchange(event.target.value) });
    for (const [value, text] of options) field.append(el("option", { value, selected: value === chosen }, text));
    return el("label", { class: "field" }, el("span", {}, label), field);
  };

  // The list of examples that match the search, in the order asked for.
  const list = async () => {
    const { examples, state } = residua;
    const asked = parts.search.value.trim().toLowerCase();
    order = examples.numbers.map((_, at) => at);
    if (asked) order = order.filter((at) => residua.strips.searchText(at).includes(asked));
    if (parts.sort.value !== "number") {
      const found = await residua.strips.values(state.site, state.by);
      const best = new Map(
        order.map((at) => {
          let most = -Infinity;
          for (let row = examples.rowStarts[at]; row < examples.rowStarts[at + 1]; row += 1) {
            const value = parts.sort.value === "most" ? found[row] : -found[row];
            if (value > most) most = value;
          }
          return [at, most];
        }),
      );
      order.sort((first, second) => best.get(second) - best.get(first) || first - second);
    }
    parts.found.textContent = asked ? `${count(order.length)} of ${count(examples.numbers.length)}` : "";
    parts.list.replaceChildren(
      ...order.map((at) =>
        el(
          "li",
          {},
          el(
            "button",
            { type: "button", class: "entry", dataset: { at }, onclick: () => open(at) },
            el("span", { class: "entry-number" }, String(examples.numbers[at])),
            el("span", { class: "entry-text" }, residua.strips.preview(at) || "(no text)"),
            el("canvas", { class: "entry-strip", width: 1, height: 1, "aria-hidden": "true" }),
          ),
        ),
      ),
    );
    if (!order.length) parts.list.append(el("li", { class: "quiet" }, "No example has this text."));
    mark();
    watch();
  };

  const open = (at) => go({ view: "examples", example: residua.examples.numbers[at], token: null });

  const mark = () => {
    const at = current();
    for (const entry of parts.list.querySelectorAll(".entry")) {
      if (Number(entry.dataset.at) === at) {
        entry.setAttribute("aria-current", "true");
        entry.scrollIntoView({ block: "nearest" });
      } else entry.removeAttribute("aria-current");
    }
  };

  // Strips of the list are drawn when they come into sight.
  const watch = () => {
    if (parts.watcher) parts.watcher.disconnect();
    parts.watcher = new IntersectionObserver(async (entries) => {
      const seen = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
      if (!seen.length) return;
      const { state } = residua;
      const found = await residua.strips.values(state.site, state.by);
      for (const node of seen) {
        residua.strips.draw(node.querySelector("canvas"), Number(node.dataset.at), found, shape());
        parts.watcher.unobserve(node);
      }
    }, { root: parts.list.parentNode });
    for (const entry of parts.list.querySelectorAll(".entry")) parts.watcher.observe(entry);
  };

  const controls = () => {
    const { archive } = residua.data;
    const { state } = residua;
    const sites = archive.sites.map((one) => [one.site, one.site]);
    const measures = residua.strips.site(state.site).measures.map((one) => [one.name, measureLabel(one.name)]);
    const elsewhere = archive.sites
      .filter((one) => one.site !== state.site)
      .flatMap((one) => one.measures.slice(2).map((each) => [`${one.site}\n${each.name}`, `${each.name} (${one.site})`]));
    const pick = (value) => {
      const [site, by] = value.includes("\n") ? value.split("\n") : [state.site, value];
      go({ site, by });
    };
    const field = select("Colour by", [...measures, ...elsewhere], state.by, pick);
    const keep = (site) => {
      const has = residua.strips.site(site).measures.some((one) => one.name === state.by);
      go({ site, by: has ? state.by : "norm" });
    };
    const nodes = [select("Site", sites, state.site, keep), field];
    if (archive.files.readouts[state.site]) {
      nodes.push(
        el(
          "button",
          { type: "button", class: "toggle", "aria-pressed": String(state.lens), onclick: () => go({ lens: !state.lens }) },
          `Read-outs of the ${archive.readouts.lens}`,
        ),
      );
    }
    nodes.push(residua.strips.legend(shape(), measureLabel(state.by)));
    parts.controls.replaceChildren(...nodes);
  };

  const readoutsOf = async (site) => {
    const file = residua.data.archive.files.readouts[site];
    if (!file) return null;
    const found = await residua.load(file);
    if (typeof found.tokens === "string") {
      found.tokens = residua.unpack(found.tokens, Int32Array);
      found.probabilities = residua.unpack(found.probabilities, Float32Array);
    }
    const at = (row) => (row < 0 ? null : row * found.k + found.k <= found.tokens.length ? row * found.k : null);
    return {
      best: (row) => (at(row) === null ? null : residua.strips.tokenText(found.tokens[at(row)])),
      all: (row) =>
        at(row) === null
          ? []
          : Array.from({ length: found.k }, (_, i) => [
              residua.strips.tokenText(found.tokens[at(row) + i]),
              found.probabilities[at(row) + i],
            ]),
    };
  };

  const text = async () => {
    const { examples, state } = residua;
    const ticket = (drawing += 1);
    const at = current();
    const [found, readouts] = await Promise.all([
      residua.strips.values(state.site, state.by),
      state.lens ? readoutsOf(state.site) : null,
    ]);
    if (ticket !== drawing) return; // another example was chosen meanwhile
    const shown = examples.n_shown[at];
    const facts = [`${count(examples.n_tokens[at])} tokens`, `rows ${count(examples.first_row[at])} to ${count(examples.first_row[at] + examples.n_rows[at] - 1)}`];
    if (shown < examples.n_tokens[at]) facts.push(`the first ${count(shown)} are shown`);
    const columns = Object.entries(examples.columns)
      .filter(([, values]) => values[at] !== "")
      .map(([name, values]) => [el("dt", {}, name), el("dd", {}, values[at])]);
    parts.heading.replaceChildren(
      el("h2", {}, `Example ${examples.numbers[at]}`),
      el("p", { class: "quiet" }, facts.join(" · ")),
      columns.length ? el("dl", { class: "columns" }, columns) : "",
    );
    const covered = readouts && examples.rowStarts[at] < examples.rowStarts[at + 1] && readouts.best(examples.rowStarts[at]) !== null;
    parts.text.replaceChildren(
      residua.strips.strip(at, found, shape(), {
        selected: state.token,
        onpick: (position) => go({ example: examples.numbers[at], token: position === state.token ? null : position }),
        under: covered ? readouts.best : null,
      }),
    );
    if (state.lens && !covered) {
      const n = residua.data.archive.readouts.n_examples;
      parts.text.append(el("p", { class: "note" }, `Read-outs are on the page for the first ${count(n)} examples of the list by number.`));
    }
    await inspector(at, found, readouts, ticket);
  };

  // What is known of the selected token.
  const inspector = async (at, found, readouts, ticket) => {
    const { examples, state } = residua;
    const { archive } = residua.data;
    const position = state.token !== null && state.token < examples.n_shown[at] ? state.token : null;
    const row = position === null ? -1 : residua.strips.rowAt(at, position);
    const scale = residua.strips.scaleOf(shape());
    const nodes = [
      el("h3", {}, `${measureLabel(state.by)}, ${state.site}`),
      residua.charts.histogram(shape(), { colour: scale.css, marker: row < 0 ? null : found[row] }),
      el("p", { class: "quiet" }, `All ${count(shape().n)} rows; heights are square roots of counts.`),
    ];
    if (position === null) {
      nodes.push(el("p", { class: "hint" }, "Choose a token to see its numbers."));
      parts.inspector.replaceChildren(...nodes);
      return;
    }
    const id = examples.tokens[examples.starts[at] + position];
    nodes.push(
      el("h3", {}, "Token"),
      el("p", { class: "picked" }, residua.strips.visible(residua.strips.textAt(at, position))),
      el(
        "dl",
        { class: "facts" },
        el("dt", {}, "id"), el("dd", {}, String(id)),
        el("dt", {}, "position"), el("dd", {}, String(position)),
        el("dt", {}, "row"), el("dd", { id: "row-number" }, row < 0 ? "none is kept" : String(examples.first_row[at] + row - examples.rowStarts[at])),
      ),
    );
    if (row >= 0) {
      const names = residua.strips.site(state.site).measures.map((one) => one.name);
      const all = await Promise.all(names.map((name) => residua.strips.values(state.site, name)));
      nodes.push(
        el(
          "table",
          { class: "values" },
          el("caption", {}, state.site),
          names.map((name, i) =>
            el(
              "tr",
              { class: name === state.by ? "current" : null },
              el("th", { scope: "row" }, el("button", { type: "button", class: "plain", onclick: () => go({ by: name }) }, measureLabel(name))),
              el("td", { dataset: { value: all[i][row], by: name } }, number(all[i][row])),
            ),
          ),
        ),
      );
      const lens = readouts || (await readoutsOf(state.site));
      const best = lens ? lens.all(row) : [];
      if (best.length) nodes.push(el("h3", {}, `${archive.readouts.lens}, ${state.site}`), readoutTable([[state.site, best]]), layersButton(row));
      const ranges = residua.strips.site(state.site).ranges;
      if (ranges) nodes.push(residua.ranges.button(ranges, examples.first_row[at] + row - examples.rowStarts[at]));
    }
    if (ticket === drawing) parts.inspector.replaceChildren(...nodes);
  };

  // The best tokens at each site; of several sites, each has a heading and fewer tokens.
  const readoutTable = (lines) => {
    const several = lines.length > 1;
    return el(
      "table",
      { class: "readouts" },
      lines.map(([site, best]) => [
        several ? el("tr", {}, el("th", { scope: "rowgroup", colspan: "3" }, site)) : null,
        best.slice(0, several ? 3 : best.length).map(([text, share]) =>
          el(
            "tr",
            {},
            el("td", { class: "readout-text" }, residua.strips.visible(text)),
            el("td", { class: "share", dataset: { share } }, share.toFixed(3)),
            el("td", {}, shareBar(share)),
          ),
        ),
      ]),
    );
  };

  const layersButton = (row) => {
    const sites = Object.keys(residua.data.archive.files.readouts);
    const wanted = residua.data.archive.sites.map((one) => one.site).filter((name) => sites.includes(name));
    if (wanted.length < 2) return "";
    const button = el("button", {
      type: "button",
      onclick: async () => {
        const all = await Promise.all(wanted.map(async (name) => [name, (await readoutsOf(name)).all(row)]));
        button.replaceWith(readoutTable(all));
      },
    }, `All ${wanted.length} sites`);
    return button;
  };

  const step = (by) => {
    const here = order.indexOf(current());
    const next = order[Math.min(order.length - 1, Math.max(0, here + by))];
    if (next !== undefined) open(next);
  };

  const stepToken = (by) => {
    const at = current();
    const { state, examples } = residua;
    const last = examples.n_shown[at] - 1;
    const token = state.token === null ? 0 : Math.min(last, Math.max(0, state.token + by));
    go({ example: examples.numbers[at], token });
    const node = parts.text.querySelector(`[data-position="${token}"]`);
    if (node) node.scrollIntoView({ block: "nearest" });
  };

  const stepSite = (by) => {
    const { sites } = residua.data.archive;
    const here = sites.findIndex((one) => one.site === residua.state.site);
    const next = sites[(here + by + sites.length) % sites.length];
    const has = next.measures.some((one) => one.name === residua.state.by);
    go({ site: next.site, by: has ? residua.state.by : "norm" });
  };

  const stepMeasure = () => {
    const { measures } = residua.strips.site(residua.state.site);
    const here = measures.findIndex((one) => one.name === residua.state.by);
    go({ by: measures[(here + 1) % measures.length].name });
  };

  const keys = {
    j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
    l: () => stepToken(1), ArrowRight: () => stepToken(1), h: () => stepToken(-1), ArrowLeft: () => stepToken(-1),
    "]": () => stepSite(1), "[": () => stepSite(-1), b: stepMeasure, r: () => go({ lens: !residua.state.lens }),
  };

  return {
    build(place) {
      parts.search = el("input", {
        type: "search", placeholder: "Search in texts  /", "aria-label": "Search in texts", oninput: () => list(),
      });
      parts.sort = el(
        "select",
        { "aria-label": "Order", onchange: () => list() },
        el("option", { value: "number" }, "by number"),
        el("option", { value: "most" }, "highest first"),
        el("option", { value: "least" }, "lowest first"),
      );
      parts.found = el("span", { class: "quiet" });
      parts.list = el("ol", { class: "entries" });
      parts.heading = el("div", { class: "heading" });
      parts.controls = el("div", { class: "controls" });
      parts.text = el("div", { class: "text" });
      parts.inspector = el("aside", { class: "inspector", "aria-label": "The selected token" });
      place.append(
        el("section", { class: "browser", "aria-label": "Examples" }, el("div", { class: "finder" }, parts.search, parts.sort, parts.found), el("div", { class: "scroller" }, parts.list)),
        el("section", { class: "reader" }, parts.controls, parts.heading, parts.text),
        parts.inspector,
      );
    },
    async draw(before) {
      const { state } = residua;
      const rebuilt = !before || before.view !== state.view;
      const recoloured = rebuilt || before.site !== state.site || before.by !== state.by;
      controls();
      if (rebuilt || (recoloured && parts.sort.value !== "number")) await list();
      else if (recoloured) watch();
      else mark();
      await text();
    },
    onkey(key) {
      if (!keys[key]) return false;
      keys[key]();
      return true;
    },
    search() {
      parts.search.focus();
      parts.search.select();
    },
  };
})();
